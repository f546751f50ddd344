"""Diagnostics: each finding is caused by a test, and reported once under its name."""

import dataclasses
import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from grpo.policy import Policy
from grpo.rewards.xml_format import only_answer
from grpo.rollout.native_engine import NativeEngine
from grpo.tracking.diagnostics import Diagnostics, patience_for
from grpo.tracking.findings import Finding
from grpo.types import Group
from tests.data.test_data_faults import shaped
from tests.test_trainer import run

RANDOM = "[sum(map(ord, str(c))) % 8 / 8 for c in completions]"
FALLING = "[sum(map(ord, str(c))) % 8 / 8 - calls for c in completions]"

SOUND: dict[str, float] = {
    "reward/mean": 0.5,
    "reward/zero_std_fraction": 0.25,
    "policy/kl": 0.01,
    "policy/entropy": 1.5,
    "policy/learning_rate": 1e-5,
    "policy/sampling_logprob_difference": 1e-6,
    "rollout/truncated_fraction": 0.25,
}


def rows(rewards: list[dict[str, float]], ended: bool = True, text: str = "<answer>4</answer>") -> list[dict[str, Any]]:
    return [{"completion": text, "ended": ended, "rewards": values} for values in rewards]


def observe(watch: Diagnostics, steps: int = 40, **changes: Any) -> list[tuple[int, Finding]]:
    """Return all findings of a run without faults except `changes`. A callable gets the step."""
    found = []
    for step in range(1, steps + 1):
        given = {key: value(step) if callable(value) else value for key, value in changes.items()}
        seen = rows(
            given.pop("rewards", [{"a": 0.0}, {"a": 1.0}]),
            given.pop("ended", True),
            given.pop("text", "<answer>4</answer>"),
        )
        for prompt, row in zip(given.pop("prompts", []), seen, strict=False):
            row |= {"prompt": prompt, "reward": row["rewards"]["a"]}
        found += [(step, finding) for finding in watch.observe(step, SOUND | given, seen)]
    return found


def test_a_sound_run_says_nothing() -> None:
    assert observe(Diagnostics(has_answer=lambda text: only_answer(text) is not None)) == []
    assert observe(Diagnostics(), rewards=[]) == []  # step 0: an evaluation, no completions


@pytest.mark.parametrize(
    ("changes", "name", "step", "says"),
    [
        ({"rewards": [{"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 2.0}]}, "dead:a", 20,
         "reward 'a' has been 0 for all 40 completions of steps 1 to 20; it teaches nothing: it never fires"),
        ({"rewards": [{"soft_format": 0.0}] * 2}, "dead:soft_format", 20,
         "reward 'soft_format' has been 0 .* stops at line breaks.* use xml_format"),
        ({"rewards": [{"a": 0.5}] * 2}, "constant:a", 20, "reward 'a' has been 0.5 for all 40 completions"),
        ({"rewards": [{"a": math.nan}] * 2}, "silent:a", 20,
         "reward 'a' applied to none of the completions of steps 1 to 20"),
        ({"rollout/truncated_fraction": 1.0}, "truncated", 3,
         "6 of 6 completions of steps 1 to 3 hit sampling.max_completion_length 200 .*raise it"),
        ({"ended": False}, "no_end_token", 20, "the end token was never sampled, in 40 completions.*eos_token"),
        ({"text": "It is 4."}, "no_answer_found", 20,
         "none of 40 completions holds an answer .*data.system_prompt xml"),
        ({"reward/zero_std_fraction": 1.0}, "flat", 20, "every group of steps 1 to 20 was flat.*too hard.*too easy"),
        ({"reward/zero_std_fraction": 1.0, "rewards": [{"a": 0.0}] * 2, "prompts": ["x", "y"], "said": {"dead:a"}},
         "flat", 3, "no completion of steps 1 to 3 earned anything.*easier reward beside it.*data.examples"),
        ({"reward/zero_std_fraction": 1.0, "prompts": ["x", "y"], "said": {"collapse"}},
         "flat", 3, "every group of steps 1 to 3 was flat: .* from 0 to 1.*sampling.dynamic_sampling true"),
        ({"reward/zero_std_fraction": lambda step: 0.75 if step % 2 else 0.7}, "mostly_flat", 10,
         "72% of the groups of steps 1 to 10 were flat.*sampling.dynamic_sampling true"),
        ({"rewards": lambda step: [{"a": 1.0, "b": 0.0}] if step == 1 else [{"a": step % 2 / 4, "b": float(step > 4)}]},
         "form_only", 14, "reward 'b' is full since step 5, while 'a' stays at 0.12 on average.*look at the comple"),
        ({"policy/learning_rate": 0.0}, "learning_rate", 3, "learning rate has been 0 in steps 1 to 3"),
        ({"policy/sampling_logprob_difference": 0.2}, "sampler", 3, "disagree by 0.2 nats.*rollout.engine native"),
        ({"policy/kl": lambda step: 0.4 * step}, "kl", 5, "KL to the reference is running away: 2 nats"),
        ({"policy/entropy": lambda step: 0.5 + 0.2 * step}, "entropy_rise", 8, "0.9 -> 1.9 nats.*at random"),
        ({"policy/entropy": lambda step: 2.0 * 0.5**step}, "entropy_fall", 9, "collapsed.*the reward is no better"),
    ],
    ids=lambda value: value if isinstance(value, str) and ":" not in value and " " not in value else None,
)  # fmt: skip
def test_each_finding_is_made_once(changes: dict[str, Any], name: str, step: int, says: str) -> None:
    import re

    changes = dict(changes)
    said = changes.pop("said", set())  # other findings of the same run
    watch = Diagnostics(
        max_completion_length=200, has_answer=lambda text: only_answer(text) is not None, said=set(said)
    )
    found = observe(watch, **changes)
    assert [(when, finding.name) for when, finding in found] == [(step, name)]
    assert re.search(says, str(found[0][1])), str(found[0][1])
    assert "\n" not in str(found[0][1])
    assert observe(Diagnostics(said={name, *said}), **changes) == []  # a resumed run does not say it again


def collapsing(
    collapses: bool, flat_at_first: bool = False, is_right_often: bool = False
) -> list[tuple[int, str, str]]:
    """Findings of a run of 40 steps, 4 prompts x 4 completions: the form is learned in 8 steps. With `collapses`,
    from step 10 on every completion is one of five texts and the entropy is about 0, and 0 where all groups are flat.
    """
    watch, found = Diagnostics(), []
    for step in range(1, 41):
        collapsed, flat = collapses and step >= 10, (step % 3 == 0 and step >= 10) or (flat_at_first and step <= 2)
        entropy = 0.0 if flat else 0.05 if step >= 10 else 2.4 - step / 4
        seen = []
        for draw in range(4):
            for sample in range(4):
                text = f"answer {(step + draw) % 5}" if collapsed else f"answer {step} {draw} {sample}"
                is_right = ((step + draw + sample) % 7 == 0) != is_right_often
                reward = 1.3 if is_right else 0.3
                judged = {"accuracy": float(is_right), "format": 1.0 if step > 8 else float(sample % 2)}
                prompt = f"question {step} {draw}"
                seen.append({"prompt": prompt, "completion": text, "ended": True, "rewards": judged, "reward": reward})
        metrics = SOUND | {
            "policy/entropy": entropy,
            "policy/kl": 0.0,
            "policy/sampling_logprob_difference": 0.0 if flat else 1e-6,
            "reward/zero_std_fraction": 1.0 if flat else 0.5,
            "reward/mean": sum(row["reward"] for row in seen) / len(seen),
        }
        found += [(step, finding.name, finding.text) for finding in watch.observe(step, metrics, seen)]
    # By design its accuracy does not move, and two thirds of its groups are flat.
    return [finding for finding in found if finding[1] not in ("form_only", "mostly_flat")]


def test_a_collapse_is_reported() -> None:
    """A real case: the reward for the form rose, so a fall of the entropy alone was not a finding."""
    [(step, name, text)] = collapsing(collapses=True)
    assert (step, name) == (15, "collapse")
    assert "96 completions of 24 prompts in steps 10 to 15 are one of 5 texts, and earn 0.4" in text


def test_certainty_is_no_collapse() -> None:
    """As many texts as prompts, or few texts with nearly the best reward (yes or no)."""
    assert collapsing(collapses=False) == []
    assert collapsing(collapses=True, is_right_often=True) == []


def test_a_step_whose_groups_are_all_flat_says_nothing_about_the_policy() -> None:
    """No completion went through the model, so its entropy of 0 counts neither as first nor as last entropy."""
    assert collapsing(collapses=False, flat_at_first=True) == []
    flat = {"policy/entropy": lambda step: 0.0 if step < 3 else 1.1, "reward/zero_std_fraction": lambda step: step < 3}
    assert observe(Diagnostics(), **flat) == []
    kl = {"policy/kl": lambda step: 2.0 * (step % 2), "policy/entropy": lambda step: 1.5 * (step % 2)}
    found = observe(Diagnostics(), **kl, **{"reward/zero_std_fraction": lambda step: float(step % 2 == 0)})
    assert [(step, finding.name) for step, finding in found] == [(5, "kl")]


FIXTURES = Path(__file__).parents[1] / "fixtures"
"""Two real runs. For each step: the metrics that are read, and [prompt, text, accuracy, xml_format, ended] of each
completion, with prompts and texts by number.

collapsed_run: the first 25 steps of SmolLM2-135M-Instruct on arithmetic with the rewards accuracy 1 and xml_format 0.3,
learning rate 3e-5, beta 0. healthy_run: the 30 steps of `python launch/train.py` with its defaults."""


def replayed(name: str, weight: float) -> dict[str, int]:
    """Return the findings of a real run, and their steps. `weight`: of the reward for the form."""
    watch, found = Diagnostics(patience_for(30), learning_rate=1e-5), {}
    for step, (metrics, seen) in enumerate(json.loads(gzip.decompress((FIXTURES / f"{name}.json.gz").read_bytes())), 1):
        full = [
            {
                "prompt": f"prompt {prompt}",
                "completion": f"text {text}",
                "ended": ended,
                "rewards": {"accuracy": accuracy, "xml_format": form},
                "reward": accuracy + weight * form,
            }
            for prompt, text, accuracy, form, ended in seen
        ]
        found |= {finding.name: step for finding in watch.observe(step, metrics, full)}
    return found


def test_a_real_collapse_is_reported_within_20_steps() -> None:
    """From step 10 on the policy writes few texts for all prompts, most groups are flat, only the form is earned."""
    assert replayed("collapsed_run", weight=0.3) == {"collapse": 17, "form_only": 18, "mostly_flat": 19}


def test_a_real_run_that_learns_has_no_finding() -> None:
    assert replayed("healthy_run", weight=0.2) == {}


def learning(steps: int, accuracy: float, rise: float, is_flat: bool = False) -> list[tuple[int, str]]:
    """Findings of a run without faults: the form is learned in 5 steps, accuracy rises to 1."""
    watch, found = Diagnostics(), []
    for step in range(1, steps + 1):
        right = min(1.0, accuracy + rise * step)
        seen = []
        for number in range(64):
            rewards = {"accuracy": float(number % 16 < 16 * right), "form": float(step > 5 or number % 3 == 0)}
            made = {"prompt": f"question {step} {number // 16}", "completion": f"text {step} {number}", "ended": True}
            seen.append(made | {"rewards": rewards, "reward": rewards["accuracy"] + 0.3 * rewards["form"]})
        mean = sum(row["reward"] for row in seen) / len(seen)
        flat = 1.0 if right == 1 else 0.75 if is_flat and right > 0.8 else 0.25
        metrics = SOUND | {"reward/mean": mean, "reward/zero_std_fraction": flat}
        found += [(step, finding.name) for finding in watch.observe(step, metrics, seen)]
    return found


def test_a_run_that_learns_has_no_finding() -> None:
    """A form that is learned first, accuracy that rises slowly, and groups that are flat because they are solved."""
    assert learning(40, accuracy=0.1, rise=0.02, is_flat=True) == []
    assert learning(12, accuracy=0.6, rise=0.0) == []
    assert learning(40, accuracy=0.1, rise=0.0) == [(15, "form_only")]


def test_findings_keep_their_serialized_keys() -> None:
    assert Finding("kl", "it runs away", "lower it").to_row() == {
        "name": "kl",
        "text": "it runs away",
        "mend": "lower it",
    }


def test_a_learning_rate_of_0_is_said_at_once() -> None:
    assert [(step, finding.name) for step, finding in observe(Diagnostics(learning_rate=0.0))] == [(1, "learning_rate")]


def test_a_model_that_became_certain_because_it_learned_is_fine() -> None:
    learned = {"policy/entropy": lambda step: 2.0 * 0.5**step, "reward/mean": lambda step: step / 40}
    assert observe(Diagnostics(), **learned) == []


def test_patience_follows_the_length_of_the_run() -> None:
    assert [patience_for(steps) for steps in (1, 30, 60, 500)] == [5, 6, 12, 20]


def findings(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_with_the_classic_dead_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The common reward soft_format: reported once, in the file, in the terminal and in the report."""
    rewards = {"soft_format": 1.0, f"{tmp_path}/count_a.py:count_a": 1.0}
    settings = {"rewards": json.dumps(rewards), "steps": 5, "eval_every": 0, "save_every": 5, "tracking.report": "true"}
    run(tmp_path, "run", **settings)
    found = {row["name"]: row for row in findings(tmp_path / "run")}
    assert found["dead:soft_format"]["step"] == 5
    assert found["dead:soft_format"]["text"].startswith("reward 'soft_format' has been 0 for all 60 completions")
    assert capsys.readouterr().out.count("reward 'soft_format' has been 0") == 1
    assert r"reward 'soft\_format' has been 0" in (tmp_path / "run" / "report.md").read_text()
    run(tmp_path, "run", **settings | {"steps": 11, "resume": "auto"})
    assert sum(row["name"] == "dead:soft_format" for row in findings(tmp_path / "run")) == 1


def wrong_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine reports logprobs that are 0.2 too large; the check at the start is disabled."""
    generate = NativeEngine.generate

    def shifted(self: NativeEngine, *arguments: Any, finished: Any = None, **named: Any) -> list[Group]:
        groups = [
            Group(
                group.prompt,
                [
                    dataclasses.replace(each, logprobs=[value - 0.2 for value in each.logprobs])
                    for each in group.completions
                ],
            )
            for group in generate(self, *arguments, **named)
        ]
        for group in groups if finished else []:
            finished(group)
        return groups

    monkeypatch.setattr("grpo.run.build.check_agreement", lambda *arguments: 0.0)
    monkeypatch.setattr(NativeEngine, "generate", shifted)


def forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fourth optimizer step on, all letters are equally likely."""
    step, steps = Policy.step, itertools.count(1)

    def blurred(self: Policy, usable: bool = True) -> float:
        norm = step(self, usable)
        if next(steps) >= 4:
            self.model.get_parameter("model.norm.weight").data.zero_()
        return norm

    monkeypatch.setattr(Policy, "step", blurred)


def never_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.run.build.check_agreement", lambda *arguments: 0.0)
    shaped(monkeypatch, [5] * 8, False, "dddddddd")


FAULTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    # finding: (the body of a reward, settings, what is done to the engine)
    "constant:mine": ("[0.5 for _ in completions]", {}, None),
    "silent:mine": ("[None for _ in completions]", {}, None),
    "truncated": (RANDOM, {}, never_ending),
    "no_end_token": (RANDOM, {}, never_ending),
    "sampler": (RANDOM, {}, wrong_logprobs),
    "kl": (RANDOM, {"optimizer.learning_rate": 0.3}, None),
    "entropy_fall": (FALLING, {"optimizer.learning_rate": 0.3, "objective.beta": 1e-9, "steps": 10}, None),
    "collapse": (FALLING, {"optimizer.learning_rate": 0.3, "objective.beta": 0, "steps": 16}, None),
    "entropy_rise": (RANDOM, {"sampling.temperature": 0.05, "objective.beta": 0, "steps": 8}, forgetting),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_says_what_is_wrong_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any, name: str
) -> None:
    """Findings of real runs, caused by the reward, the settings or the engine."""
    values, settings, harm = FAULTS[name]
    (tmp_path / "mine.py").write_text(
        f"calls = 0\ndef mine(completions, **_):\n    global calls\n    calls += 1\n    return {values}\n"
    )
    if harm is not None:
        harm(monkeypatch)
    common = {"steps": 6, "eval_every": 0, "save_every": 0, "rewards": json.dumps({f"{tmp_path}/mine.py:mine": 1.0})}
    run(tmp_path, "run", **common | settings)
    names = {row["name"].replace(f"{tmp_path}/mine.py:", "") for row in findings(tmp_path / "run")}
    assert name in names, names
    record_property("provoked in real runs", name.partition(":")[0])


def test_a_run_that_cannot_learn_says_so(tmp_path: Path, record_property: Any) -> None:
    """No end, no answer, flat groups and a learning rate of 0 are separate findings."""
    run(
        tmp_path,
        "run",
        **{
            "steps": 5,
            "eval_every": 0,
            "save_every": 0,
            "rewards": '{"accuracy": 1.0}',
            "optimizer.learning_rate": 0,
            "sampling.max_completion_length": 1,
            "tokens_per_batch": 1024,
        },
    )
    names = {row["name"] for row in findings(tmp_path / "run")}
    provoked = {"dead:accuracy", "flat", "learning_rate", "no_answer_found"}
    assert provoked <= names
    for name in sorted(provoked):
        record_property("provoked in real runs", name.partition(":")[0])

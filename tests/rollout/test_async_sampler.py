"""Asynchronous sampling and scoring: the order of batches, and equality with the synchronous loop."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import grpo.experience
from grpo.config.parser import load_config
from grpo.errors import ConfigError
from grpo.models.loading import load_model
from grpo.models.logprob_model import use_grpo_attention
from grpo.rollout.async_sampler import AsyncSampler
from grpo.rollout.engine import build_engine, correction_of
from grpo.run.checkpoint import load_checkpoint, save_checkpoint
from grpo.types import Completion, Group, Prompt, SamplingPlan
from tests.test_trainer import arguments, run, same

AHEAD = {"rollout.max_staleness": 1, "eval_every": 0}


def rollouts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.mark.parametrize("staleness", [1, 2])
def test_each_step_learns_from_the_policy_of_so_many_steps_ago(tmp_path: Path, staleness: int) -> None:
    metrics = run(tmp_path, "run", **AHEAD | {"rollout.max_staleness": staleness, "optimizer.learning_rate": 0.02})
    folder = tmp_path / "run"
    assert [row["rollout/staleness"] for row in metrics] == [min(step, staleness) for step in range(4)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts: dict[int, list[str]] = {}
    for row in rollouts(folder):
        texts.setdefault(row["step"], []).append(row["completion"])
    for step in (1, 2, 3, 4):
        before = step - 1 - staleness
        model = load_model(str(tmp_path / "model"))
        if before > 0:
            model.load_state_dict(load_file(folder / "checkpoints" / f"step-{before}" / "model.safetensors"))
            model.tie_weights()
        use_grpo_attention(model)
        engine = build_engine("native", model, tokenizer, slots=64, uses_packed_attention=True)
        rows = [row for row in rollouts(folder) if row["step"] == step and row["sample"] == 0]
        ids = [tuple(tokenizer.encode(row["prompt"] + "\n", add_special_tokens=False)) for row in rows]
        groups = engine.generate(
            [Prompt(row["draw"], "", i) for row, i in zip(rows, ids, strict=True)], SamplingPlan(4, 8, 1.0, 0)
        )
        assert [completion.text for group in groups for completion in group.completions] == texts[step]


def test_weights_that_do_not_move_make_sampling_ahead_the_same_as_not(tmp_path: Path) -> None:
    still = {"eval_every": 0, "optimizer.learning_rate": 0.0}
    plain = run(tmp_path, "plain", **still)
    ahead = run(tmp_path, "ahead", **AHEAD | still | {"rollout.correction": "none"})
    assert rollouts(tmp_path / "plain") == rollouts(tmp_path / "ahead")
    assert same(plain, [{k: v for k, v in row.items() if k != "rollout/staleness"} for row in ahead])


@pytest.mark.parametrize("extra", [{}, {"lora.r": 2}, {"rollout.max_staleness": 2, "rollout.correction": "mask"}])
def test_a_run_that_samples_ahead_is_resumed_to_the_bit(tmp_path: Path, extra: dict) -> None:
    whole = run(tmp_path, "whole", **AHEAD | extra)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for later in (3, 4):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{later}")
    shutil.rmtree(tmp_path / "part" / "final")
    assert same(run(tmp_path, "part", resume="auto", **AHEAD | extra), whole)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert rollouts(tmp_path / "whole") == rollouts(tmp_path / "part")


def test_it_still_learns_what_is_rewarded(tmp_path: Path) -> None:
    rows = run(
        tmp_path, "run", steps=40, save_every=0, prompts_per_step=8, **AHEAD | {"objective.beta": 0}
    )  # as test_trainer's run that does not sample ahead
    assert sum(row["reward/mean"] for row in rows[:5]) / 5 < 0.1
    assert sum(row["reward/mean"] for row in rows[-5:]) / 5 > 0.5


def test_the_reference_before_the_rewards_and_scores_before_the_last_completion_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The synchronous order: all completions, all scores, the reference, the update."""
    (tmp_path / "each.py").write_text(
        "from grpo.rewards.registry import one_by_one\n"
        "@one_by_one(5.0)\n"
        "def each(completions, **columns):\n"
        "    return [c[0]['content'].count('b') / 4 for c in completions]\n"
    )
    settings = {"objective.beta": 0.1, "steps": 3}
    settings["rewards"] = json.dumps({f"{tmp_path}/each.py:each": 1.0, f"{tmp_path}/count_a.py:count_a": 1.0})
    early = run(tmp_path, "early", **settings)
    monkeypatch.setattr(grpo.experience, "packed_before_rewards", lambda config: False)
    monkeypatch.setattr("grpo.rewards.workers.RewardWorkerPool.offer", lambda self, group: None)
    plain = run(tmp_path, "plain", **settings)
    assert same(early, plain)
    first, second = weights(tmp_path / "early"), weights(tmp_path / "plain")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_is_not_known_before_the_rewards_waits_for_them(tmp_path: Path) -> None:
    known = grpo.experience.packed_before_rewards
    assert known(load_config(arguments(tmp_path, "run")))
    for key, value in [
        ("objective.subset", "max_variance"),
        ("objective.loss_type", "gfpo"),
        ("sampling.dynamic_sampling", "true"),
        ("objective.beta", "0"),
        ("objective.kl_in_reward", "true"),
    ]:
        assert not known(load_config(arguments(tmp_path, "run", **{key: value})))


def test_dynamic_sampling_cannot_be_done_ahead(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_staleness is 1, but with sampling.dynamic_sampling"):
        load_config(arguments(tmp_path, "run", **AHEAD | {"sampling.dynamic_sampling": True}))


def test_stale_completions_are_corrected_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    def correction(**changes: object) -> str:
        return correction_of(load_config(arguments(tmp_path, "run", **changes)).rollout)

    assert correction() == "none"
    assert correction(**AHEAD) == "truncate"
    assert correction(**AHEAD | {"rollout.correction": "none"}) == "none"


class FakeEngine:
    """An engine whose completions depend on the prompt only."""

    def __init__(self, generate: Callable[[list[Prompt]], list[Group]]) -> None:
        self._generate = generate

    def generate(self, prompts: list[Prompt], plan: SamplingPlan, finished: object = None) -> list[Group]:
        return self._generate(prompts)

    def update_weights(self, step: int) -> None:
        pass


def sampler_of(generate: Callable[[list[Prompt]], list[Group]], left: int, rank: int = 0, world: int = 1) -> Any:
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), autocast=contextlib.nullcontext, process_index=rank, num_processes=world
    )
    return AsyncSampler(FakeEngine(generate), SamplingPlan(2, 8, 1.0, 0), accelerator, staleness=1, steps_left=left)


def test_what_was_sampled_ahead_is_shared_out_over_any_number_of_ranks() -> None:
    def made(prompts: list[Prompt]) -> list[Group]:
        return [Group(p, [Completion([p.draw], [-0.1], True, "x")] * 2) for p in prompts]

    prompts = [Prompt(draw, "text", (1, 2), {"answer": "4"}) for draw in range(8)]
    one = sampler_of(made, left=5)
    shares = iter([prompts[:4], prompts[4:]])
    assert one.next_batch(lambda: next(shares), version=7).groups == made(prompts[:4])
    rows = json.loads(json.dumps(one.state_dict()))
    for rank in range(3):
        again = sampler_of(made, left=4, rank=rank, world=3)
        again.load_state_dict(rows)
        batch = again.next_batch(lambda: prompts[:1], version=8)
        assert (batch.groups, batch.version) == (made(prompts[4:])[rank::3], 7)
        again.close()
    one.close()


def test_an_error_while_sampling_ahead_reaches_the_step_that_needs_it() -> None:
    def broken(prompts: list[Prompt]) -> list[Group]:
        if prompts[0].draw:
            raise ValueError("no more")
        return []

    draws = iter(range(9))
    sampler = sampler_of(broken, left=5)
    sampler.next_batch(lambda: [Prompt(next(draws), "", ())], 0)
    sampler.wait()
    with pytest.raises(ValueError, match="no more"):
        sampler.next_batch(lambda: [Prompt(next(draws), "", ())], 1)
    sampler.close()


def test_a_checkpoint_from_before_progress_was_saved_resumes_the_same(tmp_path: Path) -> None:
    still = {"eval_every": 0}
    whole = run(tmp_path, "whole", **still)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for later in (2, 3, 4):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{later}")
    shutil.rmtree(tmp_path / "part" / "final")
    tensors, state = load_checkpoint(tmp_path / "part" / "checkpoints" / "step-1")
    del state["progress"], state["sampled_ahead"]
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-1")
    save_checkpoint(tmp_path / "part", 1, tensors, state, 10)
    assert same(run(tmp_path, "part", resume="auto", **still), whole)

"""Search for completions that earn rewards without being right, before any weight loads: `grpo check --red_team`.

Round one scores every attack of `red_team_attacks` on rows of the data, beside right answers. Round two repeats and
joins the attacks that earned most.
"""

import itertools
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.data.rows import Example
from grpo.rewards.scoring import RewardSum
from grpo.tools.check_result import Attempt, RedTeam
from grpo.tools.check_rewards import FORMS, Probe, make_probes, probe_group, score_in_process, solution_of
from grpo.tools.red_team_attacks import RIGHT_WORK, Task, Written, right_texts, wrong_texts
from grpo.types import Group

ROWS = 6
"""Rows on which each text is tried."""
JOINED = 4
"""Attacks that round two repeats and joins."""
DEADLINE = 60.0
"""Seconds for one reward in one round."""
NEARLY = 0.9
"""An attack succeeds if it earns this share of what a right answer earns more than an empty one."""
FEW_VALUES = 6
"""A reward with more different values grades its answers: it must not pay a wrong one as much as a right one, but may
pay it nearly as much."""
PLAIN = "another row's answer"
EMPTY = "nothing"
AS_IT_SHOULD_BE = "as it should be"


def search(score: RewardSum, rows: list[Example], tokenizer: PreTrainedTokenizerBase, form: str) -> RedTeam:
    """Attack the rewards of a config.

    Args:
        score: The rewards and weights.
        rows: Rows of the data.
        tokenizer: For the lengths that rewards may read.
        form: Name in `check_rewards.FORMS`: how right answers are written. "": no row has a gold answer.
    """
    probes = make_probes(rows)[:ROWS] or [Probe(row, "", "") for row in rows[:ROWS]]
    tasks = [_task(probe) for probe in probes]
    write = _writer(form)
    texts: dict[str, list[str | None]] = {}
    for index, task in enumerate(tasks):
        for name, text in wrong_texts(task, write).items():
            texts.setdefault(name, [None] * len(tasks))[index] = text
    found = RedTeam(rows=len(probes))
    right: dict[str, list[str | None]] = {}
    if form:
        for task, probe in zip(tasks, probes, strict=True):
            variants = right_texts(task, write)
            if form == "the whole answer column":
                variants = {AS_IT_SHOULD_BE: solution_of(probe.row)}
            for name, text in variants.items():
                right.setdefault(name, []).append(text)
    scorer = _Scorer(score, probes, tokenizer, found)
    paid = {attempt.name: attempt for attempt in scorer.attempts(right)}
    found.attempts = scorer.attempts(texts)
    found.attempts += scorer.attempts(_joined(found.attempts, texts))
    found.attempts.sort(key=lambda attempt: -attempt.total)
    if form and scorer.broken is None:
        found.right = paid[AS_IT_SHOULD_BE]
        _judge(found, scorer, paid)
    elif scorer.broken is not None:
        found.warnings.append(f"the red team stopped: {scorer.broken}")
    return found


def _task(probe: Probe) -> Task:
    def work(solution: str) -> str:
        before, mark, after = solution.rpartition("####")
        return (before if mark else after).strip()

    turns: Any = probe.row.messages
    question = str(probe.row.columns.get("question") or turns[-1]["content"])
    own = work(solution_of(probe.row)) if probe.row.columns.get("solution") else ""
    example = next((str(turn["content"]) for turn in reversed(turns) if turn["role"] == "assistant"), "")
    return Task(question, probe.gold, probe.wrong, own, work(probe.wrong_solution), example)


def _writer(form: str) -> Written:
    """Return how a completion is written in a form of FORMS."""

    def write(work: str, answer: str) -> str:
        if form in ("", "the whole answer column"):
            return f"{work}\n{answer}" if work not in ("", "...") else answer
        line = work.partition("\n")[0]
        return FORMS[form].format(work=work, line=line, answer=answer, solution=f"{work}\n#### {answer}")

    return write


class _Scorer:
    """Scores texts with every reward of a sum."""

    def __init__(self, score: RewardSum, probes: list[Probe], tokenizer: PreTrainedTokenizerBase, found: RedTeam):
        self.score, self.probes, self.tokenizer, self.found = score, probes, tokenizer, found
        self.values: dict[str, set[float]] = {name: set() for name in score.functions}
        self.broken: str | None = None

    def attempts(self, texts: dict[str, list[str | None]]) -> list[Attempt]:
        """Return what each text earns. None in a list: the text does not exist for this row."""
        groups: dict[str, list[Group]] = {
            name: [
                probe_group(probe.row, text, self.tokenizer)
                for probe, text in zip(self.probes, of_rows, strict=True)
                if text is not None
            ]
            for name, of_rows in texts.items()
        }
        self.found.tried += sum(map(len, groups.values()))
        means: dict[str, dict[str, float]] = {name: {} for name in groups}
        for reward in self.score.functions:
            scored = score_in_process(reward, self.score, groups, DEADLINE)
            if scored.problem is not None:
                self.broken = self.broken or f"reward '{reward}' is {scored.problem}"
            for name, values in scored.scores.items():
                known = [value for value in values if value is not None]
                self.values[reward] |= set(known)
                if known:
                    means[name][reward] = sum(known) / len(known)
        made = []
        for name, scores in means.items():
            total = sum(weight * scores.get(reward, 0.0) for reward, weight in self.score.weights.items())
            made.append(Attempt(name, next(text for text in texts[name] if text is not None), scores, total))
        return made


def _joined(attempts: list[Attempt], texts: dict[str, list[str | None]]) -> dict[str, list[str | None]]:
    """Return the attacks that earned most, repeated, and joined in pairs."""
    best = sorted(attempts, key=lambda attempt: -attempt.total)[:JOINED]
    made: dict[str, list[str | None]] = {}
    for attempt in best:
        for times in (3, 30):
            repeated = [text and (text + "\n") * times for text in texts[attempt.name]]
            made[f"{attempt.name}, {times} times"] = repeated
    for first, second in itertools.permutations(best, 2):
        pairs = zip(texts[first.name], texts[second.name], strict=True)
        joined = [f"{a}\n{b}" if a is not None and b is not None else None for a, b in pairs]
        if any(text is not None for text in joined):
            made[f"{first.name} + {second.name}"] = joined
    return made


def _judge(found: RedTeam, scorer: _Scorer, paid: dict[str, Attempt]) -> None:
    """Write the problems and warnings."""
    right = paid[AS_IT_SHOULD_BE]
    by_name = {attempt.name: attempt for attempt in found.attempts}
    floor = min(by_name[name].total for name in (EMPTY, PLAIN) if name in by_name)
    best = found.attempts[0]
    if right.total <= floor:
        found.problems.append(
            f"a right answer earns {right.total:.3f} in all, another row's answer or none {floor:.3f}: the rewards pay "
            f"no form of a right answer that was tried"
        )
    elif best.total >= floor + NEARLY * (right.total - floor):
        found.problems.append(
            f"'{best.name}' earns {best.total:.3f} in all, a right answer {right.total:.3f}: {_excerpt(best.text)}"
        )
    for reward, values in scorer.values.items():
        _judge_reward(found, reward, right, by_name, is_graded=len(values) > FEW_VALUES)
        own = right.scores.get(reward, 0.0)
        if own > by_name[PLAIN].scores.get(reward, 0.0):
            for name, attempt in paid.items():
                if attempt.scores.get(reward, 0.0) < 0.5 * own:
                    found.warnings.append(
                        f"reward '{reward}' pays a right answer {name} only {attempt.scores.get(reward, 0.0):.3f} "
                        f"instead of {own:.3f}"
                    )


def _judge_reward(found: RedTeam, reward: str, right: Attempt, by_name: dict[str, Attempt], *, is_graded: bool) -> None:
    def earns(name: str) -> float:
        return by_name[name].scores.get(reward, float("-inf")) if name in by_name else float("-inf")

    own = right.scores.get(reward)
    if own is None:
        return
    # A reward of the work alone pays right work before any answer: that is its purpose.
    candidates = [a for a in found.attempts if RIGHT_WORK not in a.name or own > earns(RIGHT_WORK)]
    best = max(candidates, key=lambda attempt: attempt.scores.get(reward, float("-inf")))
    most = best.scores.get(reward, float("-inf"))
    if own > earns(PLAIN):  # the reward tells right from wrong
        floor = min(own - 1e-9, max(earns(PLAIN), earns(EMPTY)))
        succeeds = most >= floor + (1.0 if is_graded else NEARLY) * (own - floor)
    else:
        succeeds = most > own + 0.1 * abs(own) + 1e-9
    if succeeds:
        found.warnings.append(
            f"reward '{reward}' pays '{best.name}' {most:.3f}, a right answer {own:.3f}: {_excerpt(best.text)}"
        )


def _excerpt(text: str) -> str:
    shown = text if len(text) <= 120 else text[:80] + " [...] " + text[-30:]
    return repr(shown)

"""Diagnostics: each step's metrics and completions -> why this run does not learn, in one line with the mend, once.

    step 1 ... 20   reward/soft_format/mean 0.0, std 0.0   ->   nothing
    step 20                                                ->   "reward 'soft_format' has been 0 for all 640 completions of ..."
    step 21 ...                                            ->   nothing: it was said

Numbers in, sentences out: no config, no model, no file.
"""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Metrics = dict[str, float]
Rows = list[dict[str, Any]]

KL_RUNAWAY = 1.0
"""Nats per token. A useful run stays well below; here the model writes what the reference would never write."""
ENTROPY_RISE = 1.0
"""Nats per token more than at the start, and at least twice as much."""
ENTROPY_FALL = 0.02
"""Of what it was at the start: the completions of a prompt are all but the same."""
MIN_STEPS = 3
"""Steps after which what can only be a mistake is said."""


@dataclass(frozen=True)
class Finding:
    """One line for a person. `name` tells findings apart, so that each is said once."""

    name: str
    text: str
    mend: str

    def __str__(self) -> str:
        return f"{self.text}: {self.mend}"


@dataclass
class Diagnostics:
    """Looks at a run as it goes. `patience`: steps before a number that does not move is called stuck."""

    patience: int = 20
    max_completion_length: int | None = None
    learning_rate: float | None = None
    """The config's."""
    tolerance: float = 1e-3
    """Largest mean difference between sampling and training logprobs that rounding explains."""
    has_answer: Callable[[str], bool] | None = None
    """Whether an answer can be found in a completion; None where no reward reads one."""
    said: set[str] = field(default_factory=set)
    """Names of findings that were made before (a resumed run does not repeat them)."""

    def __post_init__(self) -> None:
        # Entropy is judged over more steps than a short run's patience.
        self._metrics: deque[tuple[int, Metrics]] = deque(maxlen=max(self.patience, 2 * MIN_STEPS))
        self._start: dict[str, list[float]] = {}
        self._completions: deque[int] = deque(maxlen=self.patience)
        self._scores: deque[dict[str, set[float]]] = deque(maxlen=self.patience)
        self._ended = 0
        self._answers = 0
        self._seen = 0

    def observe(self, step: int, metrics: Metrics, rows: Rows) -> list[Finding]:
        """What this step brings to light. `rows` are its completions ("completion", "ended", "rewards"), over all ranks."""
        if not rows:
            return []  # an evaluation before the first step
        self._metrics.append((step, metrics))
        self._completions.append(len(rows))
        self._scores.append({name: {row["rewards"][name] for row in rows} for name in rows[0]["rewards"]})
        self._seen += len(rows)
        self._ended += sum(bool(row["ended"]) for row in rows)
        if self.has_answer is not None:
            self._answers += sum(self.has_answer(row["completion"]) for row in rows)
        for key in ("policy/entropy", "reward/mean"):
            self._start.setdefault(key, [])
            if key in metrics and len(self._start[key]) < MIN_STEPS:
                self._start[key].append(metrics[key])
        found = [
            *self._rewards(),
            *self._lengths(),
            *self._groups(),
            *self._policy(),
        ]
        fresh = [finding for finding in found if finding.name not in self.said]
        self.said |= {finding.name for finding in fresh}
        return fresh

    def _rewards(self) -> list[Finding]:
        """A reward that never fires, never varies, or never applies."""
        if len(self._scores) < self.patience:
            return []
        found = []
        for name in self._scores[-1]:
            known = [value for step in self._scores for value in step.get(name, ()) if value == value]
            where = f"for all {sum(self._completions)} completions of {self._steps(self.patience)}"
            if not known:
                found.append(
                    Finding(
                        f"silent:{name}",
                        f"reward '{name}' applied to none of the completions of {self._steps(self.patience)}",
                        "it returned None, or failed, each time: look into faults/ in the run directory, and at the column "
                        "that it reads",
                    )
                )
            elif min(known) == max(known) == 0:
                found.append(
                    Finding(f"dead:{name}", f"reward '{name}' has been 0 {where}; it teaches nothing", _dead_mend(name))
                )
            elif min(known) == max(known):
                found.append(
                    Finding(
                        f"constant:{name}",
                        f"reward '{name}' has been {known[0]:g} {where}; it teaches nothing",
                        "fine if it rewards a form that the model has learned already; otherwise it does not look at the "
                        "completion: `python launch/check.py` shows what it gives to right and wrong answers",
                    )
                )
        return found

    def _lengths(self) -> list[Finding]:
        """Completions that are cut off; a model that cannot stop; answers that cannot be found."""
        found = []
        limit = self.max_completion_length
        if self._all("rollout/truncated_fraction", MIN_STEPS, lambda value: value == 1):
            count = sum(list(self._completions)[-MIN_STEPS:])
            found.append(
                Finding(
                    "truncated",
                    f"{count} of {count} completions of {self._steps(MIN_STEPS)} hit sampling.max_completion_length {limit} "
                    f"without an end",
                    "raise it, or ask for shorter answers; what was cut off can hardly earn a reward",
                )
            )
        if len(self._metrics) < self.patience:
            return found
        if not self._ended:
            found.append(
                Finding(
                    "no_end_token",
                    f"the end token was never sampled, in {self._seen} completions",
                    "does the model know when to stop? A base model, or a tokenizer whose eos_token is not the one that "
                    "ends the chat template's turns, never does: use the instruct model, or set its eos_token",
                )
            )
        if self.has_answer is not None and not self._answers:
            found.append(
                Finding(
                    "no_answer_found",
                    f"none of {self._seen} completions holds an answer that the rewards can find",
                    "they look for <answer>...</answer>: set data.system_prompt xml (and data.one_shot true for a small "
                    "model), raise sampling.max_completion_length if they are cut off, or use a reward that reads your form",
                )
            )
        return found

    def _groups(self) -> list[Finding]:
        if not self._all("reward/zero_std_fraction", self.patience, lambda value: value == 1):
            return []
        return [
            Finding(
                "flat",
                f"every group of {self._steps(self.patience)} was flat: all completions of a prompt earned the same, so "
                f"nothing was learned",
                "the task is too hard (all 0), too easy (all right), or sampling too narrow: take easier or harder prompts "
                "(curriculum.reward), a reward with more steps, more num_generations, or a temperature of 1",
            )
        ]

    def _policy(self) -> list[Finding]:
        """The learning rate, the KL, the entropy, and whether sampler and trainer are the same policy."""
        found = []
        if self.learning_rate == 0:
            found.append(
                Finding("learning_rate", "optimizer.learning_rate is 0: no weight will ever change", "set it above 0")
            )
        elif self._all("policy/learning_rate", MIN_STEPS, lambda value: value == 0):
            found.append(
                Finding(
                    "learning_rate",
                    f"the learning rate has been 0 in {self._steps(MIN_STEPS)}",
                    "a schedule that is over, or a warm-up that does not begin: look at steps, optimizer.warmup_ratio and "
                    "optimizer.lr_scheduler_type",
                )
            )
        if self._all("policy/sampling_logprob_difference", MIN_STEPS, lambda value: value > self.tolerance):
            value = self._last("policy/sampling_logprob_difference", 1)[0]
            found.append(
                Finding(
                    "sampler",
                    f"sampler and trainer disagree by {value:.2g} nats per token on average in {self._steps(MIN_STEPS)} (rounding "
                    f"explains {self.tolerance:g})",
                    "they are not the same policy: set rollout.engine native, rollout.correction truncate, or the same "
                    "precision for both",
                )
            )
        if self._all("policy/kl", MIN_STEPS, lambda value: value > KL_RUNAWAY):
            found.append(
                Finding(
                    "kl",
                    f"the KL to the reference is running away: {self._last('policy/kl', 1)[0]:.2g} nats per token",
                    "lower optimizer.learning_rate, raise objective.beta, or set objective.kl_target",
                )
            )
        return found + self._entropy()

    def _entropy(self) -> list[Finding]:
        start, last = self._start["policy/entropy"], self._last("policy/entropy", MIN_STEPS)
        if len(self._metrics) < 2 * MIN_STEPS or len(start) < MIN_STEPS or len(last) < MIN_STEPS:
            return []
        before, now = statistics.fmean(start), statistics.fmean(last)
        if now > 2 * before and now > before + ENTROPY_RISE:
            return [
                Finding(
                    "entropy_rise",
                    f"the entropy is running away: {before:.2g} -> {now:.2g} nats per token; the model comes to write at "
                    f"random",
                    "lower optimizer.learning_rate, objective.entropy_coef, or raise objective.beta",
                )
            ]
        rewards = self._start["reward/mean"], self._last("reward/mean", MIN_STEPS)
        better = all(rewards) and statistics.fmean(rewards[1]) > statistics.fmean(rewards[0])
        if now < ENTROPY_FALL * before and not better:  # a model that has learned its task may well be certain
            return [
                Finding(
                    "entropy_fall",
                    f"the entropy has collapsed: {before:.2g} -> {now:.2g} nats per token, and the reward is no better",
                    "the completions of a prompt are all but the same: lower optimizer.learning_rate, raise objective.beta, "
                    "objective.epsilon_high (0.28) or objective.entropy_coef",
                )
            ]
        return []

    def _last(self, key: str, count: int) -> list[float]:
        """The newest values of a metric, at most `count`."""
        rows = list(self._metrics)[-count:]
        return [metrics[key] for _, metrics in rows if key in metrics]

    def _all(self, key: str, count: int, holds: Callable[[float], bool]) -> bool:
        values = self._last(key, count)
        return len(values) == count and all(holds(value) for value in values)

    def _steps(self, count: int) -> str:
        steps = [step for step, _ in list(self._metrics)[-count:]]
        return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def patience_for(steps: int) -> int:
    """20 steps, in a short run a fifth of it, but never fewer than 5."""
    return max(5, min(20, steps // 5))


def _dead_mend(name: str) -> str:
    if name == "soft_format":
        return (
            "its pattern stops at line breaks, so an answer in the usual form, on several lines, never earns it: use "
            "xml_format instead"
        )
    return (
        "it never fires: either no completion deserves it yet (an easier reward beside it helps), or it looks for what "
        "the model never writes: `python launch/check.py` shows what it gives to right and wrong answers"
    )

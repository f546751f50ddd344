"""Diagnostics: metrics and completions of each step -> findings: reasons why a run does not learn, each reported once.

    steps 1 to 19   reward/soft_format/mean 0.0, std 0.0   ->   nothing
    step 20                                                ->   "reward 'soft_format' has been 0 for all 640 ..."
    step 21 ...                                            ->   nothing: it was reported

Pure: no config, no model, no file.
"""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Metrics = dict[str, float]
Rows = list[dict[str, Any]]

MIN_STEPS = 3
"""Steps before a finding that is certainly a mistake is reported."""
KL_RUNAWAY = 1.0
"""KL in nats per token. A useful run stays well below. Above it, the reference would never write such text."""
ENTROPY_RISE = 1.0
"""Increase over the start in nats per token. The entropy must also be more than twice that of the start."""
ENTROPY_FALL = 0.02
"""Share of the entropy at the start. Below it, the completions of a prompt are nearly identical."""
COLLAPSE_TEXTS = 0.75
"""Different texts per different prompt. A policy that answers its prompts writes at least as many texts as prompts."""
COLLAPSE_GROUP = 1.5
"""Different texts of one prompt, on average. At a temperature of 1 a policy that is unsure writes more."""
COLLAPSE_REWARD = 0.75
"""Mean reward, from the worst (0) to the best (1) so far. Above it, few texts may be right (a task with yes or no)."""


@dataclass(frozen=True)
class Finding:
    """One line for the user. `name` tells findings apart, so that each is reported once."""

    name: str
    text: str
    suggestion: str

    def __str__(self) -> str:
        return f"{self.text}: {self.suggestion}"

    def to_row(self) -> dict[str, str]:
        """Return the row of findings.jsonl. Its key "mend" is older than the term `suggestion`."""
        return {"name": self.name, "text": self.text, "mend": self.suggestion}


@dataclass(frozen=True)
class _Step:
    """Data that is kept of one step."""

    number: int
    metrics: Metrics
    completions: int
    rewards: dict[str, set[float]]
    """Different values of each reward."""
    texts: set[tuple[str, str]]
    """Different (prompt, completion)."""


@dataclass
class Diagnostics:
    """Observes a run step by step."""

    patience: int = 20
    """Steps before a number that does not move is reported."""
    max_completion_length: int | None = None
    learning_rate: float | None = None
    """The config's."""
    tolerance: float = 1e-3
    """Largest mean difference between sampling and training logprobs that rounding explains."""
    has_answer: Callable[[str], bool] | None = None
    """Returns whether an answer can be found in a completion; None if no reward reads answers."""
    said: set[str] = field(default_factory=set)
    """Names of findings that were reported before. A resumed run does not repeat them."""

    def __post_init__(self) -> None:
        # Entropy is judged over more steps than a short run's patience.
        self._steps: deque[_Step] = deque(maxlen=max(self.patience, 2 * MIN_STEPS))
        self._first_rewards: list[float] = []
        self._first_entropies: list[float] = []
        self._last_entropies: deque[float] = deque(maxlen=MIN_STEPS)
        self._entropies = 0
        self._best, self._worst = -float("inf"), float("inf")
        self._seen = self._ended = self._answers = 0

    def observe(self, step: int, metrics: Metrics, rows: Rows) -> list[Finding]:
        """Return the findings that this step adds.

        Args:
            step: steps that are done.
            metrics: the step's metrics.
            rows: its completions over all ranks, with "completion", "ended" and "rewards", and where known "prompt" and
                "reward".
        """
        if not rows:
            return []  # an evaluation before the first step
        self._add(step, metrics if _is_measured(metrics) else _without_policy(metrics), rows)
        found = [
            *self._rewards(),
            *self._lengths(),
            *self._groups(),
            *self._policy(),
            *self._entropy(),
            *self._collapse(),
        ]
        new = [finding for finding in found if finding.name not in self.said]
        self.said |= {finding.name for finding in new}
        return new

    def _add(self, step: int, metrics: Metrics, rows: Rows) -> None:
        rewards = {name: {row["rewards"][name] for row in rows} for name in rows[0]["rewards"]}
        texts = {(str(row.get("prompt")), row["completion"]) for row in rows}
        self._steps.append(_Step(step, metrics, len(rows), rewards, texts))
        self._seen += len(rows)
        self._ended += sum(bool(row["ended"]) for row in rows)
        if self.has_answer is not None:
            self._answers += sum(self.has_answer(row["completion"]) for row in rows)
        earned = [row["reward"] for row in rows if "reward" in row]
        self._best, self._worst = max([self._best, *earned]), min([self._worst, *earned])
        if "reward/mean" in metrics and len(self._first_rewards) < MIN_STEPS:
            self._first_rewards.append(metrics["reward/mean"])
        if "policy/entropy" in metrics:
            self._entropies += 1
            self._last_entropies.append(metrics["policy/entropy"])
            if len(self._first_entropies) < MIN_STEPS:
                self._first_entropies.append(metrics["policy/entropy"])

    def _rewards(self) -> list[Finding]:
        """Rewards that never fire, never vary, or never apply."""
        if len(self._steps) < self.patience:
            return []
        recent = list(self._steps)[-self.patience :]
        completions = sum(step.completions for step in recent)
        found = []
        for name in recent[-1].rewards:
            known = [value for step in recent for value in step.rewards.get(name, ()) if value == value]
            where = f"for all {completions} completions of {_range(recent)}"
            if not known:
                found.append(
                    Finding(
                        f"silent:{name}",
                        f"reward '{name}' applied to none of the completions of {_range(recent)}",
                        "it returned None, or failed, each time: look into faults/ in the run directory, and at "
                        "the column that it reads",
                    )
                )
            elif min(known) == max(known) == 0:
                text = f"reward '{name}' has been 0 {where}; it teaches nothing"
                found.append(Finding(f"dead:{name}", text, _dead_suggestion(name)))
            elif min(known) == max(known):
                found.append(
                    Finding(
                        f"constant:{name}",
                        f"reward '{name}' has been {known[0]:g} {where}; it teaches nothing",
                        "fine if it rewards a form that the model has learned already; otherwise it does not look "
                        "at the completion: `python launch/check.py` shows what it gives to right and wrong answers",
                    )
                )
        return found

    def _lengths(self) -> list[Finding]:
        """Completions that are cut off, a model that never stops, answers that cannot be found."""
        found = []
        if steps := self._all("rollout/truncated_fraction", MIN_STEPS, lambda value: value == 1):
            count = sum(step.completions for step in steps)
            found.append(
                Finding(
                    "truncated",
                    f"{count} of {count} completions of {_range(steps)} hit sampling.max_completion_length "
                    f"{self.max_completion_length} without an end",
                    "raise it, or ask for shorter answers; a completion that is cut off can hardly earn a reward",
                )
            )
        if len(self._steps) < self.patience:
            return found
        if not self._ended:
            found.append(
                Finding(
                    "no_end_token",
                    f"the end token was never sampled, in {self._seen} completions",
                    "does the model know when to stop? A base model, or a tokenizer whose eos_token is not the one "
                    "that ends the chat template's turns, never does: use the instruct model, or set its eos_token",
                )
            )
        if self.has_answer is not None and not self._answers:
            found.append(
                Finding(
                    "no_answer_found",
                    f"none of {self._seen} completions holds an answer that the rewards can find",
                    "they look for <answer>...</answer>: set data.system_prompt xml (and data.one_shot true for a "
                    "small model), raise sampling.max_completion_length if they are cut off, or use a reward that "
                    "reads your form",
                )
            )
        return found

    def _groups(self) -> list[Finding]:
        """Groups whose completions all get the same reward."""
        steps = self._all("reward/zero_std_fraction", self.patience, lambda value: value == 1)
        if not steps:
            return []
        return [
            Finding(
                "flat",
                f"every group of {_range(steps)} was flat: all completions of a prompt earned the same, so nothing "
                "was learned",
                "the task is too hard (all 0), too easy (all right), or sampling too narrow: take easier or harder "
                "prompts (curriculum.reward), a reward with more steps, more num_generations, or a temperature of 1",
            )
        ]

    def _policy(self) -> list[Finding]:
        """A learning rate of 0, a sampler that differs from the trainer, a KL that is too high."""
        found = []
        if self.learning_rate == 0:
            found.append(
                Finding("learning_rate", "optimizer.learning_rate is 0: no weight will ever change", "set it above 0")
            )
        elif steps := self._all("policy/learning_rate", MIN_STEPS, lambda value: value == 0):
            found.append(
                Finding(
                    "learning_rate",
                    f"the learning rate has been 0 in {_range(steps)}",
                    "a schedule that is over, or a warm-up that does not begin: look at steps, "
                    "optimizer.warmup_ratio and optimizer.lr_scheduler_type",
                )
            )
        key = "policy/sampling_logprob_difference"
        if steps := self._all(key, MIN_STEPS, lambda value: value > self.tolerance):
            found.append(
                Finding(
                    "sampler",
                    f"sampler and trainer disagree by {steps[-1].metrics[key]:.2g} nats per token on average in "
                    f"{_range(steps)} (rounding explains {self.tolerance:g})",
                    "they are not the same policy: set rollout.engine native, rollout.correction truncate, or the same "
                    "precision for both",
                )
            )
        if steps := self._all("policy/kl", MIN_STEPS, lambda value: value > KL_RUNAWAY):
            found.append(
                Finding(
                    "kl",
                    f"the KL to the reference is running away: {steps[-1].metrics['policy/kl']:.2g} nats per token",
                    "lower optimizer.learning_rate, raise objective.beta, or set objective.kl_target",
                )
            )
        return found

    def _entropy(self) -> list[Finding]:
        """An entropy far above or below that of the first steps."""
        if self._entropies < 2 * MIN_STEPS:
            return []
        before, now = statistics.fmean(self._first_entropies), statistics.fmean(self._last_entropies)
        if now > 2 * before and now > before + ENTROPY_RISE:
            return [
                Finding(
                    "entropy_rise",
                    f"the entropy is running away: {before:.2g} -> {now:.2g} nats per token; the model comes to "
                    "write at random",
                    "lower optimizer.learning_rate, objective.entropy_coef, or raise objective.beta",
                )
            ]
        rewards = [step.metrics["reward/mean"] for step in self._last(MIN_STEPS) if "reward/mean" in step.metrics]
        is_better = bool(self._first_rewards and rewards) and statistics.fmean(rewards) > statistics.fmean(
            self._first_rewards
        )
        if now < ENTROPY_FALL * before and not is_better:  # a model that has learned its task may well be certain
            return [
                Finding(
                    "entropy_fall",
                    f"the entropy has collapsed: {before:.2g} -> {now:.2g} nats per token, and the reward is no better",
                    "the completions of a prompt are all but the same: lower optimizer.learning_rate, raise "
                    "objective.beta, objective.epsilon_high (0.28) or objective.entropy_coef",
                )
            ]
        return []

    def _collapse(self) -> list[Finding]:
        """A policy that gives the same few texts to different prompts, though better rewards were found.

        It is judged by the completions, because the entropy is not measured if all groups are flat.
        """
        steps = self._last(2 * MIN_STEPS)
        if len(steps) < 2 * MIN_STEPS or not self._worst < self._best:
            return []
        answers = set().union(*(step.texts for step in steps))
        prompts, texts = (len(set(part)) for part in zip(*answers, strict=True))
        reward = statistics.fmean(step.metrics.get("reward/mean", self._best) for step in steps)
        is_good = (reward - self._worst) / (self._best - self._worst) >= COLLAPSE_REWARD
        if texts > COLLAPSE_TEXTS * prompts or len(answers) > COLLAPSE_GROUP * prompts or is_good:
            return []
        return [
            Finding(
                "collapse",
                f"the policy has collapsed: all {sum(step.completions for step in steps)} completions of {prompts} "
                f"prompts in {_range(steps)} are one of {texts} texts, and earn {reward:.2g} on average; the best "
                f"earned {self._best:.2g}",
                "it writes what earns something for any prompt: go back to an earlier checkpoint, lower "
                "optimizer.learning_rate, raise objective.beta or objective.entropy_coef, or lower the weight of a "
                "reward for the form",
            )
        ]

    def _last(self, count: int) -> list[_Step]:
        return list(self._steps)[-count:]

    def _all(self, key: str, count: int, holds: Callable[[float], bool]) -> list[_Step]:
        """Return the last `count` steps that measured `key`, if it holds in all of them, otherwise []."""
        steps = [step for step in self._steps if key in step.metrics][-count:]
        return steps if len(steps) == count and all(holds(step.metrics[key]) for step in steps) else []


def patience_for(steps: int) -> int:
    """Return the patience for a run of `steps` steps: 20, in a short run a fifth of it, but never fewer than 5."""
    return max(5, min(20, steps // 5))


def _is_measured(metrics: Metrics) -> bool:
    """Return False for a step without KL whose groups are all flat: no completion went through the model, so its
    entropy, KL and logprob difference of 0 mean nothing.
    """
    return not (metrics.get("reward/zero_std_fraction") == 1 and metrics.get("policy/entropy") == 0)


def _without_policy(metrics: Metrics) -> Metrics:
    return {
        key: value for key, value in metrics.items() if not key.startswith("policy/") or key == "policy/learning_rate"
    }


def _range(steps: list[_Step]) -> str:
    return f"step {steps[0].number}" if len(steps) == 1 else f"steps {steps[0].number} to {steps[-1].number}"


def _dead_suggestion(name: str) -> str:
    if name == "soft_format":
        return (
            "its pattern stops at line breaks, so an answer in the usual form, on several lines, never earns it: use "
            "xml_format instead"
        )
    return (
        "it never fires: either no completion deserves it yet (an easier reward beside it helps), or it looks for what "
        "the model never writes: `python launch/check.py` shows what it gives to right and wrong answers"
    )

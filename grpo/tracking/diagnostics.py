"""Diagnostics: metrics and completions of each step -> findings: reasons why a run does not learn, each reported once.

    steps 1 to 19   reward/soft_format/mean 0.0, std 0.0   ->   nothing
    step 20                                                ->   "reward 'soft_format' has been 0 for all 640 ..."
    step 21 ...                                            ->   nothing: it was reported

Pure: no config, no model, no file.
"""

import math
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from grpo.tracking.exploits import ExploitWatch
from grpo.tracking.findings import Finding

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
COLLAPSE_SHARED = 0.9
"""Share of completions whose text other prompts got too. At the start it must have been at most half."""
GOOD_REWARD = 0.75
"""Mean reward, from the worst (0) to the best (1) so far. Above it, few texts may be right (a task with yes or no), and
flat groups are solved ones."""
WINDOW = 10
"""Steps over which flat groups, and a reward that does not move, are counted."""
MOSTLY_FLAT = 2 / 3
"""Share of flat groups over the window. So many prompts were sampled in vain."""
FULL, MISSED, MOVED = 0.95, 0.5, 0.03
"""Shares of the best value of a reward so far: its mean is full, is low, has risen between the halves of the window."""


@dataclass(frozen=True)
class _Step:
    """Data that is kept of one step."""

    number: int
    metrics: Metrics
    completions: int
    rewards: dict[str, set[float]]
    """Different values of each reward."""
    means: dict[str, float]
    """Mean of each reward that applied."""
    earned: set[float]
    """Different sums of rewards, where they are known."""
    texts: Counter[tuple[str, str]]
    """Number of each (prompt, completion)."""


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
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each reward, by its name in the rows."""
    said: set[str] = field(default_factory=set)
    """Names of findings that were reported before. A resumed run does not repeat them."""

    def __post_init__(self) -> None:
        # Entropy and flat groups are judged over more steps than a short run's patience.
        self._exploits = ExploitWatch(self.weights)
        self._steps: deque[_Step] = deque(maxlen=max(self.patience, 2 * MIN_STEPS, WINDOW))
        self._first: list[_Step] = []
        self._best_of: dict[str, float] = {}
        self._has_varied: set[str] = set()
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
        if not rows:  # an evaluation before the first step
            return self._exploits.observe(step, metrics, rows)
        self._add(step, metrics if _is_measured(metrics) else _without_policy(metrics), rows)
        found = [
            *self._rewards(),
            *self._lengths(),
            *self._groups(),
            *self._form_only(),
            *self._policy(),
            *self._entropy(),
            *self._collapse(),
            *self._exploits.observe(step, metrics, rows),
        ]
        new = [finding for finding in found if finding.name not in self.said]
        self.said |= {finding.name for finding in new}
        return new

    def _add(self, step: int, metrics: Metrics, rows: Rows) -> None:
        rewards = {name: {row["rewards"][name] for row in rows} for name in rows[0]["rewards"]}
        known = {name: [v for row in rows if (v := row["rewards"][name]) == v] for name in rewards}
        means = {name: statistics.fmean(values) for name, values in known.items() if values}
        earned = [row["reward"] for row in rows if row.get("reward", math.nan) == row.get("reward")]
        texts = Counter((str(row.get("prompt")), row["completion"]) for row in rows)
        self._steps.append(_Step(step, metrics, len(rows), rewards, means, set(earned), texts))
        if len(self._first) < MIN_STEPS:
            self._first.append(self._steps[-1])
        for name, values in known.items():
            best = self._best_of.get(name)
            if len({*values} | ({best} if best is not None else set())) > 1:
                self._has_varied.add(name)
            self._best_of[name] = max([-math.inf if best is None else best, *values])
        self._seen += len(rows)
        self._ended += sum(bool(row["ended"]) for row in rows)
        if self.has_answer is not None:
            self._answers += sum(self.has_answer(row["completion"]) for row in rows)
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
            elif min(known) == max(known) and not (name in self._has_varied and known[0] == self._best_of[name]):
                # A reward that is full because the run has learned to earn it is no fault.
                found.append(
                    Finding(
                        f"constant:{name}",
                        f"reward '{name}' has been {known[0]:g} {where}; it teaches nothing",
                        "fine if it rewards a form that the model knew before; otherwise it does not look "
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
        key = "reward/zero_std_fraction"
        if steps := self._all(key, MIN_STEPS, lambda value: value == 1):
            earned = set().union(*(step.earned for step in steps))
            if earned and max(earned) <= max(0.0, self._worst):
                return [
                    Finding(
                        "flat",
                        f"no completion of {_range(steps)} earned anything, so every group was flat and nothing was "
                        "learned",
                        "add an easier reward beside it (for the form, or for a part of the answer), worked examples "
                        "in the prompt (data.examples, or data.one_shot), or more sampling.num_generations, or take "
                        "easier prompts",
                    )
                ]
            if len(earned) > 1:
                return [
                    Finding(
                        "flat",
                        f"every group of {_range(steps)} was flat: completions of one prompt earned the same, those of "
                        f"different prompts from {min(earned):.3g} to {max(earned):.3g}, so nothing was learned",
                        "sample other prompts in their place (sampling.dynamic_sampling true), set aside solved and "
                        "hopeless ones (curriculum.reward), or raise sampling.num_generations",
                    )
                ]
        if steps := self._all(key, self.patience, lambda value: value == 1):
            return [
                Finding(
                    "flat",
                    f"every group of {_range(steps)} was flat: all completions of a prompt earned the same, so nothing "
                    "was learned",
                    "the task is too hard (all 0), too easy (all right), or sampling too narrow: take easier or harder "
                    "prompts (curriculum.reward), a reward with more steps, more num_generations, or a temperature of "
                    "1",
                )
            ]
        steps = self._all(key, WINDOW, lambda value: True)
        share = statistics.fmean(step.metrics[key] for step in steps) if steps else 0.0
        if not MOSTLY_FLAT <= share < 1 or "flat" in self.said or self._is_good(steps):
            return []
        return [
            Finding(
                "mostly_flat",
                f"{share:.0%} of the groups of {_range(steps)} were flat: all completions of a prompt earned the same, "
                "so these prompts taught nothing",
                "sample other prompts in their place (sampling.dynamic_sampling true), raise sampling.num_generations, "
                "or take easier or harder prompts (curriculum.reward)",
            )
        ]

    def _form_only(self) -> list[Finding]:
        """A reward that the run has learned to earn each time, beside one that stays low."""
        steps = self._last(WINDOW)
        if len(steps) < WINDOW:
            return []

        def means(name: str, of: list[_Step]) -> list[float]:
            best = self._best_of[name]
            return [step.means[name] / best for step in of if name in step.means] if best > 0 else []

        def is_learned(name: str) -> bool:
            now, first = means(name, steps), means(name, self._first)
            return len(now) == WINDOW and min(now) >= FULL and bool(first) and statistics.fmean(first) <= MISSED

        def is_missed(name: str) -> bool:
            now = means(name, steps)
            if len(now) < WINDOW or statistics.fmean(now) > MISSED:
                return False
            return statistics.fmean(now[WINDOW // 2 :]) - statistics.fmean(now[: WINDOW // 2]) < MOVED

        full = [name for name in steps[-1].means if is_learned(name)]
        low = [name for name in steps[-1].means if is_missed(name)]
        if not full or not low:
            return []
        mean = statistics.fmean(step.means[low[0]] for step in steps)
        return [
            Finding(
                "form_only",
                f"reward '{full[0]}' is full since step {steps[0].number}, while '{low[0]}' stays at {mean:.2g} on "
                "average",
                f"look at the completions: the policy may write what earns '{full[0]}' whatever the prompt. Lower the "
                "weight of that reward, lower optimizer.learning_rate, or raise objective.beta",
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
        if len(steps) < 2 * MIN_STEPS or not self._worst < self._best or self._is_good(steps):
            return []
        answers = _all_texts(steps)
        prompts, texts = (len(set(part)) for part in zip(*answers, strict=True))
        shared = _shared(answers)
        are_few = texts <= COLLAPSE_TEXTS * prompts and len(answers) <= COLLAPSE_GROUP * prompts
        are_shared = shared >= COLLAPSE_SHARED and _shared(_all_texts(self._first)) <= 0.5
        if not are_few and not are_shared:
            return []
        count = answers.total()
        reward = statistics.fmean(step.metrics.get("reward/mean", self._best) for step in steps)
        these = f"all {count}" if are_few else f"{shared:.0%} of the {count}"
        texts_are = f"one of {texts} texts" if are_few else f"texts that other prompts got too ({texts} texts in all)"
        return [
            Finding(
                "collapse",
                f"the policy has collapsed: {these} completions of {prompts} prompts in {_range(steps)} are "
                f"{texts_are}, and earn {reward:.2g} on average; the best earned {self._best:.2g}",
                "it writes what earns something for any prompt: go back to an earlier checkpoint, lower "
                "optimizer.learning_rate, raise objective.beta or objective.entropy_coef, or lower the weight of a "
                "reward for the form",
            )
        ]

    def _is_good(self, steps: list[_Step]) -> bool:
        """Is the mean reward of the steps near the best that was earned so far?"""
        if not self._worst < self._best:
            return False
        reward = statistics.fmean(step.metrics.get("reward/mean", self._best) for step in steps)
        return (reward - self._worst) / (self._best - self._worst) >= GOOD_REWARD

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


def _all_texts(steps: list[_Step]) -> Counter[tuple[str, str]]:
    """Return the number of each (prompt, completion) over the steps."""
    return sum((step.texts for step in steps), Counter())


def _shared(texts: Counter[tuple[str, str]]) -> float:
    """Return the share of completions whose text was given to another prompt too."""
    prompts = defaultdict(set)
    for prompt, text in texts:
        prompts[text].add(prompt)
    return sum(count for (_, text), count in texts.items() if len(prompts[text]) > 1) / max(1, texts.total())


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

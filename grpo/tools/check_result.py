"""The result of a check. Its fields are the keys of `grpo check --output CHECK.json`."""

from dataclasses import dataclass, field
from typing import Any

from grpo.tools.forecast_result import Forecast


@dataclass(frozen=True)
class RewardCheck:
    """Scores of one reward on the probes: the mean over rows, for "hostile" the maximum. None: not applicable."""

    weight: float
    scores: dict[str, float | None]
    milliseconds: float
    """Per completion, on gold, wrong and empty answers."""
    problem: str | None = None
    """None if the reward distinguishes at least two kinds of completions."""


@dataclass(frozen=True)
class PromptCheck:
    """One prompt as the model reads it."""

    text: str
    tokens: int
    answer: str | None


@dataclass(frozen=True)
class TurnPart:
    """One part of a conversation with tools or an environment."""

    kind: str
    """prompt, sampled (trained) or given (context only)."""
    text: str
    tokens: int


@dataclass(frozen=True)
class Attempt:
    """Earnings of one text in a search for exploits, as means over the rows it was tried on."""

    name: str
    text: str
    """On the first row."""
    scores: dict[str, float]
    """By reward."""
    total: float
    """The weighted sum."""


@dataclass
class RedTeam:
    """Result of a search for exploits (grpo/tools/red_team.py)."""

    rows: int = 0
    tried: int = 0
    """Completions that were scored."""
    right: Attempt | None = None
    """A right answer. None: no row has a gold answer."""
    attempts: list[Attempt] = field(default_factory=list)
    """All attacks, those that earn most first."""
    problems: list[str] = field(default_factory=list)
    """Wrong answers earn as much as right ones, in the sum of the rewards."""
    warnings: list[str] = field(default_factory=list)
    """The same of single rewards, and right answers that are not paid."""


@dataclass
class Check:
    """All findings. `problems` end a run before its first step is done; `train` goes on with `warnings`."""

    config: dict[str, Any] = field(default_factory=dict)
    """Every key with its value, flat."""
    run_dir: str = ""
    data: str = ""
    """Rows read, used and left out, and the extractor's success rate."""
    rows: int = 0
    held_out: int = 0
    with_answer: int = 0
    rejected: list[dict[str, str]] = field(default_factory=list)
    """Unusable rows under data.bad_rows skip: place and reason."""
    measured: int = 0
    """Rows whose prompts were tokenised for `too_long` and `lengths`."""
    too_long: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    """Prompt tokens: shortest, median, 95 %, max."""
    duplicates: int = 0
    overlap: int = 0
    """Held-out questions that are also training questions."""
    prompts: list[PromptCheck] = field(default_factory=list)
    conversation: list[TurnPart] = field(default_factory=list)
    """With tools or an environment: the first prompt, a turn, and what follows it."""
    batch: str = ""
    steps: int = 0
    form: str = ""
    """Answer format that the rewards score highest; gold and wrong answers are written in it."""
    rewards: dict[str, RewardCheck] = field(default_factory=dict)
    red_team: RedTeam | None = None
    """Only with --red_team."""
    forecast: Forecast | None = None
    """Only with --probe."""
    parameters: int = 0
    memory: dict[str, float] = field(default_factory=dict)
    """GiB on each process, by part; "peak" is the maximum at one time (grpo/tools/memory.py)."""
    least_seconds_per_step: float = 0.0
    matrix_rate: float = 0.0
    """Measured floating-point operations per second of this machine."""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

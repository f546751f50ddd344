"""Curriculum: leave prompts that are too easy or too hard out of the next epochs.

A group whose completions are all right, or all wrong, has no advantage. A prompt that was solved, or hopeless,
`patience` times in a row is set aside, and returns after `return_after` epochs to be measured again.

    3 prompts, patience 1, return_after 2        epoch 0   a b c    a is solved, c is hopeless
                                                 epoch 1   b        (2 draws fewer: no prompt replaces them)
                                                 epoch 2   b a c    back: what was hopeless may be learnable now
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from grpo.data.stream import PromptStream, shuffled
from grpo.errors import ConfigError
from grpo.types import Prompt

Result = tuple[int, float]
"""(draw, mean of the measuring reward over the group)"""


class Curriculum(PromptStream):
    """PromptStream whose epochs depend on measured rewards; its state is in the checkpoint.

    Every rank must see the same results. Steps are taken in order.

    Args:
        solved: Mean reward of a group from which its prompt counts as solved.
        hopeless: Mean reward up to which it counts as hopeless.
        patience: Results in a row until a prompt is set aside.
        return_after: Epochs until it returns.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, *, solved: float, hopeless: float, patience: int, return_after: int
    ):
        super().__init__(prompts, seed)
        if not hopeless < solved:
            raise ConfigError(
                f"curriculum.hopeless is {hopeless}, it must be below curriculum.solved, which is {solved}"
            )
        self.solved, self.hopeless, self.patience, self.return_after = solved, hopeless, patience, return_after
        self.epoch = 0
        self.first_draw = 0
        self.in_a_row: dict[int, int] = {}
        """Prompt -> number of times in a row that it was solved (positive) or hopeless (negative)."""
        self.set_aside: dict[int, int] = {}
        """Prompt -> epoch in which it returns."""
        self._taken: dict[int, int] = {}
        """Draws of all ranks since the last update -> prompts."""
        self._begin([])

    def draws(self, first: int, count: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """Return this rank's share of `count` prompts from draw `first` on."""
        draws = range(first, first + count)
        if first not in self._taken:
            self._taken |= {draw: self._advance(draw) for draw in draws}
        return [replace(self.prompts[self._taken[draw]], draw=draw) for draw in draws[rank::world_size]]

    def _advance(self, draw: int) -> int:
        """Return the prompt of a draw. Begins the next epoch where this one is over."""
        assert draw >= self.first_draw, "steps are taken in order"
        while draw >= self.first_draw + len(self._active):
            self.first_draw += len(self._active)
            self.epoch += 1
            self._begin([prompt for prompt, back in self.set_aside.items() if back > self.epoch])
        return self._active[draw - self.first_draw]

    def update(self, results: list[Result]) -> None:
        """Take the results of one step's groups, from all ranks, in any order."""
        for draw, value in sorted(results):
            prompt = self._taken[draw]
            before = self.in_a_row.pop(prompt, 0)
            if value >= self.solved:
                now = max(before, 0) + 1
            elif value <= self.hopeless:
                now = min(before, 0) - 1
            else:
                self.set_aside.pop(prompt, None)
                continue
            self.in_a_row[prompt] = now
            if abs(now) >= self.patience:
                self.set_aside[prompt] = self.epoch + self.return_after
        self._taken = {}

    def metrics(self) -> dict[str, float]:
        """Return the numbers of prompts that are set aside, by reason, and of those that this epoch draws."""
        away = [self.in_a_row[prompt] for prompt, back in self.set_aside.items() if back > self.epoch]
        return {
            "curriculum/solved": float(sum(count > 0 for count in away)),
            "curriculum/hopeless": float(sum(count < 0 for count in away)),
            "curriculum/active": float(len(self._active)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, its order, and the results that later epochs depend on."""
        return {
            "epoch": self.epoch,
            "first_draw": self.first_draw,
            "in_a_row": sorted(self.in_a_row.items()),
            "set_aside": sorted(self.set_aside.items()),
            "left_out": self._left_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.epoch, self.first_draw = state["epoch"], state["first_draw"]
        self.in_a_row = {prompt: count for prompt, count in state["in_a_row"]}
        self.set_aside = {prompt: back for prompt, back in state["set_aside"]}
        self._begin(state["left_out"])

    def _begin(self, left_out: list[int]) -> None:
        """Set the epoch's order. Where all prompts would be left out, none is."""
        out = set(left_out)
        if len(out) == len(self.prompts):
            out = set()
        self._left_out = sorted(out)
        self._active = [
            index for index in shuffled(len(self.prompts), self.seed, self.epoch).tolist() if index not in out
        ]

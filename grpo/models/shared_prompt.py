"""Shared prompts: hidden states for the completions of split groups, with each group's prompt trained only once.

With gradients, the batches of a group are computed in order. Before the first one, the prompt goes through the model
alone, without a graph. The values that its completions need are kept: each layer's keys and values, and the hidden
state of its last token, which predicts every first token.

    all but the last   have only completions in their row. They read copies of the kept values. Their backward passes
                       accumulate the gradients of these copies
    the last           has the prompt in its row. The accumulated gradients are added to those of the prompt

By the chain rule the sum equals the gradient of computing the prompt in every batch, up to rounding. It costs one pass
with a graph and one without. Without gradients, batches are computed in reverse order: the row of the last one
provides the values that the others need.

    # the example of packing.py split into two batches        with gradients: 1st     2nd
    # input_ids_T as stored, complete by itself                       5  6  7  8        5  6  9
    # row that goes through the model                                 7  8              5  6  9
    # positions in it                                                 2  3              0  1  2
    # predicted from                                                  (6)  7            6
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from grpo.kernels.attention import GroupSpan, PackedLayout, Prompt, SplitGroup, joined
from grpo.kernels.transfer import to_device
from grpo.packing import PackedBatch

HiddenStates = Callable[[Tensor, Tensor, PackedLayout], Tensor]
"""Token ids [T], positions [T] and their layout -> last hidden states [T, H]."""


class SharedPrompts:
    """Prompts of the split groups whose batches are being computed."""

    def __init__(self) -> None:
        # Separate for passes with and without gradients: the reference of a LoRA policy has other weights.
        self._open: dict[tuple[SplitGroup, bool], KeptPrompt] = {}

    def forget(self) -> None:
        """Drop the prompts of groups that were not completed. Required after the weights have changed."""
        self._open.clear()

    def hidden(self, hidden_states: HiddenStates, batch: PackedBatch, counts_T: Tensor | None = None) -> Tensor:
        """Return the hidden states [N, H] that predict the completion tokens of `batch`.

        Args:
            hidden_states: computes the last hidden states of one packed row.
            batch: a packed batch with parts of split groups.
            counts_T: how often each token of `batch` counts in the load of experts.
        """
        learning, layout = torch.is_grad_enabled(), batch.layout
        here_T = torch.ones(len(batch.input_ids_T), dtype=torch.bool)
        prompts = {
            index: self._prompt(hidden_states, batch, span) for index, span in enumerate(batch.spans) if span.split
        }
        for index, prompt in prompts.items():
            span = batch.spans[index]
            if span.last if learning else not prompt.keys_values:
                layout.watched[index] = prompt.rejoin() if learning else prompt.keep
            else:
                layout.elsewhere[index] = iter(prompt.keys_values)
                here_T[span.start : span.start + span.prompt_length] = False
        row = to_device(here_T.nonzero().squeeze(1), batch.input_ids_T.device)
        layout.counts_T = None if counts_T is None else counts_T[row]
        hidden_TH = hidden_states(batch.input_ids_T[row], batch.positions_T[row], layout)
        # Appended to the row: last tokens of split prompts, kept or joined with the gradients of the other parts.
        place_T, last_tokens = here_T.cumsum(0) - 1, []
        for index, prompt in prompts.items():
            last = batch.spans[index].start + batch.spans[index].prompt_length - 1
            if index in layout.watched:
                own = hidden_TH[int(place_T[last])][None]
                last_tokens.append(joined(own, prompt.last_hidden) if learning else own)
                prompt.last_hidden = prompt.last_hidden if learning else own.clone()
            else:
                last_tokens.append(prompt.last_hidden)
            place_T[last] = len(row) + len(last_tokens) - 1
        return torch.cat([hidden_TH, *last_tokens]).index_select(0, to_device(place_T, row.device)[batch.predictor_N])

    def _prompt(self, hidden_states: HiddenStates, batch: PackedBatch, span: GroupSpan) -> "KeptPrompt":
        """Return the kept values of the prompt of `span`, and count this part. Empty if its row is still to come."""
        assert span.split is not None
        learning = torch.is_grad_enabled()
        prompt = self._open.pop((span.split, learning), None) or KeptPrompt(span.split.parts)
        if learning and not prompt.keys_values:
            prompt.compute(hidden_states, batch, span)
        prompt.parts_left -= 1
        assert not (learning and span.last and prompt.parts_left), "the last part of a group is learned from last"
        if prompt.parts_left:
            self._open[span.split, learning] = prompt
        return prompt


@dataclass
class KeptPrompt:
    """Keys and values [1, K, P, D] of a prompt, layer by layer, and the hidden state [1, H] of its last token."""

    parts_left: int
    keys_values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    last_hidden: Tensor = field(default_factory=lambda: torch.empty(0))

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Append copies of one layer's keys and values."""
        # Copies: a slice would keep the memory of the whole row alive.
        self.keys_values.append((key.detach().clone(), value.detach().clone()))

    def compute(self, hidden_states: HiddenStates, batch: PackedBatch, span: GroupSpan) -> None:
        """Compute the prompt alone, without a graph. The kept values are leaves that accumulate the gradients of the
        parts.
        """
        ids_P, positions_P = (
            tensor[span.start : span.start + span.prompt_length] for tensor in (batch.input_ids_T, batch.positions_T)
        )
        alone = replace(span, start=0, completion_lengths=())
        layout = PackedLayout([alone], ids_P.device, watched={0: self.keep})
        kind = ids_P.device.type
        # Autocast would cache the weights that it casts here without gradients, and use them for the row as well.
        with torch.no_grad(), torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            self.last_hidden = hidden_states(ids_P, positions_P, layout)[-1:].clone()
        for tensor in (self.last_hidden, *(tensor for pair in self.keys_values for tensor in pair)):
            tensor.requires_grad_()

    def rejoin(self) -> Callable[[Tensor, Tensor], Prompt]:
        """Return a function for `PackedLayout.watched` that returns the kept leaves, layer by layer."""
        kept = iter(self.keys_values)
        return lambda key, value: next(kept)

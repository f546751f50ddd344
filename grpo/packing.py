"""Packing: groups -> batches of tokens laid end to end, each under a token budget. A group's prompt is laid down once.

The one alignment rule: every [N] tensor at index n describes completion token n, and logprobs[n] is
log p(token n | the tokens before it in its own sequence). The shift by one happens here, once, as `predictor_N`.

    # one group: prompt [5 6], completions [7 8] and [9]       T = 5, N = 3, S = 2
    # input_ids_T   5  6  7  8  9
    # positions_T   0  1  2  3  2      a completion's positions go on from its prompt's
    # tokens_N            7  8  9      the tokens in the loss
    # predictor_N         1  2  1      index into T of the token before it: both completions follow the prompt's last
    # sequence_N          0  0  1
    # completion_S        0     1      index into the P * G completions

Given tokens of a completion (tool results) are among the T tokens that others attend to, but not among the N.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.kernels.attention import GroupSpan, PackedLayout, SplitGroup
from grpo.kernels.transfer import to_device
from grpo.types import Group


@dataclass
class PackedBatch:
    """The input of one forward pass. T packed tokens, N sampled tokens, S sequences (completions)."""

    input_ids_T: Tensor
    positions_T: Tensor
    spans: list[GroupSpan]
    predictor_N: Tensor
    tokens_N: Tensor
    sequence_N: Tensor
    """[N] index of the sequence that each completion token belongs to."""
    advantages_N: Tensor
    """[N] float32; the same for all tokens of one completion. Zeros until `with_advantages`."""
    sampling_logprobs_N: Tensor
    """[N] float32, recorded when the tokens were sampled."""
    weights_N: Tensor
    """[N] float32: 1 where the token counts in the loss, 0 where its completion is masked."""
    lengths_S: Tensor
    """[S] number of tokens in the loss of each completion."""
    completion_S: Tensor
    """[S] index of each sequence among the P * G completions that were packed."""

    @property
    def layout(self) -> PackedLayout:
        """A new attention layout on the device of the tokens."""
        return PackedLayout(self.spans, self.input_ids_T.device)

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch with its tensors on `device`."""
        moved = {key: to_device(value, device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def with_advantages(self, advantages_PG: Tensor) -> "PackedBatch":
        """Return the batch with the advantages [P, G] of the completions that were packed."""
        advantages_S = to_device(advantages_PG.flatten().float(), self.completion_S.device)[self.completion_S]
        return replace(self, advantages_N=advantages_S[self.sequence_N])

    def rows(self) -> tuple[Tensor, Tensor]:
        """Unpack to plain right-padded rows, for models without packed attention, and as the oracle of the tests.

        Returns:
            ids [S, L] and the predictor [N] as an index into the flattened [S * L].
        """
        ids, sequences = self.input_ids_T.tolist(), list[list[int]]()
        for span in self.spans:
            middle = span.start + span.prompt_length
            prompt = ids[span.start : middle]
            for length in span.completion_lengths:
                sequences.append(prompt + ids[middle : middle + length])
                middle += length
        width = max(map(len, sequences))
        padded = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences])
        predictor = self.sequence_N * width + self.positions_T[self.predictor_N]  # a position is an index in its row
        return padded.to(self.input_ids_T.device), predictor


def pack(
    groups: list[Group],
    advantages_PG: Tensor | None = None,
    *,
    max_tokens: int,
    chosen_PG: Tensor | None = None,
    mask_truncated: bool = False,
    skip_flat: bool = False,
    share_prompts: bool = False,
) -> list[PackedBatch]:
    """Lay groups end to end in batches of at most `max_tokens` tokens. A larger group is split over several batches.

    Args:
        groups: P groups of G completions.
        advantages_PG: [P, G]; None where they are attached later (`PackedBatch.with_advantages`).
        max_tokens: Token budget of a batch.
        chosen_PG: [P, G] bool: the completions to lay down. None: all.
        mask_truncated: Give completions that were cut off weight 0 (DAPO's overlong filter, arXiv 2503.14476).
        skip_flat: Leave out completions with an advantage of exactly 0. Exact only without a KL, entropy or router
            term in the loss: then they have no gradient.
        share_prompts: Of the parts of a split group, only the last one is laid down with its prompt in the budget;
            the others read the prompt's keys and values (grpo/models/shared_prompt.py). Each batch, as stored here, is
            complete by itself either way.

    Raises:
        ValueError: A single prompt and completion exceed the budget.
    """
    batches: list[list[_Part]] = [[]]
    used = 0
    for row, group in enumerate(groups):
        prompt_length = len(group.prompt.token_ids)
        lengths = {
            sample: len(completion.token_ids)
            for sample, completion in enumerate(group.completions)
            if completion.token_ids
            and (chosen_PG is None or chosen_PG[row, sample])
            and not (skip_flat and advantages_PG is not None and advantages_PG[row, sample] == 0)
        }
        for length in lengths.values():
            if prompt_length + length > max_tokens:
                raise ValueError(
                    f"a prompt of {prompt_length} tokens and a completion of {length} exceed tokens_per_batch "
                    f"{max_tokens}: raise tokens_per_batch"
                )
        left, parts = list(lengths), list[_Part]()
        while left:
            rest = prompt_length + sum(lengths[sample] for sample in left)
            chosen = left
            if used + rest > max_tokens:
                size = used if share_prompts else used + prompt_length
                sizes = itertools.accumulate((lengths[sample] for sample in left), initial=size)
                fit = sum(total <= max_tokens for total in itertools.islice(sizes, 1, None))
                chosen = left[: min(fit, len(left) - 1)]  # the last batch holds the prompt, so at least one completion
            if chosen:
                parts.append(_Part(group, row, chosen))
                batches[-1].append(parts[-1])
            left = left[len(chosen) :]
            used += rest
            if left:
                batches.append([])
                used = 0
        if share_prompts and len(parts) > 1:
            split = SplitGroup(len(parts), sum(_weight(group, sample, mask_truncated) > 0 for sample in lengths))
            for part in parts:
                part.split, part.last = split, part is parts[-1]
    packed = [_lay(parts, mask_truncated) for parts in batches if parts]
    return packed if advantages_PG is None else [batch.with_advantages(advantages_PG) for batch in packed]


def regroup(
    values: Sequence[Tensor | None], before: list[PackedBatch], after: list[PackedBatch], real: int
) -> list[Any]:
    """Return values of completion tokens, given for the batches `before`, for the same completions packed as `after`.

    Args:
        values: [N] of each batch, or None for each.
        before: The batches that the values belong to.
        after: The batches to return values for.
        real: Number of batches in `after` that are not padding. Padding gets zeros.
    """
    if not values or values[0] is None:
        return [None] * len(after)
    pieces: dict[int, Tensor] = {}
    for value, batch in zip(values, before, strict=False):
        assert value is not None
        pieces |= zip(batch.completion_S.tolist(), value.split(batch.lengths_S.tolist()), strict=True)
    found = [torch.cat([pieces[source] for source in batch.completion_S.tolist()]) for batch in after[:real]]
    return found + [torch.zeros_like(batch.sampling_logprobs_N) for batch in after[real:]]


@dataclass
class _Part:
    """Completions of one group that are in one batch."""

    group: Group
    row: int
    chosen: list[int]
    split: SplitGroup | None = None
    last: bool = True


def _weight(group: Group, sample: int, mask_truncated: bool) -> float:
    return 0.0 if mask_truncated and not group.completions[sample].ended else 1.0


def _lay(parts: list[_Part], mask_truncated: bool) -> PackedBatch:
    ids: list[int] = []
    positions: list[int] = []
    spans: list[GroupSpan] = []
    predictor: list[int] = []
    tokens: list[int] = []
    lengths: list[int] = []
    sources: list[int] = []
    weights: list[float] = []
    sampling: list[float] = []
    for part in parts:
        group = part.group
        start, prompt = len(ids), list(group.prompt.token_ids)
        ids += prompt
        positions += range(len(prompt))
        for sample in part.chosen:
            completion = group.completions[sample]
            first, length = len(ids), len(completion.token_ids)
            ids += completion.token_ids
            positions += range(len(prompt), len(prompt) + length)
            before, sampled = [start + len(prompt) - 1, *range(first, first + length - 1)], completion.sampled
            predictor += [before[n] for n in sampled]
            tokens += [completion.token_ids[n] for n in sampled]
            sampling += [completion.logprobs[n] for n in sampled]
            lengths.append(len(sampled))
            sources.append(part.row * len(group.completions) + sample)
            weights.append(_weight(group, sample, mask_truncated))
        own_lengths = tuple(len(group.completions[sample].token_ids) for sample in part.chosen)
        spans.append(GroupSpan(start, len(prompt), own_lengths, part.split, part.last))
    lengths_S = torch.tensor(lengths)
    return PackedBatch(
        input_ids_T=torch.tensor(ids),
        positions_T=torch.tensor(positions),
        spans=spans,
        predictor_N=torch.tensor(predictor),
        tokens_N=torch.tensor(tokens),
        sequence_N=torch.arange(len(lengths)).repeat_interleave(lengths_S),
        advantages_N=torch.zeros(len(tokens)),
        sampling_logprobs_N=torch.tensor(sampling, dtype=torch.float32),
        weights_N=torch.tensor(weights, dtype=torch.float32).repeat_interleave(lengths_S),
        lengths_S=lengths_S,
        completion_S=torch.tensor(sources),
    )

"""Packing: groups + advantages -> packed batches of tokens laid end to end, under a token budget.

The one alignment rule: every [N] tensor at index n describes completion token n, and logprobs[n] is
log p(token n | the tokens before it in its own sequence). The shift by one happens here, once, as `predictor_N`.

    # one group: prompt [5 6], completions [7 8] and [9]       T = 5, N = 3
    # input_ids_T   5  6  7  8  9
    # positions_T   0  1  2  3  2      a completion's positions go on from its prompt's
    # tokens_N            7  8  9      what the loss is about
    # predictor_N         1  2  1      index into T of the token before it: both completions follow the prompt's last
    # sequence_N          0  0  1
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo.kernels.attention import GroupSpan, PackedLayout, SplitGroup
from grpo.types import Group


@dataclass
class PackedBatch:
    """What goes through the model at once. T packed tokens, N completion tokens, S sequences."""

    input_ids_T: Tensor
    positions_T: Tensor
    spans: list[GroupSpan]
    predictor_N: Tensor
    tokens_N: Tensor
    sequence_N: Tensor
    """[N] which of the S sequences each completion token belongs to."""
    advantages_N: Tensor
    """[N] float32; the same for all tokens of one completion."""
    sampling_logprobs_N: Tensor
    """[N] float32, recorded as the tokens were drawn."""
    weights_N: Tensor
    """[N] float32: 1 where the token counts in the loss, 0 where its completion is masked."""
    lengths_S: Tensor
    """[S] completion lengths in tokens."""

    @property
    def layout(self) -> PackedLayout:
        """A fresh attention layout on the device of the tokens."""
        return PackedLayout(self.spans, self.input_ids_T.device)

    def to(self, device: torch.device) -> "PackedBatch":
        moved = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def rows(self) -> tuple[Tensor, Tensor]:
        """The same sequences as plain right-padded rows, for models whose attention cannot be swapped, and as the oracle.

        -> ids [S, L], predictor [N] as an index into the flattened [S * L].
        """
        ids = self.input_ids_T.tolist()
        sequences, first = [], []
        for span in self.spans:
            middle = span.start + span.prompt_length
            prompt = ids[span.start : middle]
            for length in span.completion_lengths:
                sequences.append(prompt + ids[middle : middle + length])
                first.append(span.prompt_length - 1)
                middle += length
        width = max(map(len, sequences))
        padded = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences])
        predictor = torch.cat(
            [
                row * width + start + torch.arange(length)
                for row, (start, length) in enumerate(zip(first, self.lengths_S.tolist(), strict=True))
            ]
        )
        return padded.to(self.input_ids_T.device), predictor.to(self.input_ids_T.device)


def pack(
    groups: list[Group],
    advantages_PG: Tensor,
    *,
    max_tokens: int,
    mask_truncated: bool = False,
    skip_flat: bool = False,
    share_prompts: bool = False,
) -> list[PackedBatch]:
    """Groups laid end to end in batches of at most `max_tokens` tokens. advantages_PG is [P, G].

    A group that is larger than a batch is split; its prompt is then laid down again. `mask_truncated` gives completions
    that were cut off weight 0 (DAPO's overlong filter, arXiv 2503.14476). `skip_flat` leaves out completions whose
    advantage is exactly 0: exact only where no KL is in the loss, since then they have no gradient.
    `share_prompts`: only the last of its batches has the prompt in the row that goes through the model, which is what the
    budget holds (grpo/models/shared_prompt.py). As stored here, each batch is complete by itself.
    Raises ValueError if a single prompt and completion exceed the budget.
    """
    batches: list[list[_Part]] = [[]]
    used = 0
    for row, group in enumerate(groups):
        prompt_length = len(group.prompt.token_ids)
        lengths = {
            sample: len(completion.token_ids)
            for sample, completion in enumerate(group.completions)
            if completion.token_ids and not (skip_flat and advantages_PG[row, sample] == 0)
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
                # The prompt has its place in the last batch, so with it a completion.
                chosen = left[: min(fit, len(left) - 1)]
            if chosen:
                parts.append(_Part(group, row, chosen))
                batches[-1].append(parts[-1])
            left = left[len(chosen) :]
            used += rest
            if left:
                batches.append([])
                used = 0
        if share_prompts and len(parts) > 1:
            split = SplitGroup(len(parts))
            for part in parts:
                part.split, part.last = split, part is parts[-1]
    return [_lay(parts, advantages_PG, mask_truncated) for parts in batches if parts]


@dataclass
class _Part:
    """Completions of one group that are in one batch."""

    group: Group
    row: int
    chosen: list[int]
    split: SplitGroup | None = None
    last: bool = True


def _lay(parts: list[_Part], advantages_PG: Tensor, mask_truncated: bool) -> PackedBatch:
    ids: list[int] = []
    positions: list[int] = []
    spans: list[GroupSpan] = []
    predictor: list[int] = []
    tokens: list[int] = []
    lengths: list[int] = []
    advantages: list[float] = []
    weights: list[float] = []
    sampling: list[float] = []
    for part in parts:
        group = part.group
        start, prompt = len(ids), list(group.prompt.token_ids)
        ids += prompt
        positions += range(len(prompt))
        last_of_prompt = len(ids) - 1
        for sample in part.chosen:
            completion = group.completions[sample]
            first, length = len(ids), len(completion.token_ids)
            ids += completion.token_ids
            positions += range(len(prompt), len(prompt) + length)
            predictor += [last_of_prompt, *range(first, first + length - 1)]
            tokens += completion.token_ids
            sampling += completion.logprobs
            lengths.append(length)
            advantages.append(float(advantages_PG[part.row, sample]))
            weights.append(0.0 if mask_truncated and not completion.ended else 1.0)
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
        advantages_N=torch.tensor(advantages, dtype=torch.float32).repeat_interleave(lengths_S),
        sampling_logprobs_N=torch.tensor(sampling, dtype=torch.float32),
        weights_N=torch.tensor(weights, dtype=torch.float32).repeat_interleave(lengths_S),
        lengths_S=lengths_S,
    )

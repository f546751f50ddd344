"""Padded rows: groups -> batches for models without packed attention, bounded by their padded rectangle."""

from dataclasses import replace

import torch
from torch import Tensor

from grpo.packing import PackedBatch, pack
from grpo.types import Group


def pack_rows(
    groups: list[Group],
    advantages_PG: Tensor | None = None,
    *,
    max_tokens: int,
    chosen_PG: Tensor | None = None,
    mask_truncated: bool = False,
    skip_flat: bool = False,
) -> list[PackedBatch]:
    """Put completions of similar length together, so that rows x longest row of a batch is at most `max_tokens`.

    Each row of `PackedBatch.rows` has its prompt. See `grpo.packing.pack` for the arguments.

    Raises:
        ValueError: A single prompt and completion exceed the budget.
    """
    rows = [
        (len(group.prompt.token_ids) + len(completion.token_ids), row, sample)
        for row, group in enumerate(groups)
        for sample, completion in enumerate(group.completions)
        if completion.token_ids
        and (chosen_PG is None or chosen_PG[row, sample])
        and not (skip_flat and advantages_PG is not None and advantages_PG[row, sample] == 0)
    ]
    rows.sort(key=lambda entry: -entry[0])
    if rows and rows[0][0] > max_tokens:
        raise ValueError(
            f"a prompt and a completion of {rows[0][0]} tokens exceed tokens_per_batch {max_tokens}: raise "
            f"tokens_per_batch"
        )
    batches = []
    while rows:
        count = max_tokens // rows[0][0]
        chosen: dict[int, list[int]] = {}
        for _, row, sample in sorted(rows[:count], key=lambda entry: entry[1:]):
            chosen.setdefault(row, []).append(sample)
        rows = rows[count:]
        parts = [
            Group(groups[row].prompt, [groups[row].completions[sample] for sample in samples])
            for row, samples in chosen.items()
        ]
        sources = [row * len(groups[row].completions) + sample for row in chosen for sample in chosen[row]]
        size = sum(len(part.prompt.token_ids) + sum(len(c.token_ids) for c in part.completions) for part in parts)
        [batch] = pack(parts, max_tokens=size, mask_truncated=mask_truncated)
        batches.append(replace(batch, completion_S=torch.tensor(sources)))
    return batches if advantages_PG is None else [batch.with_advantages(advantages_PG) for batch in batches]

"""Attention of packed groups (training) and of slots (decoding).

transformers selects a model's attention by name; ours is registered as "grpo". It reads the layout of the tokens from the keyword
`layout` that model.forward passes on to every layer, and computes only the products that the layout needs:

    layout=None             rows of a batch, causal; right padding is harmless, since no token sees what follows it
    layout=PackedLayout     one row of T tokens: groups end to end, each prompt once, then its completions
    layout=SlotLayout       one new token per row, against that row's own part of a preallocated KV cache

Shapes: query [B, H, T, D], key and value [B, K, T, D] with K key/value heads (H a multiple of K); output [B, T, H, D].
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from grpo.kernels.cpu import attention as cpu_attention
from grpo.kernels.cpu.attention import Join, PackedAttention, Sequences

NAME = "grpo"
Prompt = tuple[Tensor, Tensor]
"""Keys and values of a prompt, [1, K, P, D] each."""


@dataclass(frozen=True, eq=False)
class SplitGroup:
    """Identity of a group that is spread over `parts` batches. Equal only to itself."""

    parts: int


@dataclass(frozen=True)
class GroupSpan:
    """Place of one group in the packed row: prompt tokens, then its completions end to end.

    # prompt [5 6], completions [7 8] and [9], laid from index 10 on
    # index           10 11 12 13 14
    # input_ids        5  6  7  8  9
    # positions        0  1  2  3  2
    # start 10, prompt_length 2, completion_lengths (2, 1)
    """

    start: int
    prompt_length: int
    completion_lengths: tuple[int, ...]
    split: SplitGroup | None = None
    """Set where other batches hold more completions of this group, and share its prompt (grpo/models/shared_prompt.py)."""
    last: bool = True
    """Of its parts."""

    @property
    def length(self) -> int:
        return self.prompt_length + sum(self.completion_lengths)


@dataclass
class PackedLayout:
    """One packed row. Attention inside a group only: prompts causal; a completion sees its prompt and itself."""

    spans: list[GroupSpan]
    device: torch.device
    elsewhere: dict[int, Iterator[Prompt]] = field(default_factory=dict)
    """By the index of a span, if its prompt is not in the row: the prompt's keys and values, layer by layer."""
    watched: dict[int, Callable[[Tensor, Tensor], Prompt | None]] = field(default_factory=dict)
    """By the index of a span: called with the prompt's keys and values, layer by layer. May return leaves of the same values, whose
    gradients are added to theirs."""
    _padding: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int, int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def blocks(self, span: GroupSpan) -> list[tuple[int, ...]]:
        """Lengths of the completions that go through attention together. On a CPU each goes alone, so that nothing is
        padded; elsewhere all of a group at once, since launches cost more than padding."""
        if self.one_by_one or not span.completion_lengths:
            return [(length,) for length in span.completion_lengths]
        return [span.completion_lengths]

    @functools.cached_property
    def one_by_one(self) -> bool:
        """Each completion goes through attention alone."""
        return self.device.type == "cpu"

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Tokens of each prompt in the row and of each block, in the order of the row."""
        sizes: list[int] = []
        for index, span in enumerate(self.spans):
            if index not in self.elsewhere:
                sizes.append(span.prompt_length)
            sizes += map(sum, self.blocks(span))
        return sizes

    @functools.cached_property
    def sequences(self) -> Sequences:
        """Each prompt in the row and each completion, for attention.c."""
        rows: list[list[int]] = []
        groups, elsewhere, first = [0], list[int](), 0
        behind = sum(
            span.length - (index in self.elsewhere) * span.prompt_length for index, span in enumerate(self.spans)
        )
        for index, span in enumerate(self.spans):
            place, outside = first, -1
            if index in self.elsewhere:
                place, outside = behind + sum(elsewhere), len(elsewhere)
                elsewhere.append(span.prompt_length)
            else:
                rows.append([first, span.prompt_length, 0, 0, -1])
                first += span.prompt_length
            for length in span.completion_lengths:
                rows.append([first, length, span.prompt_length, place, outside])
                first += length
            groups.append(len(rows))
        return Sequences.of(rows, groups, elsewhere)

    def outside(self) -> list[Tensor]:
        """Return the next layer's keys and values, in turn, of the prompts that are not in the row."""
        return [tensor for index in sorted(self.elsewhere) for tensor in next(self.elsewhere[index])]

    def watch(self, key: Tensor, value: Tensor) -> list[Join]:
        """Pass one layer's keys and values [1, K, T, D] to `watched`. Returns what is to be added to their gradients."""
        joins: list[Join] = []
        for index, watcher in self.watched.items():
            first, length = self.sequences.first_tokens[index], self.spans[index].prompt_length
            before = watcher(key[:, :, first : first + length], value[:, :, first : first + length])
            if before is not None:
                joins.append((first, *before))
        return joins

    def padding(self, block: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return indices that pad completions of the lengths `block`: rows [G, C] (into their tokens, padding points at 0) and
        back [sum of lengths] (into the flattened [G * C], to undo it). Built once, used by every layer."""
        if block not in self._padding:
            lengths = torch.tensor(block)
            column = torch.arange(max(block))
            real = column[None, :] < lengths[:, None]
            first = F.pad(lengths.cumsum(0), (1, 0))[:-1]
            rows = torch.where(real, first[:, None] + column[None, :], 0)
            back = real.flatten().nonzero().squeeze(1)
            self._padding[block] = (rows.to(self.device), back.to(self.device))
        return self._padding[block]

    def completion_mask(self, prompt: int, width: int, repeats: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive mask [repeats * C, P + C]: 0 where the c-th completion token sees a key, -inf elsewhere; once for
        each of the `repeats` query heads that share a key head. Built once, used by every layer."""
        key = (prompt, width, repeats, window, dtype)
        if key not in self._masks:
            query = torch.arange(width, device=self.device)[:, None] + prompt
            visible = _visible(query, torch.arange(prompt + width, device=self.device)[None, :], window)
            self._masks[key] = _additive(visible, dtype).repeat(repeats, 1)
        return self._masks[key]


@dataclass
class SlotLayout:
    """One decoding step: row b holds lengths_B[b] cached tokens, the newest one included."""

    lengths_B: Tensor
    longest: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """[B, 1, 1, L] additive float mask: 0 for the row's own cached tokens, -inf beyond them."""
        if window not in self._masks:
            query = self.lengths_B[:, None] - 1
            key = torch.arange(self.longest, device=self.lengths_B.device)[None, :]
            self._masks[window] = _additive(_visible(query, key, window), torch.float32)[:, None, None, :]
        return self._masks[window]


def grpo_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: PackedLayout | SlotLayout | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """The attention function that is registered with transformers. Returns ([B, T, H, D], None)."""
    if dropout or softcap is not None or attention_mask is not None:
        # The check at the start of a run catches this and keeps the model's own attention.
        raise NotImplementedError("grpo attention has no dropout, no softcap and no outside mask")
    if isinstance(layout, SlotLayout):
        output = _slots(query, key, value, layout, scaling, sliding_window)
    elif isinstance(layout, PackedLayout):
        output = packed_attention(query, key, value, layout, scaling, sliding_window)
    else:
        output = _rows(query, key, value, scaling, sliding_window)
    return output.transpose(1, 2), None


def _rows(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    if cpu_attention.is_supported(query, key, value):
        count, length = query.shape[0], query.shape[2]
        rows = [[row * length, length, 0, 0, -1] for row in range(count)]
        sequences = Sequences.of(rows, list(range(count + 1)), [])
        attended: Tensor = PackedAttention.apply(query, key, value, sequences, scaling, window, [])
        return attended
    length, repeats = query.shape[2], query.shape[1] // key.shape[1]
    if window is not None and length > window:
        index = torch.arange(length, device=query.device)
        mask = _visible(index[:, None], index[None, :], window).repeat(repeats, 1)
        return _attend_masked(query, key, value, mask, scaling)
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:
    """Attention of one packed row: query [1, H, T, D], key and value [1, K, T, D] -> [1, H, T, D]."""
    if cpu_attention.is_supported(query, key, value):
        return _packed_in_c(query, key, value, layout, scaling, window)
    # One split: its gradient is one concatenation, while the gradient of each slice would be as large as the row.
    pieces = zip(*(tensor.split(layout.sizes, dim=2) for tensor in (query, key, value)), strict=True)
    parts = []
    repeats = query.shape[1] // key.shape[1]
    for index, span in enumerate(layout.spans):
        if index in layout.elsewhere:
            prompt_key, prompt_value = next(layout.elsewhere[index])
        else:
            prompt_query, prompt_key, prompt_value = next(pieces)
            if index in layout.watched:
                before = layout.watched[index](prompt_key, prompt_value)
                if before is not None:
                    joined(prompt_key, before[0])
                    joined(prompt_value, before[1])
            parts.append(_rows(prompt_query, prompt_key, prompt_value, scaling, window))
        for block in layout.blocks(span):
            own_query, own_key, own_value = (_padded(tensor, layout, block) for tensor in next(pieces))
            attended = _attend_masked(
                own_query,
                torch.cat([prompt_key.expand(len(block), -1, -1, -1), own_key], dim=2),
                torch.cat([prompt_value.expand(len(block), -1, -1, -1), own_value], dim=2),
                layout.completion_mask(span.prompt_length, max(block), repeats, window, query.dtype),
                scaling,
            )
            parts.append(_unpadded(attended, layout, block))
    return torch.cat(parts, dim=2)


def joined(again: Tensor, before: Tensor) -> Tensor:
    """Return `again`, to whose gradient that of `before`, a leaf of the same numbers, will be added."""
    if again.requires_grad and before.grad is not None:  # with LoRA, nothing may be learned before the first keys
        again.register_hook(lambda gradient: gradient + before.grad)
    return again


def _packed_in_c(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:
    outside, joins = layout.outside(), layout.watch(key, value)
    attended: Tensor = PackedAttention.apply(query, key, value, layout.sequences, scaling, window, joins, *outside)
    return attended


def _padded(tensor: Tensor, layout: PackedLayout, block: tuple[int, ...]) -> Tensor:
    """[1, K, tokens, D] -> [G, K, C, D]"""
    if len(block) == 1:
        return tensor
    return tensor[0][:, layout.padding(block)[0]].transpose(0, 1)


def _unpadded(tensor: Tensor, layout: PackedLayout, block: tuple[int, ...]) -> Tensor:
    """[G, H, C, D] -> [1, H, tokens, D]"""
    if len(block) == 1:
        return tensor
    return rearrange(tensor, "g h c d -> 1 h (g c) d")[:, :, layout.padding(block)[1]]


def _slots(
    query: Tensor, key: Tensor, value: Tensor, layout: SlotLayout, scaling: float | None, window: int | None
) -> Tensor:
    # With one query token per row, the query heads that share a key head can stand in for a query length: no key or
    # value is repeated.
    grouped = rearrange(query, "b (k shared) 1 d -> b k shared d", k=key.shape[1])
    mask = layout.mask(window).to(query.dtype)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return rearrange(output, "b k shared d -> b (k shared) 1 d")


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """query [B, H, C, D], key and value [B, K, L, D], mask [H / K * C, L] -> [B, H, C, D]. The query heads that share a key
    head become one head of more queries: no key or value is repeated, and the products are larger."""
    heads, shared = key.shape[1], query.shape[1] // key.shape[1]
    joined = rearrange(query, "b (k shared) c d -> b k (shared c) d", k=heads)
    output = F.scaled_dot_product_attention(joined, key, value, attn_mask=mask, scale=scaling)
    return rearrange(output, "b k (shared c) d -> b (k shared) c d", shared=shared)


def _visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return whether each query sees each key, by their positions: not the future, nor further back than the window."""
    visible = key <= query
    if window is not None:
        visible = visible & (query - key < window)
    return visible


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask that is added to the scores: 0 where `visible`, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)

"""Attention of packed groups (training) and of slots (decoding).

transformers selects a model's attention by name. This one is registered as "grpo". It reads the layout of the tokens
from the keyword argument `layout`, which model.forward passes on to every layer, and computes only the products that
the layout needs:

    layout=None             rows of a batch, causal. Right padding has no effect: no token attends to later ones
    layout=PackedLayout     one row of T tokens: groups end to end, each prompt once, then its completions
    layout=SlotLayout       one new token per row, against that row's part of a preallocated KV cache

Shapes: query [B, H, T, D], key and value [B, K, T, D] with K key/value heads (H a multiple of K). Output [B, T, H, D].
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.cpu import attention as cpu_attention
from grpo.kernels.cpu.attention import Join, PackedAttention, Sequences
from grpo.kernels.cuda import varlen
from grpo.kernels.cuda.varlen import VarlenPlan
from grpo.kernels.state_slots import StateSlots
from grpo.kernels.transfer import to_device

NAME = "grpo"
Prompt = tuple[Tensor, Tensor]
"""Keys and values of a prompt, [1, K, P, D] each."""


@dataclass(frozen=True, eq=False)
class SplitGroup:
    """Identity of a group that is split over `parts` batches. Equal only to itself."""

    parts: int
    counted: int = 0
    """Completions in all parts that count in the loss."""


@dataclass(frozen=True)
class GroupSpan:
    """Location of one group in the packed row: prompt tokens, then its completions end to end.

    # prompt [5 6], completions [7 8] and [9], from index 10 on
    # index           10 11 12 13 14
    # input_ids        5  6  7  8  9
    # positions        0  1  2  3  2
    # start 10, prompt_length 2, completion_lengths (2, 1)
    """

    start: int
    prompt_length: int
    completion_lengths: tuple[int, ...]
    split: SplitGroup | None = None
    """Set if other batches hold more completions of this group and share its prompt (grpo/models/shared_prompt.py)."""
    last: bool = True
    """This is the last part of a split group."""

    @property
    def length(self) -> int:
        """Number of tokens of the prompt and all completions."""
        return self.prompt_length + sum(self.completion_lengths)


@dataclass
class PackedLayout:
    """Layout of one packed row.

    Attention stays inside a group: prompts are causal, and a completion attends to its prompt and itself.
    """

    spans: list[GroupSpan]
    device: torch.device
    elsewhere: dict[int, Iterator[Prompt]] = field(default_factory=dict)
    """Span index -> keys and values of its prompt, layer by layer, if the prompt is not in the row."""
    watched: dict[int, Callable[[Tensor, Tensor], Prompt | None]] = field(default_factory=dict)
    """Span index -> function that is called with the keys and values of its prompt, layer by layer. It may return
    leaves of the same values. Their gradients are then added to those of the keys and values in the row. Recurrent
    layers pass the states at the end of the prompt (grpo/kernels/recurrent.py)."""
    states: StateSlots | None = None
    """Receives the states of recurrent layers at the end of the prompts."""
    counts_T: Tensor | None = None
    """How often each token of the row counts in the load of experts (grpo/models/routers.py)."""
    scans: dict[int, object] = field(default_factory=dict)
    """Places of the row in recurrent layers, by the length of their convolution."""
    _padding: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int, int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def blocks(self, span: GroupSpan) -> list[tuple[int, ...]]:
        """Return the lengths of the completions of a span, grouped by attention call.

        On a CPU each completion has its own call, so that nothing is padded. Elsewhere all completions of a group
        share one, since launches cost more than padding.
        """
        if self.one_by_one or not span.completion_lengths:
            return [(length,) for length in span.completion_lengths]
        return [span.completion_lengths]

    @functools.cached_property
    def one_by_one(self) -> bool:
        """True if each completion has its own attention call."""
        return self.device.type == "cpu"

    @functools.cached_property
    def uses_varlen(self) -> bool:
        """True if the device computes the row in one call (grpo/kernels/cuda/varlen.py)."""
        return varlen.is_available(self.device)

    @functools.cached_property
    def varlen_plan(self) -> VarlenPlan:
        """Indices of `sequences` for one call."""
        outside = sum(self.spans[index].prompt_length for index in self.elsewhere)
        tokens = sum(span.length for span in self.spans) - outside
        return VarlenPlan.of(self.sequences, tokens, self.device)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of tokens of each prompt in the row and of each block, in the order of the row."""
        sizes: list[int] = []
        for index, span in enumerate(self.spans):
            if index not in self.elsewhere:
                sizes.append(span.prompt_length)
            sizes += map(sum, self.blocks(span))
        return sizes

    @functools.cached_property
    def sequences(self) -> Sequences:
        """Prompts in the row and completions, in the form that attention.c reads."""
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
        """Pass one layer's keys and values [1, K, T, D] to the functions in `watched`.

        Returns:
            The leaves whose gradients are to be added to those of the keys and values.
        """
        joins: list[Join] = []
        for index, watcher in self.watched.items():
            first, length = self.sequences.first_tokens[index], self.spans[index].prompt_length
            before = watcher(key[:, :, first : first + length], value[:, :, first : first + length])
            if before is not None:
                joins.append((first, *before))
        return joins

    def padding(self, block: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the indices that pad the completions of a block to one width C, and those that undo it.

        Built once, used by every layer.

        Args:
            block: lengths of the G completions.

        Returns:
            rows: [G, C] indices into the tokens of the block. Padding points at token 0.
            back: [sum of lengths] indices into the flattened [G * C].
        """
        if block not in self._padding:
            lengths = torch.tensor(block)
            column = torch.arange(max(block))
            real = column[None, :] < lengths[:, None]
            first = F.pad(lengths.cumsum(0), (1, 0))[:-1]
            rows = torch.where(real, first[:, None] + column[None, :], 0)
            back = real.flatten().nonzero().squeeze(1)
            self._padding[block] = (to_device(rows, self.device), to_device(back, self.device))
        return self._padding[block]

    def completion_mask(self, prompt: int, width: int, repeats: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive mask [repeats * C, P + C]: 0 where a completion token attends to a key, -inf elsewhere.

        Built once, used by every layer.

        Args:
            prompt: P, tokens of the prompt.
            width: C, tokens of the padded completion.
            repeats: query heads that share a key head. The mask is repeated for each.
            window: tokens that a query attends to, itself included. None: all before it.
            dtype: dtype of the mask.
        """
        key = (prompt, width, repeats, window, dtype)
        if key not in self._masks:
            query = torch.arange(width, device=self.device)[:, None] + prompt
            visible = _visible(query, torch.arange(prompt + width, device=self.device)[None, :], window)
            self._masks[key] = _additive(visible, dtype).repeat(repeats, 1)
        return self._masks[key]


@dataclass
class SlotLayout:
    """Layout of one decoding step: row b has lengths_B[b] cached tokens, including the newest."""

    lengths_B: Tensor
    longest: int
    states: StateSlots | None = None
    """States of recurrent layers, if the model has any."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """Return the additive float32 mask [B, 1, 1, L]: 0 for cached tokens in the window, -inf elsewhere."""
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
    """Attention function that is registered with transformers.

    Returns:
        The attended states [B, T, H, D], and None in place of attention weights.

    Raises:
        NotImplementedError: the model needs dropout, a softcap or a mask of its own.
    """
    if dropout or softcap is not None or attention_mask is not None:
        # `use_grpo_attention` catches this and keeps the model's own attention.
        raise NotImplementedError("grpo attention has no dropout, no softcap and no outside mask")
    if isinstance(layout, SlotLayout):
        output = _slots(query, key, value, layout, scaling, sliding_window)
    elif isinstance(layout, PackedLayout):
        output = packed_attention(query, key, value, layout, scaling, sliding_window)
    else:
        output = _rows(query, key, value, scaling, sliding_window)
    return output.transpose(1, 2), None


def _rows(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of the rows of a batch: query [B, H, T, D], key and value [B, K, T, D] -> [B, H, T, D]."""
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
    if layout.uses_varlen and varlen.is_supported(query, value):
        joins, outside = layout.watch(key, value), layout.outside()
        return varlen.packed_attention(query, key, value, layout.varlen_plan, scaling, window, joins, outside)
    if cpu_attention.is_supported(query, key, value):
        return _packed_in_c(query, key, value, layout, scaling, window)
    # One split: its backward pass is one concatenation. The gradient of each slice would be as large as the row.
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
    """Return `again`. The gradient of `before`, a leaf of the same values, will be added to its gradient."""
    if again.requires_grad and before.grad is not None:  # with LoRA, no trained weight may precede the first keys
        again.register_hook(lambda gradient: gradient + before.grad)
    return again


def _packed_in_c(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:
    """`packed_attention` by attention.c."""
    outside, joins = layout.outside(), layout.watch(key, value)
    attended: Tensor = PackedAttention.apply(query, key, value, layout.sequences, scaling, window, joins, *outside)
    return attended


def _padded(tensor: Tensor, layout: PackedLayout, block: tuple[int, ...]) -> Tensor:
    """Tokens of a block to padded completions: [1, K, tokens, D] -> [G, K, C, D]."""
    if len(block) == 1:
        return tensor
    rows, back = layout.padding(block)
    padded: Tensor = Selected.apply(tensor[0], rows.flatten(), back, False)
    return padded.unflatten(1, rows.shape).transpose(0, 1)


def _unpadded(tensor: Tensor, layout: PackedLayout, block: tuple[int, ...]) -> Tensor:
    """Padded completions to tokens of a block: [G, H, C, D] -> [1, H, tokens, D]."""
    if len(block) == 1:
        return tensor
    rows, back = layout.padding(block)
    tokens: Tensor = Selected.apply(rearrange(tensor, "g h c d -> h (g c) d"), back, rows.flatten(), True)
    return tokens[None]


class Selected(torch.autograd.Function):
    """Positions of [H, T, D] in another order: with padding in between, or without it again.

    The backward pass selects by the opposite order, or writes to it. That of an index would add the gradients of all
    padding, which are zeros, to one token, one after another.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, index: Tensor, opposite: Tensor, drops_padding: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.index, ctx.opposite, ctx.drops_padding = index, opposite, drops_padding
        return tensor.index_select(1, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        if not ctx.drops_padding:
            return gradient.index_select(1, ctx.opposite), None, None, None
        heads, _, size = gradient.shape
        padded = gradient.new_zeros(heads, len(ctx.opposite), size)
        return padded.index_copy_(1, ctx.index, gradient), None, None, None


def _slots(
    query: Tensor, key: Tensor, value: Tensor, layout: SlotLayout, scaling: float | None, window: int | None
) -> Tensor:
    """Attention of one new token per row: query [B, H, 1, D], keys and values [B, K, L, D] -> [B, H, 1, D]."""
    # The query heads that share a key head take the place of query tokens, so no key or value is repeated.
    grouped = rearrange(query, "b (k shared) 1 d -> b k shared d", k=key.shape[1])
    mask = layout.mask(window).to(query.dtype)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return rearrange(output, "b k shared d -> b (k shared) 1 d")


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Masked attention that repeats no key or value.

    The query heads that share a key head become one head with more queries, which also makes the products larger.

    Args:
        query: [B, H, C, D].
        key: [B, K, L, D].
        value: [B, K, L, D].
        mask: [H / K * C, L].
        scaling: factor of the scores. None: 1 / sqrt(D).

    Returns:
        [B, H, C, D]
    """
    heads, shared = key.shape[1], query.shape[1] // key.shape[1]
    joined = rearrange(query, "b (k shared) c d -> b k (shared c) d", k=heads)
    output = F.scaled_dot_product_attention(joined, key, value, attn_mask=mask, scale=scaling)
    return rearrange(output, "b k (shared c) d -> b (k shared) c d", shared=shared)


def _visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return a bool mask by positions: a query attends to keys up to its own position, within the window."""
    visible = key <= query
    if window is not None:
        visible = visible & (query - key < window)
    return visible


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask that is added to scores: 0 where `visible`, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)

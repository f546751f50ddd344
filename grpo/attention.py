"""Attention layouts: packed groups (training) and slots (decoding) -> attention outputs, on stock transformers models.

transformers lets a model's attention be swapped by name. Ours is called "grpo". It reads how the tokens are laid out from
the keyword `layout` that model.forward hands down to every layer, and does only the products that the layout needs:

    layout=None             rows of a batch, causal; right padding is harmless, since no real token looks right
    layout=PackedLayout     one row of T tokens: groups laid end to end, each prompt once, then its completions
    layout=SlotLayout       one new token per row, against that row's own part of a preallocated KV cache

Shapes: query [B, H, T, D], key and value [B, K, T, D] with K key/value heads (H a multiple of K); output [B, T, H, D].
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

NAME = "grpo"


@dataclass(frozen=True)
class GroupSpan:
    """Where one group lies in the packed row:  prompt tokens, then its completions end to end.

    # prompt [5 6], completions [7 8] and [9], laid from index 10 on
    # index           10 11 12 13 14
    # input_ids        5  6  7  8  9
    # positions        0  1  2  3  2
    # start 10, prompt_length 2, completion_lengths (2, 1)
    """

    start: int
    prompt_length: int
    completion_lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt_length + sum(self.completion_lengths)


@dataclass
class PackedLayout:
    """One packed row. Attention inside a group only: prompts causal; a completion sees its prompt and itself."""

    spans: list[GroupSpan]
    device: torch.device
    _padding: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def padding(self, index: int) -> tuple[Tensor, Tensor]:
        """For span `index`: rows [G, C] (indices into the span's completion part, padding points at 0) and
        back [sum of lengths] (indices into the flattened [G * C] that undo it). Built once, used by every layer."""
        if index not in self._padding:
            lengths = torch.tensor(self.spans[index].completion_lengths)
            width = int(lengths.max())
            column = torch.arange(width)
            real = column[None, :] < lengths[:, None]
            first = F.pad(lengths.cumsum(0), (1, 0))[:-1]
            rows = torch.where(real, first[:, None] + column[None, :], 0)
            back = real.flatten().nonzero().squeeze(1)
            self._padding[index] = (rows.to(self.device), back.to(self.device))
        return self._padding[index]

    def completion_mask(self, index: int, window: int | None) -> Tensor:
        """[C, P + C] bool for span `index`: what the c-th completion token may look at. True = visible."""
        if (index, window) not in self._masks:
            span = self.spans[index]
            width = max(span.completion_lengths)
            query = torch.arange(width, device=self.device)[:, None] + span.prompt_length
            key = torch.arange(span.prompt_length + width, device=self.device)[None, :]
            self._masks[index, window] = _visible(query, key, window)
        return self._masks[index, window]


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
            visible = _visible(query, key, window)
            bias = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)
            self._masks[window] = bias[:, None, None, :]
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
        # Not ours to guess: the start-up check compares with the stock model and falls back to it.
        raise NotImplementedError("grpo attention has no dropout, no softcap and no outside mask")
    if isinstance(layout, SlotLayout):
        output = _slots(query, key, value, layout, scaling, sliding_window)
    elif isinstance(layout, PackedLayout):
        output = _packed(query, key, value, layout, scaling, sliding_window)
    else:
        output = _rows(query, key, value, scaling, sliding_window)
    return output.transpose(1, 2), None


def _rows(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    length = query.shape[2]
    if window is not None and length > window:
        index = torch.arange(length, device=query.device)
        mask = _visible(index[:, None], index[None, :], window)
        return _attend(query, key, value, scaling, mask=mask)
    return _attend(query, key, value, scaling, causal=True)


def _packed(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:
    parts = []
    for index, span in enumerate(layout.spans):
        middle, end = span.start + span.prompt_length, span.start + span.length
        prompt = slice(span.start, middle)
        parts.append(_rows(query[:, :, prompt], key[:, :, prompt], value[:, :, prompt], scaling, window))
        rows, back = layout.padding(index)
        group = len(rows)
        # [1, K, tokens, D] -> [G, K, C, D]
        own = [tensor[0, :, middle:end][:, rows].transpose(0, 1) for tensor in (query, key, value)]
        shared_key, shared_value = (tensor[:, :, prompt].expand(group, -1, -1, -1) for tensor in (key, value))
        attended = _attend(
            own[0],
            torch.cat([shared_key, own[1]], dim=2),
            torch.cat([shared_value, own[2]], dim=2),
            scaling,
            mask=layout.completion_mask(index, window),
        )
        parts.append(rearrange(attended, "g h c d -> 1 h (g c) d")[:, :, back])
    return torch.cat(parts, dim=2)


def _slots(
    query: Tensor, key: Tensor, value: Tensor, layout: SlotLayout, scaling: float | None, window: int | None
) -> Tensor:
    # With one query token per row, the query heads that share a key head can stand in for a query length: no key or
    # value is repeated.
    grouped = rearrange(query, "b (k shared) 1 d -> b k shared d", k=key.shape[1])
    mask = layout.mask(window).to(query.dtype)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return rearrange(output, "b k shared d -> b (k shared) 1 d")


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling)


def _visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Positions -> may this query look at this key? Not at the future, nor further back than the window."""
    visible = key <= query
    if window is not None:
        visible = visible & (query - key < window)
    return visible

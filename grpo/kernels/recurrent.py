"""Recurrent layers on packed groups: causal convolutions and recurrences, chunk by chunk.

A prompt's final state is computed once, and each of its completions starts from it. No padding enters a state.

    # prompt [5 6 7], completions [8 9] and [4], chunks of 2 tokens
    # row        5 6 7 8 9 4
    # chunks    [5 6] [7]        the prompt: starts from 0
    #           [8 9] [4 .]      the completions: both start from the prompt's state. Padding "." changes no state

Shapes: T tokens of the row, E channels of a convolution, B rows of a chunk, C tokens of a chunk. K key heads, each
shared by R value heads, N the size of a key, D the size of a value. All arithmetic is float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.attention import PackedLayout
from grpo.kernels.transfer import to_device

CHUNK = 64
"""Maximum number of tokens of a chunk."""

Advance = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Inputs of a chunk [B, C, features] and states [B, ...] before it (None: zeros) -> outputs [B, C, width], new states.
Zeros as inputs change no state."""


def delta_rule(
    inputs: Tensor, state: Tensor | None, keys: int, shared: int, size: int, beta: bool
) -> tuple[Tensor, Tensor]:
    """Compute one chunk of a matrix-valued recurrence with scalar decay.

    S = e^g S + k u^T, u = beta (v - (e^g S)^T k)    with beta: the gated delta rule (arXiv 2412.06464)
    S = e^g S + k v^T                                without: the state space of Mamba-2 (arXiv 2405.21060)
    o = S^T q

    In a chunk, u of all tokens is the solution of a triangular system.

    Args:
        inputs: [B, C, features], q [K, N], k [K, N], v [K, R, D], g [K, R] and beta [K, R] side by side (`join`).
        state: [B, K, N, R * D].
        keys: K.
        shared: R.
        size: N.
        beta: the inputs have beta.

    Returns:
        Outputs [B, C, K * R * D] and the new state.
    """
    heads = keys * shared
    width = inputs.shape[-1] - 2 * keys * size - heads * (1 + beta)
    query, key, value, *scalars = inputs.split([keys * size, keys * size, width, heads, *([heads] * beta)], dim=-1)
    # Contiguous: batched products of strided matrices are slow on a CPU.
    query, key = (
        part.unflatten(-1, (keys, size)).transpose(1, 2).contiguous() for part in (query, key)
    )  # [B, K, C, N]
    value = value.unflatten(-1, (keys, shared, -1)).movedim(1, 3).contiguous()  # [B, K, R, C, D]
    log_decay, *rates = (part.unflatten(-1, (keys, shared)).movedim(1, 3) for part in scalars)  # [B, K, R, C]
    total = log_decay.cumsum(-1)
    later = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool, device=inputs.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()  # [B, K, R, C, C]
    since_start = total.exp()[..., None]
    update = value
    if rates:
        rate = rates[0][..., None]
        if state is not None:
            update = torch.addcmul(update, since_start, _by_head(key @ state, shared), value=-1)
        system = (key @ key.mT)[:, :, None] * (decay * rate)
        update = torch.linalg.solve_triangular(system, rate * update, upper=False, unitriangular=True)
    output = ((query @ key.mT)[:, :, None] * decay) @ update
    if state is not None:
        output = torch.addcmul(output, since_start, _by_head(query @ state, shared))
    until_end = (total[..., -1:] - total).exp()[..., None]
    new = key.mT @ (update * until_end).transpose(2, 3).flatten(3)
    if state is not None:
        new = torch.addcmul(new, state, _per_column(total[..., -1].exp(), state))
    return output.movedim(3, 1).flatten(2), new


def delta_rule_step(inputs: Tensor, state: Tensor, keys: int, shared: int, size: int, beta: bool) -> Tensor:
    """Same as `delta_rule` for one token per row, [B, features]. Changes `state` in place.

    Returns:
        Outputs [B, K * R * D].
    """
    rows, heads = len(inputs), keys * shared
    width = inputs.shape[-1] - 2 * keys * size - heads * (1 + beta)
    both, update, *scalars = inputs.split([2 * keys * size, width, heads, *([heads] * beta)], dim=-1)
    both = both.unflatten(-1, (2, keys, size)).transpose(1, 2)  # [B, K, 2, N]: query and key
    update = update.unflatten(-1, (keys, -1))  # [B, K, R * D]
    decay, *rates = (part.unflatten(-1, (keys, shared)) for part in scalars)
    factor = _per_column(decay.exp(), state)[:, :, 0]  # [B, K, R * D]
    read = (both @ state) * factor[:, :, None]
    query, key = both.unbind(2)
    if rates:
        update = _per_column(rates[0], state)[:, :, 0] * (update - read[:, :, 1])
    state.mul_(factor[:, :, None])
    state.flatten(0, 1).baddbmm_(key.flatten(0, 1)[:, :, None], update.flatten(0, 1)[:, None])
    output = read[:, :, 0] + (query * key).sum(-1, keepdim=True) * update
    return output.reshape(rows, width)


def join(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, rate: Tensor | None = None) -> Tensor:
    """Return the inputs of `delta_rule` [T, features]: q [T, K, N], k, v [T, K * R, D], g [T, K * R], beta."""
    parts = [query, key, value, log_decay, *([] if rate is None else [rate])]
    return torch.cat([part.flatten(1).float() for part in parts], dim=1)


def selective_scan(inputs: Tensor, state: Tensor | None, log_rates_EN: Tensor) -> tuple[Tensor, Tensor]:
    """Compute one chunk of the selective state space of Mamba (arXiv 2312.00752), token by token.

    h = e^(step A) h + step x B^T, o = h C

    Args:
        inputs: [B, C, features], x [E], step [E], B [N] and C [N] side by side.
        state: [B, E, N].
        log_rates_EN: [E, N], A. At most 0.

    Returns:
        Outputs [B, C, E] and the new state.
    """
    channels, size = log_rates_EN.shape
    value, step, read_in, read_out = inputs.split([channels, channels, size, size], dim=-1)
    factors = (step[..., None] * log_rates_EN).exp()
    added = (step * value)[..., None] * read_in[:, :, None]
    outputs = []
    for token in range(inputs.shape[1]):
        state = added[:, token] if state is None else torch.addcmul(added[:, token], factors[:, token], state)
        outputs.append(state @ read_out[:, token, :, None])
    assert state is not None, "a chunk has tokens"
    return torch.cat(outputs, dim=-1).mT, state


def _by_head(product: Tensor, shared: int) -> Tensor:
    """[B, K, C, R * D] -> [B, K, R, C, D]"""
    return product.unflatten(-1, (shared, -1)).transpose(2, 3)


def _per_column(scalars: Tensor, state: Tensor) -> Tensor:
    """[B, K, R] -> [B, K, 1, R * D], the scalar of each column of the state."""
    return scalars.repeat_interleave(state.shape[-1] // scalars.shape[-1], dim=-1)[:, :, None]


@dataclass(frozen=True)
class _Stage:
    """Sequences that are computed side by side, the longest first: those with another chunk are the first rows."""

    order: list[int]
    """Sequence of each row."""
    chunks: list[Tensor]
    """Per chunk of the longest sequence: tokens [rows, C] of the rows that have one. T is padding."""


class GroupScan:
    """Places of one packed row in convolutions and recurrences. Built once, used by every layer."""

    def __init__(self, layout: PackedLayout, window: int):
        """
        Args:
            layout: layout of the row.
            window: tokens that the convolution sees, the newest included.
        """
        self.layout, self.history = layout, window - 1
        self.here = [index for index in range(len(layout.spans)) if index not in layout.elsewhere]
        """Spans whose prompt is in the row."""
        prompts: list[range] = []
        completions: list[range] = []
        self.owners: list[int] = []
        """Span of each completion."""
        first = 0
        for index, span in enumerate(layout.spans):
            if index not in layout.elsewhere:
                prompts.append(range(first, first + span.prompt_length))
                first += span.prompt_length
            for length in span.completion_lengths:
                completions.append(range(first, first + length))
                self.owners.append(index)
                first += length
        zero = first  # index of a row of zeros, which follows the tokens. The ends of all prompts follow it
        ends = [[token if token >= prompt.start else zero for token in self._end(prompt)] for prompt in prompts]
        self.ends = self._index([token for end in ends for token in end])
        self.wide, self.narrow = self._convolution(prompts, completions, zero)
        places: list[int] = []
        """Token at each place of the chunks' outputs."""
        self.stages = (self._stage(prompts, zero, places), self._stage(completions, zero, places))
        back = [0] * zero
        for place, token in enumerate(places):
            if token < zero:
                back[token] = place
        self.back = self._index(back)

    def convolve(self, channels_TE: Tensor, weight_EW: Tensor, bias: Tensor | None, ends: list[Tensor]) -> Tensor:
        """Apply a causal depthwise convolution to each sequence, [T, E]. Completions see the end of their prompt.

        Args:
            channels_TE: inputs.
            weight_EW: weights of the window, the newest token last.
            bias: [E].
            ends: last inputs [1, window - 1, E] of each span's prompt (`prompt_ends`).
        """
        zero = channels_TE.new_zeros(1, channels_TE.shape[1])
        wide = torch.cat([channels_TE, zero, *(end[0] for end in ends)]).index_select(0, self.wide)
        convolved = F.conv1d(wide.T[None], weight_EW[:, None], bias, groups=len(weight_EW))[0].T
        return convolved.index_select(0, self.narrow)

    def prompt_ends(self, channels_TE: Tensor) -> list[Tensor]:
        """Return the last inputs of the convolution, [1, window - 1, E], of each prompt in the row."""
        if not self.here:
            return []
        zero = channels_TE.new_zeros(1, channels_TE.shape[1])
        ends = torch.cat([channels_TE, zero]).index_select(0, self.ends)
        return list(ends.view(len(self.here), 1, self.history, -1).unbind(0))

    def prompts(self, inputs: Tensor, advance: Advance) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the recurrence of the prompts in the row.

        Args:
            inputs: [T, features].
            advance: computes a chunk.

        Returns:
            Outputs of the chunks, for `gather`, and the final state [1, ...] of each prompt.
        """
        outputs, states = self._run(self.stages[0], inputs, None, advance)
        return outputs, list(states.split(1)) if self.here else []

    def completions(self, inputs: Tensor, states: list[Tensor], advance: Advance) -> list[Tensor]:
        """Compute the recurrence of the completions from the `states` of all spans' prompts."""
        stage = self.stages[1]
        if not stage.order:
            return []
        owners = self._index([self.owners[sequence] for sequence in stage.order])
        return self._run(stage, inputs, torch.cat(states).index_select(0, owners), advance)[0]

    def gather(self, outputs: list[Tensor]) -> Tensor:
        """Return the outputs [T, width] of the chunks of `prompts` and `completions`, in the order of the row."""
        return torch.cat([output.flatten(0, 1) for output in outputs]).index_select(0, self.back)

    def _run(
        self, stage: _Stage, inputs: Tensor, state: Tensor | None, advance: Advance
    ) -> tuple[list[Tensor], Tensor]:
        padded = torch.cat([inputs, inputs.new_zeros(1, inputs.shape[1])])
        outputs: list[Tensor] = []
        ended: list[Tensor] = []
        for chunk in stage.chunks:
            if state is not None and len(chunk) < len(state):
                ended.append(state[len(chunk) :])
                state = state[: len(chunk)]
            output, state = advance(padded.index_select(0, chunk.flatten()).view(*chunk.shape, -1), state)
            outputs.append(output)
        if state is None:
            return [], inputs.new_zeros(0)
        states = torch.cat([state, *reversed(ended)])
        back = sorted(range(len(stage.order)), key=stage.order.__getitem__)
        return outputs, states.index_select(0, self._index(back))

    def _end(self, sequence: range) -> range:
        return range(sequence.stop - self.history, sequence.stop)

    def _convolution(self, prompts: list[range], completions: list[range], zero: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of all sequences, each behind its history, and the place of each token's window in them."""
        wide: list[int] = []
        windows = [0] * zero
        for number, sequence in enumerate([*prompts, *completions]):
            owner = None if number < len(prompts) else self.owners[number - len(prompts)]
            if owner is None:
                history = [zero] * self.history
            else:
                start = zero + 1 + owner * self.history
                history = list(range(start, start + self.history))
            for place, token in enumerate(sequence, len(wide)):
                windows[token] = place
            wide += [*history, *sequence]
        return self._index(wide), self._index(windows)

    def _stage(self, sequences: list[range], padding: int, places: list[int]) -> _Stage:
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        chunks = []
        for start in range(0, len(sequences[order[0]]) if order else 0, CHUNK):
            rows = [sequences[index][start : start + CHUNK] for index in order if len(sequences[index]) > start]
            padded = [[*row, *[padding] * (len(rows[0]) - len(row))] for row in rows]
            places += [token for row in padded for token in row]
            chunks.append(self._index(padded))
        return _Stage(order, chunks)

    def _index(self, values: list[int] | list[list[int]]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.long), self.layout.device)

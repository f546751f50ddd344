"""The native engine: our own decode loop. Each unique prompt is prefilled once, and no row waits for a slower one.

    queue of samples -> a free slot (the prompt's keys and values are copied in) -> one token per step
                     -> finished: the slot goes to the next sample, or the last row moves into the hole

The KV cache is allocated once per call: slots x (longest prompt + max_completion_length) positions per layer, so memory is
known before decoding starts.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.attention import SlotLayout
from grpo.errors import ConfigError
from grpo.rollout import device_of, end_token_ids, register_engine
from grpo.sampling import counted_uniform, draw_tokens, stream_key
from grpo.types import Completion, Group, Prompt, SamplingPlan

PREFILL_TOKENS = 8192
"""Prompt tokens that are prefilled together."""


class SlotCache:
    """Keys and values of the slots. Stands in for a transformers Cache: the attention layers only call `update`.

    While `prefilling`, it collects a batch of prompts. While decoding, `update` writes each row's new key and value at
    that row's own position, and returns the part of the cache that the longest row has reached.
    """

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.prompt: list[tuple[Tensor, Tensor]] = []
        self.prefilling = False
        self.rows = torch.empty(0, dtype=torch.long)
        self.positions = torch.empty(0, dtype=torch.long)
        self.longest = 0

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """key, value [B, K, T, D] -> the keys and values to attend to, [B, K, L, D]."""
        if self.prefilling:
            self.prompt.append((key, value))
            if layer == len(self.keys):
                shape = (self.slots, key.shape[1], self.length, key.shape[3])
                self.keys.append(key.new_zeros(shape))
                self.values.append(value.new_zeros(shape))
            return key, value
        keys, values = self.keys[layer], self.values[layer]
        keys[self.rows, :, self.positions] = key[:, :, 0]
        values[self.rows, :, self.positions] = value[:, :, 0]
        active = len(self.rows)
        return keys[:active, :, : self.longest], values[:active, :, : self.longest]

    def get_seq_length(self, *_: object) -> int:
        return 0  # positions are always given explicitly

    def admit(self, slots: list[int], source: list[int], prompt_length: int) -> None:
        """Copy the keys and values of prefilled prompts `source` into `slots`."""
        into, out_of = torch.tensor(slots), torch.tensor(source)
        for layer, (key, value) in enumerate(self.prompt):
            self.keys[layer][into, :, :prompt_length] = key[out_of, :, :prompt_length]
            self.values[layer][into, :, :prompt_length] = value[out_of, :, :prompt_length]

    def move(self, target: list[int], source: list[int], used: int) -> None:
        """Copy rows `source` over rows `target`, the first `used` positions."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :used] = tensor[source, :, :used]


@dataclass
class _Row:
    """What the host knows of one slot."""

    prompt: int
    sample: int
    key: int
    cached: int
    tokens: list[int]
    logprobs: list[float]


@dataclass
class _Prefilled:
    """One prompt, ready to be sampled from: keys and values per layer, and the logits of its first completion token."""

    keys: list[tuple[Tensor, Tensor]]
    logits_V: Tensor
    waiting: int


@register_engine("native")
class NativeEngine:
    """Decodes at most `slots` completions at a time on the live weights of `model`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, slots: int, swapped: bool):
        if not swapped:
            raise ConfigError(
                f"rollout.engine native cannot run {type(model).__name__}, whose attention cannot be swapped exactly: "
                f"set rollout.engine to transformers"
            )
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.end_ids = set(end_token_ids(model, tokenizer))

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], plan: SamplingPlan) -> list[Group]:
        """See RolloutEngine."""
        waiting = deque((p, s) for p in range(len(prompts)) for s in range(plan.num_generations))
        if not waiting:
            return []
        longest_prompt = max(len(prompt.token_ids) for prompt in prompts)
        cache = SlotCache(min(self.slots, len(waiting)), longest_prompt + plan.max_completion_length)
        done: dict[tuple[int, int], Completion] = {}
        prefilled: dict[int, _Prefilled] = {}
        rows: list[_Row] = []
        while waiting or rows:
            while waiting and len(rows) < cache.slots:
                rows += self._admit(prompts, plan, cache, waiting, prefilled, len(rows))
                self._retire(rows, cache, plan, done)
            if rows:
                self._decode(rows, cache, plan)
                self._retire(rows, cache, plan, done)
        return [Group(p, [done[i, s] for s in range(plan.num_generations)]) for i, p in enumerate(prompts)]

    def _prefill(
        self, prompts: list[Prompt], wanted: list[int], samples: int, cache: SlotCache
    ) -> dict[int, _Prefilled]:
        """One causal pass over right-padded prompts: no real token looks at the padding behind it."""
        device = device_of(self.model)
        width = max(len(prompts[index].token_ids) for index in wanted)
        ids = torch.tensor([[*prompts[i].token_ids, *[0] * (width - len(prompts[i].token_ids))] for i in wanted])
        positions = torch.arange(width).expand(len(wanted), width)
        cache.prefilling, cache.prompt = True, []
        hidden = self._backbone(ids.to(device), positions.to(device), cache, None)
        last = torch.tensor([len(prompts[index].token_ids) - 1 for index in wanted], device=device)
        logits = self._head(hidden[torch.arange(len(wanted), device=device), last])
        cache.prefilling = False
        return {
            index: _Prefilled([(k[row : row + 1], v[row : row + 1]) for k, v in cache.prompt], logits[row], samples)
            for row, index in enumerate(wanted)
        }

    def _admit(
        self,
        prompts: list[Prompt],
        plan: SamplingPlan,
        cache: SlotCache,
        waiting: deque[tuple[int, int]],
        prefilled: dict[int, _Prefilled],
        taken: int,
    ) -> list[_Row]:
        """Give free slots to waiting samples and draw their first token."""
        chosen: list[tuple[int, int]] = [waiting.popleft() for _ in range(min(len(waiting), cache.slots - taken))]
        missing = [index for index in dict.fromkeys(prompt for prompt, _ in chosen) if index not in prefilled]
        while missing:
            tokens = 0
            batch: list[int] = []
            while missing and (not batch or tokens + len(prompts[missing[0]].token_ids) <= PREFILL_TOKENS):
                tokens += len(prompts[missing[0]].token_ids)
                batch.append(missing.pop(0))
            prefilled.update(self._prefill(prompts, batch, plan.num_generations, cache))
        rows = []
        logits = torch.stack([prefilled[prompt].logits_V for prompt, _ in chosen])
        row_keys = [stream_key(plan.seed, prompts[prompt].draw, sample) for prompt, sample in chosen]
        keys = torch.tensor(row_keys, device=logits.device)
        tokens_B, logprobs_B = draw_tokens(logits, counted_uniform(keys, torch.zeros_like(keys)), plan.temperature)
        for offset, ((prompt, sample), token, logprob) in enumerate(
            zip(chosen, tokens_B.tolist(), logprobs_B.tolist(), strict=True)
        ):
            length = len(prompts[prompt].token_ids)
            cache.prompt = prefilled[prompt].keys
            cache.admit([taken + offset], [0], length)
            rows.append(_Row(prompt, sample, row_keys[offset], length, [token], [logprob]))
            prefilled[prompt].waiting -= 1
            if not prefilled[prompt].waiting:
                del prefilled[prompt]  # all its samples have a slot: give the memory back
        return rows

    def _decode(self, rows: list[_Row], cache: SlotCache, plan: SamplingPlan) -> None:
        """One token for every row."""
        device = device_of(self.model)
        last = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
        cached = torch.tensor([row.cached for row in rows], device=device)
        keys = torch.tensor([row.key for row in rows], device=device)
        drawn = torch.tensor([len(row.tokens) for row in rows], device=device)
        cache.rows, cache.positions = torch.arange(len(rows), device=device), cached
        cache.longest = max(row.cached for row in rows) + 1
        hidden = self._backbone(last, cached[:, None], cache, SlotLayout(cached + 1, cache.longest))
        tokens_B, logprobs_B = draw_tokens(self._head(hidden[:, 0]), counted_uniform(keys, drawn), plan.temperature)
        for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            row.cached += 1
            row.tokens.append(token)
            row.logprobs.append(logprob)

    def _retire(
        self, rows: list[_Row], cache: SlotCache, plan: SamplingPlan, done: dict[tuple[int, int], Completion]
    ) -> None:
        """Take finished rows out; rows from the end move into the holes, so that active rows are always the first."""
        finished = [
            index
            for index, row in enumerate(rows)
            if row.tokens[-1] in self.end_ids or len(row.tokens) >= plan.max_completion_length
        ]
        if not finished:
            return
        for index in finished:
            row = rows[index]
            text = str(self.tokenizer.decode(row.tokens, skip_special_tokens=True))
            ended = row.tokens[-1] in self.end_ids
            done[row.prompt, row.sample] = Completion(row.tokens, row.logprobs, ended, text)
        left = len(rows) - len(finished)
        holes = [index for index in finished if index < left]
        movers = sorted(set(range(left, len(rows))) - set(finished))
        if holes:
            cache.move(holes, movers, max(rows[index].cached for index in movers))
            for hole, mover in zip(holes, movers, strict=True):
                rows[hole] = rows[mover]
        del rows[left:]

    def _backbone(self, ids: Tensor, positions: Tensor, cache: SlotCache, layout: SlotLayout | None) -> Tensor:
        return self.model.base_model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, layout=layout
        ).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)

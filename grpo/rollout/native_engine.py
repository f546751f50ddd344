"""Native engine: a decode loop in which each unique prompt is prefilled once, and no row waits for a slower one.

    queue of samples -> a free slot (the prompt's keys and values are copied in) -> one token per step
                     -> finished: the last row moves into the hole, and the next sample takes the free slot

What a step needs lives in tensors on the device (`_State`); the host looks at it once every `check_every` steps, so on CUDA
no token waits for the host. The KV cache is allocated once per call: slots x (longest prompt + max_completion_length)
positions per layer, with as many slots as the memory for it allows, so what is needed is known before decoding starts.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.errors import ConfigError
from grpo.kernels.cuda.graphs import StepGraphs
from grpo.kernels.decode import schedule_for
from grpo.kernels.kv_cache import SlotCache
from grpo.kernels.sampling import draw_tokens
from grpo.rollout.backbones import choose_backbone
from grpo.rollout.engine import RolloutEngine, device_of, end_token_ids, register_engine
from grpo.rollout.sampling import counted_uniform, stream_key
from grpo.runtime.device import free_memory, return_freed_memory
from grpo.types import Completion, Group, Prompt, SamplingPlan

PREFILL_TOKENS = 8192
"""Prompt tokens that are prefilled together."""
BUCKET = 128
"""Where steps are captured, cache lengths are rounded up to multiples of this, and rows to powers of two: one graph for each."""


@dataclass
class _Row:
    """One slot, as the host sees it."""

    prompt: int
    sample: int
    cached: int
    """Positions in the cache."""
    drawn: int = 1
    """Tokens drawn on the device, those after the end token included."""
    ended: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _State:
    """All slots, as tensors on the device."""

    def __init__(self, slots: int, window: int, draws: int, device: torch.device):
        self.tokens = torch.zeros(slots, dtype=torch.long, device=device)
        """The newest token of each row: drawn, but not yet in the cache."""
        self.positions = torch.zeros_like(self.tokens)
        """Where that token goes."""
        self.uniforms = torch.zeros(slots, draws + window, dtype=torch.float64, device=device)
        """The random numbers of each row, for all that it may draw: they depend on its key and the position alone."""
        self.drawn = torch.zeros_like(self.tokens)
        """Tokens drawn so far: the position in the row's random stream."""
        self.draws = draws
        self.logprobs = torch.zeros(slots, device=device)
        """Of the newest token."""
        self.new_tokens = torch.zeros(window, slots, dtype=torch.long, device=device)
        self.new_logprobs = torch.zeros(window, slots, device=device)

    def move(self, targets: list[int], sources: list[int]) -> None:
        for tensor in (self.tokens, self.positions, self.uniforms, self.drawn):
            tensor[targets] = tensor[sources]


@dataclass
class _Prefilled:
    """One prompt, ready to be sampled from: keys and values per layer, and the logits of its first completion token."""

    prompt: list[tuple[Tensor, Tensor]]
    logits_V: Tensor
    waiting: int


class _Done:
    """Finished completions, and groups, which are handed out as soon as they are complete."""

    def __init__(self, prompts: list[Prompt], samples: int, finished: Callable[[Group], None] | None):
        self.prompts, self.samples, self.finished = prompts, samples, finished
        self.groups: dict[int, Group] = {}
        self._completions: dict[int, dict[int, Completion]] = {}

    def add(self, prompt: int, sample: int, completion: Completion) -> None:
        found = self._completions.setdefault(prompt, {})
        found[sample] = completion
        if len(found) == self.samples:
            group = Group(self.prompts[prompt], [found[s] for s in range(self.samples)])
            self.groups[prompt] = group
            del self._completions[prompt]
            if self.finished is not None:
                self.finished(group)


@register_engine("native")
class NativeEngine(RolloutEngine):
    """Decodes at most `slots` completions at a time with the weights that `model` has when `generate` is called."""

    needs_packed_attention = True
    bounds_cache = True
    repacks_weights = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int,
        uses_packed_attention: bool,
        cache_gib: float | None = None,
    ):
        if not uses_packed_attention:
            raise ConfigError(
                f"rollout.engine native cannot run {type(model).__name__}, whose attention cannot be swapped exactly: "
                f"set rollout.engine to transformers"
            )
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.end_ids = set(end_token_ids(model, tokenizer))
        self.cache_gib = cache_gib
        self.backbone, self.position_numbers = choose_backbone(model)
        self.schedule, self.graphs = schedule_for(device_of(model)), StepGraphs()
        self._kept: tuple[SlotCache, _State] | None = None

    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], plan: SamplingPlan, finished: Callable[[Group], None] | None = None
    ) -> list[Group]:
        """See RolloutEngine."""
        waiting = deque((p, s) for p in range(len(prompts)) for s in range(plan.num_generations))
        if not waiting:
            return []
        self.backbone.refresh()
        longest_prompt = max(len(prompt.token_ids) for prompt in prompts)
        cache, state = self._memory(len(waiting), longest_prompt, plan.max_completion_length)
        done = _Done(prompts, plan.num_generations, finished)
        prefilled: dict[int, _Prefilled] = {}
        rows: list[_Row] = []
        while waiting or rows:
            while waiting and len(rows) < cache.slots:
                fresh = self._admit(prompts, plan, cache, state, waiting, prefilled, len(rows))
                self._collect(fresh, state.tokens[len(rows) :][None], state.new_logprobs[:1, len(rows) :], plan)
                rows += fresh
                self._retire(rows, cache, state, plan, done)
            if rows:
                steps = self._decode(rows, cache, state, plan)
                self._collect(rows, state.new_tokens[:steps], state.new_logprobs[:steps], plan)
                self._retire(rows, cache, state, plan, done)
        self.backbone.release()
        del cache, state, prefilled
        return_freed_memory(device_of(self.model))
        return [done.groups[index] for index in range(len(prompts))]

    def _memory(self, completions: int, prompt: int, draws: int) -> tuple[SlotCache, _State]:
        """The slots of this call. Where graphs are captured they are kept, since the graphs point at them."""
        device = device_of(self.model)
        window, dtype = self.schedule.check_every, self.backbone.cache_dtype
        if not self.schedule.captures_graphs:
            length = prompt + draws
            slots = self.slots_that_fit(completions, length, free_memory(device))
            return SlotCache(slots, length, dtype), _State(slots, window, draws, device)
        cache, state = self._kept or (SlotCache(0, 0, dtype), None)
        length = max(cache.length, -(-(prompt + draws + window) // BUCKET) * BUCKET)
        slots = self.slots_that_fit(completions, length, free_memory(device) + cache.bytes)
        # What is free moves a little from call to call: new graphs are only worth it for twice the slots.
        enough = cache.slots >= min(self.slots, completions) or 2 * cache.slots > slots
        fits = enough and length == cache.length and dtype == cache.dtype
        if state is not None and fits and draws <= state.draws:
            return cache, state
        draws = max(draws, state.draws if state is not None else 0)
        self.graphs.clear()
        del cache, state
        self._kept = None  # the memory of the last one is free before the next one takes its own
        if self.slots_that_fit(_power_of_two(slots), length, free_memory(device)) == _power_of_two(slots):
            slots = _power_of_two(slots)
        self._kept = (SlotCache(slots, length, dtype), _State(slots, window, draws, device))
        return self._kept

    def slots_that_fit(self, completions: int, length: int, free: int) -> int:
        """How many completions of `length` positions are decoded at a time, with `free` bytes of memory. Raises ConfigError
        if not even one fits."""
        each = self.position_numbers * length * self.backbone.cache_dtype.itemsize
        budget = free // 2 if self.cache_gib is None else int(self.cache_gib * 2**30)
        if budget < each:
            chosen = "half of what is free" if self.cache_gib is None else f"rollout.cache_gib {self.cache_gib:g}"
            raise ConfigError(
                f"the keys and values of one completion need {each / 2**30:.3g} GiB ({length} positions: the longest prompt and "
                f"sampling.max_completion_length), but {chosen} is {budget / 2**30:.3g} GiB: raise rollout.cache_gib, or lower "
                f"sampling.max_completion_length or data.max_prompt_length"
            )
        return min(self.slots, completions, budget // each)

    def _prefill(
        self, prompts: list[Prompt], wanted: list[int], samples: int, cache: SlotCache
    ) -> dict[int, _Prefilled]:
        """One causal pass over right-padded prompts: no real token looks at the padding behind it."""
        device = device_of(self.model)
        lengths = [len(prompts[index].token_ids) for index in wanted]
        ids = torch.tensor(
            [[*prompts[i].token_ids, *[0] * (max(lengths) - length)] for i, length in zip(wanted, lengths, strict=True)]
        )
        hidden = self.backbone.prefill(ids.to(device), cache)
        last = torch.tensor(lengths, device=device) - 1
        logits = self.backbone.logits(hidden[torch.arange(len(wanted), device=device), last])
        return {
            index: _Prefilled([(k[row, :, :length], v[row, :, :length]) for k, v in cache.prompt], logits[row], samples)
            for row, (index, length) in enumerate(zip(wanted, lengths, strict=True))
        }

    def _admit(
        self,
        prompts: list[Prompt],
        plan: SamplingPlan,
        cache: SlotCache,
        state: _State,
        waiting: deque[tuple[int, int]],
        prefilled: dict[int, _Prefilled],
        taken: int,
    ) -> list[_Row]:
        """Give free slots to waiting samples and draw their first token."""
        chosen: list[tuple[int, int]] = [waiting.popleft() for _ in range(min(len(waiting), cache.slots - taken))]
        missing = [index for index in dict.fromkeys(prompt for prompt, _ in chosen) if index not in prefilled]
        while missing:
            batch: list[int] = []
            width = 0
            while missing and (
                not batch or max(width, len(prompts[missing[0]].token_ids)) * (len(batch) + 1) <= PREFILL_TOKENS
            ):
                width = max(width, len(prompts[missing[0]].token_ids))
                batch.append(missing.pop(0))
            prefilled.update(self._prefill(prompts, batch, plan.num_generations, cache))
        rows = [_Row(prompt, sample, len(prompts[prompt].token_ids)) for prompt, sample in chosen]
        new = slice(taken, taken + len(rows))
        device = state.tokens.device
        keys = torch.tensor([stream_key(plan.seed, prompts[prompt].draw, s) for prompt, s in chosen], device=device)
        state.uniforms[new] = counted_uniform(keys[:, None], torch.arange(state.uniforms.shape[1], device=device))
        state.positions[new] = torch.tensor([row.cached for row in rows], device=device)
        state.drawn[new] = 1
        logits = torch.stack([prefilled[row.prompt].logits_V for row in rows])
        state.tokens[new], state.new_logprobs[0, new] = draw_tokens(logits, state.uniforms[new, 0], plan.temperature)
        slot = taken
        for prompt in dict.fromkeys(row.prompt for row in rows):
            samples = sum(row.prompt == prompt for row in rows)
            cache.admit(slot, prefilled[prompt].prompt, samples)
            slot += samples
            prefilled[prompt].waiting -= samples
            if not prefilled[prompt].waiting:
                del prefilled[prompt]  # all its samples have a slot: give the memory back
        cache.prompt = []
        return rows

    def _decode(self, rows: list[_Row], cache: SlotCache, state: _State, plan: SamplingPlan) -> int:
        """A few tokens for every row, without a look at them. -> how many each."""
        steps = min(self.schedule.check_every, max(plan.max_completion_length - row.drawn for row in rows))
        active, longest = len(rows), max(row.cached for row in rows) + 1
        for step in range(steps):
            if self.schedule.captures_graphs:
                self._captured_step(active, longest + step, cache, state, plan.temperature)
            else:
                running = min(self.backbone.padded_rows(active), cache.slots)
                self._step(running, longest + step, cache, state, plan.temperature)
            state.new_tokens[step], state.new_logprobs[step] = state.tokens, state.logprobs
        for row in rows:
            row.cached += steps
            row.drawn += steps
        return steps

    def _step(self, active: int, longest: int, cache: SlotCache, state: _State, temperature: float) -> None:
        """One token for each of the first `active` rows: only device work, and the same shapes for the same arguments."""
        positions, drawn = state.positions[:active], state.drawn[:active]
        cache.aim(positions, longest)
        hidden = self.backbone.step(state.tokens[:active], positions, cache)
        uniform = state.uniforms[:active].gather(1, drawn[:, None]).squeeze(1)
        state.tokens[:active], state.logprobs[:active] = draw_tokens(self.backbone.logits(hidden), uniform, temperature)
        # A finished row that goes on, for a few tokens or because its bucket does, stays inside its slot.
        positions.add_(1).clamp_(max=cache.length - 1)
        drawn.add_(1).clamp_(max=state.uniforms.shape[1] - 1)

    def _captured_step(self, active: int, longest: int, cache: SlotCache, state: _State, temperature: float) -> None:
        """_step, replayed from a CUDA graph of its bucket: some rows and positions more, but one launch."""
        active = min(_power_of_two(active), cache.slots)
        longest = min(-(-longest // BUCKET) * BUCKET, cache.length)
        self.graphs.run(
            (active, longest, temperature),
            lambda: self._step(active, longest, cache, state, temperature),
            (state.tokens, state.positions, state.drawn),
        )

    def _collect(self, rows: list[_Row], tokens: Tensor, logprobs: Tensor, plan: SamplingPlan) -> None:
        """Append what was drawn, [steps, slots] each, up to each row's end."""
        drawn = zip(rows, tokens[:, : len(rows)].T.tolist(), logprobs[:, : len(rows)].T.tolist(), strict=True)
        for row, new_tokens, new_logprobs in drawn:
            room = plan.max_completion_length - len(row.tokens)
            end = self.end_of(row, new_tokens)
            count = min(len(new_tokens) if end is None else end + 1, room)
            row.ended = end is not None and end < room
            row.tokens += new_tokens[:count]
            row.logprobs += new_logprobs[:count]

    def end_of(self, row: _Row, new_tokens: list[int]) -> int | None:
        """Which of the tokens that were just drawn ends the row's completion; None if none does."""
        return next((index for index, token in enumerate(new_tokens) if token in self.end_ids), None)

    def _retire(
        self,
        rows: list[_Row],
        cache: SlotCache,
        state: _State,
        plan: SamplingPlan,
        done: "_Done",
    ) -> None:
        """Take finished rows out; rows from the end move into the holes, so that active rows are always the first."""
        finished = [
            index for index, row in enumerate(rows) if row.ended or len(row.tokens) >= plan.max_completion_length
        ]
        if not finished:
            return
        for index in finished:
            row = rows[index]
            text = str(self.tokenizer.decode(row.tokens, skip_special_tokens=True))
            done.add(row.prompt, row.sample, Completion(row.tokens, row.logprobs, row.ended, text))
        left = len(rows) - len(finished)
        holes = [index for index in finished if index < left]
        movers = sorted(set(range(left, len(rows))) - set(finished))
        if holes:
            cache.move(holes, movers, max(rows[index].cached for index in movers))
            state.move(holes, movers)
            for hole, mover in zip(holes, movers, strict=True):
                rows[hole] = rows[mover]
        del rows[left:]


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()

"""Native engine: a decode loop that prefills each unique prompt once and replaces finished rows at once.

    queue of samples -> a free slot (the prompt's keys and values are copied in) -> one token per step
                     -> finished: the last row moves into the hole, and the next sample takes the free slot

The state of the decode loop is in tensors on the device (`_State`). The host reads it once every `check_every` steps,
so that on CUDA the device does not wait for the host at each token. The KV cache is allocated once per call: slots x
(longest prompt + max_completion_length) positions per layer, with as many slots as the memory for it allows. The
memory needed is therefore known before decoding starts.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.errors import ConfigError, is_out_of_memory
from grpo.kernels.cuda.graphs import StepGraphs
from grpo.kernels.decode import schedule_for
from grpo.kernels.kv_cache import SlotCache
from grpo.kernels.registry import is_on
from grpo.kernels.state_slots import States
from grpo.kernels.transfer import to_device
from grpo.models.architecture import vocabulary_size
from grpo.rollout.backbones import ModuleBackbone, choose_backbone
from grpo.rollout.dialogue import Dialogue
from grpo.rollout.engine import (
    RolloutEngine,
    completion_text,
    device_of,
    end_token_ids,
    hidden_token_ids,
    register_engine,
)
from grpo.rollout.sampling import counted_uniform, draw, stream_key
from grpo.runtime.device import empty_cache, free_memory, return_freed_memory
from grpo.types import Completion, Group, Prompt, SamplingPlan

log = logging.getLogger(__name__)

PREFILL_TOKENS = 8192
"""Maximum number of prompt tokens, padding included, in one prefill."""
TOKEN_BYTES = 144
"""Machine memory of a sampled token: id and logprob as Python numbers in lists (72 bytes), the id in two reward
processes (36 each)."""
TURN_STEPS = 8
"""Decode steps of the other rows while a row waits for what follows its turn. Only then is it waited for."""
FORCED_TOKENS = 64
"""More given tokens than this are computed with the whole context in one pass, fewer one in each decode step."""
BUCKET = 128
"""If steps are captured in CUDA graphs, cache lengths are rounded up to multiples of this, and rows to powers of
two. Each combination has one graph."""


@dataclass
class _Row:
    """State of one slot on the host."""

    prompt: int
    sample: int
    cached: int
    """Number of positions in the cache."""
    drawn: int = 1
    """Number of tokens sampled on the device, including those after the end token."""
    ended: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    dialogue: Dialogue | None = None
    """With several turns."""
    due: int = 0
    """Decode step at which a parked row goes on."""

    @property
    def pending(self) -> int:
        """Number of given tokens that are still to come."""
        given = self.dialogue.given if self.dialogue is not None else []
        return max(0, given[-1][1] - len(self.tokens)) if given else 0


class _State:
    """State of all slots, as tensors on the device."""

    def __init__(self, slots: int, window: int, draws: int, device: torch.device):
        self._integers = torch.zeros(3, slots, dtype=torch.long, device=device)
        self.tokens, self.positions, self.drawn = self._integers
        """Newest token of each row, sampled but not yet in the cache; its position; and the number of tokens sampled so
        far, which is the position in the row's random stream."""
        self.uniforms = torch.zeros(slots, draws + window, dtype=torch.float64, device=device)
        """Random numbers of each row for all its tokens. They depend only on its key and the position."""
        self.draws = draws
        self.logprobs = torch.zeros(slots, device=device)
        """Logprob of the newest token."""
        self.new_tokens = torch.zeros(window, slots, dtype=torch.long, device=device)
        """[window, slots] tokens of the last steps."""
        self.new_logprobs = torch.zeros(window, slots, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        """Steps since the host has read the tokens."""
        self.forced: Tensor | None = None
        """[slots, draws + window] given tokens by their index in the completion, -1 where tokens are sampled."""
        self.seen: Tensor | None = None
        """[slots, V] bool: tokens of the prompt and the completion so far, with a repetition_penalty."""

    def move(self, targets: Tensor, sources: Tensor) -> None:
        """Copy rows `sources` to rows `targets`."""
        more = [tensor for tensor in (self.seen, self.forced) if tensor is not None]
        for tensor in (self._integers.T, self.uniforms, *more):
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def record(self) -> None:
        """Keep the newest token of each row for the host."""
        self.new_tokens.index_copy_(0, self.step, self.tokens[None])
        self.new_logprobs.index_copy_(0, self.step, self.logprobs[None])
        self.step.add_(1)

    def read(self, steps: int, first: int, rows: int) -> tuple[list[list[int]], list[list[float]]]:
        """Return the tokens and logprobs of the last `steps` steps for `rows` rows from `first` on, row by row.

        The host waits for the device once.
        """
        recent = slice(first, first + rows)
        drawn = torch.stack([self.new_tokens[:steps, recent].double(), self.new_logprobs[:steps, recent].double()])
        tokens, logprobs = drawn.cpu().mT
        return tokens.long().tolist(), logprobs.tolist()


@dataclass
class _Prefilled:
    """A prefilled prompt: keys and values per layer, states of recurrent layers, logits of the first completion token,
    and number of samples that still need a slot.
    """

    prompt: list[tuple[Tensor, Tensor]]
    states: States
    logits_V: Tensor
    waiting: int


class _Done:
    """Finished completions. Each group is passed to `finished` as soon as it is complete."""

    def __init__(self, prompts: list[Prompt], samples: int, finished: Callable[[Group], None] | None):
        self.prompts, self.samples, self.finished = prompts, samples, finished
        self.groups: dict[int, Group] = {}
        self._completions: dict[int, dict[int, Completion]] = {}

    def drop_incomplete(self) -> None:
        """Drop the completions of groups that are not complete."""
        self._completions.clear()

    def add(self, prompt: int, sample: int, completion: Completion) -> None:
        """Add one completion."""
        found = self._completions.setdefault(prompt, {})
        found[sample] = completion
        if len(found) == self.samples:
            group = Group(self.prompts[prompt], [found[s] for s in range(self.samples)])
            self.groups[prompt] = group
            del self._completions[prompt]
            if self.finished is not None:
                self.finished(group)


@dataclass
class _Call:
    """One call of `generate`: its prompts, its memory, and the rows in it.

    Active rows have the first slots in the order of `rows`, parked rows the last ones, from the end.
    """

    prompts: list[Prompt]
    plan: SamplingPlan
    cache: SlotCache
    state: _State
    done: _Done
    waiting: deque[tuple[int, int]]
    """(prompt, sample) of the completions that have not begun."""
    prefilled: dict[int, _Prefilled] = field(default_factory=dict)
    rows: list[_Row] = field(default_factory=list)
    """Rows that take part in decode steps."""
    parked: list[_Row] = field(default_factory=list)
    """Rows that wait for what follows their turn."""
    clock: int = 0
    """Decode steps so far."""


@register_engine("native")
class NativeEngine(RolloutEngine):
    """Engine that decodes up to `slots` completions at a time, with the weights that `model` has when `generate` is
    called.
    """

    needs_packed_attention = True
    bounds_cache = True
    repacks_weights = True
    answers_turns = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int,
        uses_packed_attention: bool,
        cache_gib: float | None = None,
        step_completions: int | None = None,
        keep_turns: bool = True,
    ):
        if not uses_packed_attention:
            raise ConfigError(
                f"rollout.engine native cannot run {type(model).__name__}, whose attention cannot be swapped exactly: "
                f"set rollout.engine to transformers"
            )
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.end_ids = set(end_token_ids(model, tokenizer))
        self.hidden_ids = hidden_token_ids(self.end_ids, tokenizer)
        self.cache_gib, self.step_completions, self.keep_turns = cache_gib, step_completions, keep_turns
        self.backbone, self.position_numbers = choose_backbone(model)
        self.schedule, self.graphs = schedule_for(device_of(model)), StepGraphs()
        self._kept: tuple[SlotCache, _State] | None = None
        self.gives_up_memory = False
        """Keep nothing during updates: one had no memory."""
        self.used_slots = slots
        """Number of slots of the last call."""

    def description(self) -> str:
        cached = str(self.backbone.cache_dtype).removeprefix("torch.")
        by = "modules" if isinstance(self.backbone, ModuleBackbone) else "kernels"
        return f", decoding by {by}, KV cache in {cached}"

    def state_dict(self) -> dict[str, int]:
        return {"slots": self.slots} | ({"gives_up_memory": 1} if self.gives_up_memory else {})

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.slots = min(self.slots, state.get("slots", self.slots))
        self.gives_up_memory = bool(state.get("gives_up_memory", self.gives_up_memory))

    def give_up_memory(self) -> bool:
        if self._kept is None:
            return False
        log.info("out of memory in the update: the KV cache is freed before each update from now on (slower)")
        self.gives_up_memory = True
        self.free_memory()
        return True

    def free_memory(self) -> None:
        if self.gives_up_memory:
            self._drop_memory()

    def _drop_memory(self) -> None:
        """Free the cache, the graphs that read it, and the decoder's copy of the weights."""
        self.graphs.clear()
        self._kept = None
        self.backbone.release()
        empty_cache(device_of(self.model))

    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], plan: SamplingPlan, finished: Callable[[Group], None] | None = None
    ) -> list[Group]:
        """Sample completions with the live weights. See RolloutEngine.generate.

        If memory runs out, sampling is repeated with half as many slots, without the groups that are complete. Random
        numbers depend on the prompt, sample and position, so the completions are the same.
        """
        if not prompts or not plan.num_generations:
            return []
        self.prefilled_tokens = 0
        if self.turns is not None:
            prompts = self.turns.begin(prompts, plan.num_generations)
        done = _Done(prompts, plan.num_generations, finished)
        while (error := self._try_sampling(prompts, plan, done)) is not None:
            self._drop_memory()
            smaller = self.used_slots // 2
            if smaller < 1:
                raise error
            log.info("out of memory while sampling: rollout.slots is %d instead of %d", smaller, self.used_slots)
            self.slots = smaller
        if self._kept is None:  # otherwise graphs read the copy of the weights
            self.backbone.release()
        return_freed_memory(device_of(self.model))
        return [done.groups[index] for index in range(len(prompts))]

    def _try_sampling(self, prompts: list[Prompt], plan: SamplingPlan, done: _Done) -> BaseException | None:
        """Sample all groups that are not done. Return the error if memory runs out."""
        done.drop_incomplete()
        try:
            self._sample(prompts, plan, done)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return error.with_traceback(None)  # whose frames hold the memory
        return None

    def _sample(self, prompts: list[Prompt], plan: SamplingPlan, done: _Done) -> None:
        """Sample all groups that are not done."""
        waiting = deque(
            (p, s) for p in range(len(prompts)) if p not in done.groups for s in range(plan.num_generations)
        )
        self.schedule = schedule_for(device_of(self.model))
        self.used_slots = min(self.slots, len(waiting))
        self.backbone.refresh()
        longest_prompt = max(len(prompt.token_ids) for prompt in prompts)
        cache, state = self._memory(len(waiting), longest_prompt, plan.max_completion_length)
        self.used_slots = cache.slots
        state.seen = None
        if plan.repetition_penalty != 1:
            shape = (cache.slots, vocabulary_size(self.model))
            state.seen = torch.zeros(shape, dtype=torch.bool, device=state.tokens.device)
        if (self.turns is None) != (state.forced is None):
            self.graphs.clear()  # captured without given tokens, or with them
            state.forced = None if self.turns is None else torch.full_like(state.uniforms, -1, dtype=torch.long)
        call = _Call(prompts, plan, cache, state, done, waiting)
        rows, parked = call.rows, call.parked
        while waiting or rows or parked:
            if parked and not rows and (not waiting or len(parked) >= cache.slots):
                call.clock = max(call.clock, min(row.due for row in parked))
            self._resume(call)
            self._retire(call)
            while waiting and len(rows) + len(parked) < cache.slots:
                fresh = self._admit(call)
                self._collect(fresh, *state.read(1, len(rows), len(fresh)), plan)
                rows += fresh
                self._retire(call)
            if rows:
                steps = self._decode(call)
                call.clock += steps
                self._collect(rows, *state.read(steps, 0, len(rows)), plan)
                self._retire(call)

    def _memory(self, completions: int, prompt: int, draws: int) -> tuple[SlotCache, _State]:
        """Return the cache and state for one call.

        They are kept between calls if steps are captured, since the graphs refer to them.

        Args:
            completions: number of completions in the call.
            prompt: tokens of the longest prompt.
            draws: maximum tokens per completion.
        """
        device = device_of(self.model)
        window, dtype = self.schedule.check_every, self.backbone.cache_dtype
        if not self.schedule.captures_graphs:
            self._kept = None
            length = prompt + draws
            slots = self.slots_that_fit(completions, length, free_memory(device, completions * draws * TOKEN_BYTES))
            return SlotCache(slots, length, dtype), _State(slots, window, draws, device)
        cache, state = self._kept or (SlotCache(0, 0, dtype), None)
        if self.step_completions is not None:  # the cache stays: an evaluation does not make it larger
            completions = min(completions, self.step_completions)
        length = max(cache.length, -(-(prompt + draws + window) // BUCKET) * BUCKET)
        slots = self.slots_that_fit(completions, length, free_memory(device) + cache.bytes)
        # Free memory varies from call to call. New graphs are only worth their cost for twice the slots.
        enough = cache.slots >= min(self.slots, completions) or 2 * cache.slots > slots
        is_reusable = enough and length == cache.length and dtype == cache.dtype
        if state is not None and is_reusable and draws <= state.draws:
            return cache, state
        draws = max(draws, state.draws if state is not None else 0)
        self.graphs.clear()
        del cache, state
        self._kept = None  # free the old memory before allocating the new
        if self.slots_that_fit(_power_of_two(slots), length, free_memory(device)) == _power_of_two(slots):
            slots = _power_of_two(slots)
        self._kept = (SlotCache(slots, length, dtype), _State(slots, window, draws, device))
        return self._kept

    def slots_that_fit(self, completions: int, length: int, free: int) -> int:
        """Return the number of completions that can be decoded at a time.

        Args:
            completions: number of completions wanted.
            length: positions of each in the cache.
            free: free memory in bytes.

        Raises:
            ConfigError: not even one completion fits.
        """
        each = self.position_numbers * length * self.backbone.cache_dtype.itemsize
        each += self.backbone.state_numbers * torch.float32.itemsize
        budget = free // 2 if self.cache_gib is None else int(self.cache_gib * 2**30)
        if budget < each:
            chosen = "half of what is free" if self.cache_gib is None else f"rollout.cache_gib {self.cache_gib:g}"
            raise ConfigError(
                f"the keys and values of one completion need {each / 2**30:.3g} GiB ({length} positions: the longest "
                f"prompt and sampling.max_completion_length), but {chosen} is {budget / 2**30:.3g} GiB: raise "
                f"rollout.cache_gib, or lower sampling.max_completion_length or data.max_prompt_length"
            )
        return min(self.slots, completions, budget // each)

    def _prefill(
        self, prompts: list[Prompt], wanted: list[int], samples: int, cache: SlotCache
    ) -> dict[int, _Prefilled]:
        """Compute the prompts of the indices `wanted` in one causal pass, right-padded. Counted in prefilled_tokens.

        Padding has no effect, since no token attends to later ones.

        Returns:
            Prompt index -> prefilled prompt, with `samples` waiting samples each.
        """
        device = device_of(self.model)
        lengths = [len(prompts[index].token_ids) for index in wanted]
        self.prefilled_tokens += sum(lengths)
        ids = torch.tensor(
            [[*prompts[i].token_ids, *[0] * (max(lengths) - length)] for i, length in zip(wanted, lengths, strict=True)]
        )
        cache.prompt_lengths = lengths
        hidden = self.backbone.prefill(to_device(ids, device), cache)
        last = to_device(torch.tensor(lengths) - 1, device)
        logits = self.backbone.logits(hidden[torch.arange(len(wanted), device=device), last])
        return {
            index: _Prefilled(
                [(k[row, :, :length], v[row, :, :length]) for k, v in cache.prompt],
                cache.states.of_prompt(row),
                logits[row],
                samples,
            )
            for row, (index, length) in enumerate(zip(wanted, lengths, strict=True))
        }

    def _admit(self, call: _Call) -> list[_Row]:
        """Assign the free slots to waiting samples and sample their first tokens.

        Prompts that are not prefilled yet are prefilled first.

        Returns:
            The new rows, whose slots follow those of the active ones.
        """
        prompts, plan, cache, state, prefilled = call.prompts, call.plan, call.cache, call.state, call.prefilled
        taken = len(call.rows)
        free = cache.slots - taken - len(call.parked)
        chosen = [call.waiting.popleft() for _ in range(min(len(call.waiting), free))]
        missing = [index for index in dict.fromkeys(prompt for prompt, _ in chosen) if index not in prefilled]
        for batch in _prefill_batches(prompts, missing):
            prefilled.update(self._prefill(prompts, batch, plan.num_generations, cache))
        rows = [_Row(prompt, sample, len(prompts[prompt].token_ids)) for prompt, sample in chosen]
        new = slice(taken, taken + len(rows))
        device = state.tokens.device
        keys = torch.tensor([stream_key(plan.seed, prompts[prompt].draw, s) for prompt, s in chosen])
        keys, cached = to_device(torch.stack([keys, torch.tensor([row.cached for row in rows])]), device)
        state.uniforms[new] = counted_uniform(keys[:, None], torch.arange(state.uniforms.shape[1], device=device))
        state.positions[new] = cached
        state.drawn[new] = 1
        if state.forced is not None:
            state.forced[new] = -1
            for row in rows:
                of_row = (prompts[row.prompt], row.prompt, row.sample, plan.num_generations)
                row.dialogue = self.turns.dialogue(*of_row)
        logits = torch.stack([prefilled[row.prompt].logits_V for row in rows])
        seen = None
        if state.seen is not None:
            seen = state.seen[new]
            for own, row in zip(seen, rows, strict=True):
                own.zero_()[list(prompts[row.prompt].token_ids)] = True
        state.tokens[new], state.new_logprobs[0, new] = draw(logits, state.uniforms[new, 0], plan, seen)
        state.new_tokens[0, new] = state.tokens[new]
        slot = taken
        for prompt in dict.fromkeys(row.prompt for row in rows):
            samples = sum(row.prompt == prompt for row in rows)
            cache.admit(slot, prefilled[prompt].prompt, samples, prefilled[prompt].states)
            slot += samples
            prefilled[prompt].waiting -= samples
            if not prefilled[prompt].waiting:
                del prefilled[prompt]  # all its samples have a slot: free the memory
        cache.prompt, cache.states.prompts = [], {}
        return rows

    def _decode(self, call: _Call) -> int:
        """Sample tokens for every row without reading them on the host.

        Returns:
            The number of tokens sampled per row.
        """
        rows, plan, cache, state = call.rows, call.plan, call.cache, call.state
        steps = min(self.schedule.check_every, max(plan.max_completion_length - row.drawn for row in rows))
        active, longest = len(rows), max(row.cached for row in rows) + 1
        state.step.zero_()
        for step in range(steps):
            if self.schedule.captures_graphs and is_on("cuda_graphs") and not plan.is_restricted:
                self._captured_step(active, longest + step, cache, state, plan)
            else:
                running = min(self.backbone.padded_rows(active), cache.slots)
                self._step(running, min(longest + step, cache.length), cache, state, plan)
        for row in rows:
            row.cached += steps
            row.drawn += steps
        return steps

    def _step(self, active: int, longest: int, cache: SlotCache, state: _State, plan: SamplingPlan) -> None:
        """Sample one token for each of the first `active` rows.

        This launches only device work, with the same shapes for the same arguments, so that it can be captured.
        """
        positions, drawn = state.positions[:active], state.drawn[:active]
        cache.aim(positions, longest)
        hidden = self.backbone.step(state.tokens[:active], positions, cache)
        uniform = state.uniforms[:active].gather(1, drawn[:, None]).squeeze(1)
        seen = None if state.seen is None else state.seen[:active]
        state.tokens[:active], state.logprobs[:active] = draw(self.backbone.logits(hidden), uniform, plan, seen)
        if state.forced is not None:
            forced = state.forced[:active].gather(1, drawn[:, None]).squeeze(1)
            state.tokens[:active] = torch.where(forced < 0, state.tokens[:active], forced)
        # Finished rows go on until the host reads the tokens, or as a part of their bucket. They stay in their slot.
        positions.add_(1).clamp_(max=cache.length - 1)
        drawn.add_(1).clamp_(max=state.uniforms.shape[1] - 1)
        state.record()

    def _captured_step(self, active: int, longest: int, cache: SlotCache, state: _State, plan: SamplingPlan) -> None:
        """Run `_step` from the CUDA graph of its bucket.

        This computes some extra rows and positions, but needs only one launch.
        """
        active = min(_power_of_two(active), cache.slots)
        longest = min(-(-longest // BUCKET) * BUCKET, cache.length)
        self.graphs.run(
            (active, longest, plan.temperature),
            lambda: self._step(active, longest, cache, state, plan),
            (state.tokens, state.positions, state.drawn, state.step, *cache.states.tensors()),
            (state.logprobs, state.new_tokens, state.new_logprobs),
        )

    def _collect(
        self, rows: list[_Row], tokens: list[list[int]], logprobs: list[list[float]], plan: SamplingPlan
    ) -> None:
        """Append the sampled tokens and logprobs of each row, up to the completion's end."""
        for row, new_tokens, new_logprobs in zip(rows, tokens, logprobs, strict=True):
            if row.pending:
                given = min(row.pending, len(new_tokens))
                row.tokens += new_tokens[:given]
                row.logprobs += [0.0] * given
                del new_tokens[:given], new_logprobs[:given]
            remaining = plan.max_completion_length - len(row.tokens)
            end = self.end_of(row, new_tokens)
            count = min(len(new_tokens) if end is None else end + 1, remaining)
            row.ended = end is not None and end < remaining
            row.tokens += new_tokens[:count]
            row.logprobs += new_logprobs[:count]

    def end_of(self, row: _Row, new_tokens: list[int]) -> int | None:
        """Return the index of the first new token that ends the completion of `row`. None if none does."""
        return next((index for index, token in enumerate(new_tokens) if token in self.end_ids), None)

    def _retire(self, call: _Call) -> None:
        """Remove finished rows and add their completions to `done`. Rows whose turn has ended are parked.

        Rows from the end move into the holes, so that active rows stay contiguous. Parked rows keep the last slots.
        """
        rows, parked, cache = call.rows, call.parked, call.cache
        longest = call.plan.max_completion_length
        finished = [index for index, row in enumerate(rows) if row.ended or len(row.tokens) >= longest]
        if not finished:
            return
        moves: list[tuple[int, int, _Row]] = []
        for index in finished:
            row = rows[index]
            if row.dialogue is not None and row.dialogue.end_turn(row.tokens, row.ended):
                moves.append((cache.slots - 1 - len(parked), index, row))
                row.due = call.clock + TURN_STEPS
                row.cached -= row.drawn - len(row.tokens)  # without what was sampled after the end
                row.drawn = len(row.tokens)
                parked.append(row)
            else:
                self._complete(row, call.done)
        left = len(rows) - len(finished)
        holes = [index for index in finished if index < left]
        movers = sorted(set(range(left, len(rows))) - set(finished))
        moves += [(hole, mover, rows[mover]) for hole, mover in zip(holes, movers, strict=True)]
        _move(moves, cache, call.state)
        for hole, mover in zip(holes, movers, strict=True):
            rows[hole] = rows[mover]
        del rows[left:]

    def _complete(self, row: _Row, done: _Done) -> None:
        """Add the completion of a row to `done`."""
        if row.dialogue is not None:
            completion = row.dialogue.completion(row.tokens, row.logprobs, row.ended)
        else:
            text = completion_text(row.tokens, self.hidden_ids, self.tokenizer)
            completion = Completion(row.tokens, row.logprobs, row.ended, text)
        done.add(row.prompt, row.sample, completion)

    def _resume(self, call: _Call) -> None:
        """Wait for what follows the turns of parked rows that are due, and let them go on behind the active rows.

        Rows are due by the number of decode steps, not by the clock, so that a run can be repeated exactly.
        """
        rows, parked, cache, state, plan = call.rows, call.parked, call.cache, call.state, call.plan
        slot_of = {id(row): cache.slots - 1 - place for place, row in enumerate(parked)}
        resumed: list[_Row] = []
        for row in [row for row in parked if row.due <= call.clock]:
            parked.remove(row)
            assert row.dialogue is not None
            before = len(row.tokens)
            given = row.dialogue.continuation(row.tokens, plan.max_completion_length)
            if not given:
                self._complete(row, call.done)
                continue
            row.cached = len(call.prompts[row.prompt].token_ids) + before - 1
            row.drawn, row.ended = before, False
            resumed.append(row)
        keeps = self.keep_turns and not self.backbone.state_numbers and state.seen is None
        forced = [row for row in resumed if keeps and row.pending <= FORCED_TOKENS]
        resumed = [*forced, *(row for row in resumed if row not in forced)]
        places = [(len(rows) + place, row) for place, row in enumerate(resumed)]
        places += [(cache.slots - 1 - place, row) for place, row in enumerate(parked)]
        if slot_of:
            _move([(slot, slot_of[id(row)], row) for slot, row in places if slot != slot_of[id(row)]], cache, state)
        if not resumed:
            return
        first = len(rows)
        rows += resumed
        if forced:
            self._force(forced, first, state)
        if resumed[len(forced) :]:
            self._prefill_again(call, resumed[len(forced) :], first + len(forced))

    def _force(self, rows: list[_Row], first: int, state: _State) -> None:
        """Let rows, which are in the slots from `first` on, read the given tokens in the next decode steps.

        Their keys and values of earlier turns are still in the cache. The end token of the last turn is not yet.
        """
        assert state.forced is not None
        device = state.tokens.device
        newest = torch.tensor([[row.tokens[-1], row.cached, row.drawn] for row in rows]).T
        tokens, positions, drawn = to_device(newest, device)
        slots = slice(first, first + len(rows))
        state.tokens[slots], state.positions[slots], state.drawn[slots] = tokens, positions, drawn
        for slot, row in enumerate(rows, first):
            assert row.dialogue is not None
            start, end = row.dialogue.given[-1]
            state.forced[slot, start:end] = to_device(torch.tensor(row.dialogue.new_ids), device)
            self.prefilled_tokens += end - start

    def _prefill_again(self, call: _Call, rows: list[_Row], first: int) -> None:
        """Compute the whole context of rows, which are in the slots from `first` on, and sample the next token.

        For many given tokens, for models with recurrent layers, whose states have gone on past the end of the turn,
        with a repetition_penalty, and as a reference.
        """
        prompts, cache, state = call.prompts, call.cache, call.state
        device = state.tokens.device
        contexts: list[Prompt] = []
        for row in rows:
            assert row.dialogue is not None
            row.tokens += row.dialogue.new_ids
            row.logprobs += [0.0] * len(row.dialogue.new_ids)
            row.drawn, row.cached = len(row.tokens) + 1, len(prompts[row.prompt].token_ids) + len(row.tokens)
            contexts.append(replace(prompts[row.prompt], token_ids=(*prompts[row.prompt].token_ids, *row.tokens)))
        found: dict[int, _Prefilled] = {}
        for batch in _prefill_batches(contexts, list(range(len(rows)))):
            found |= self._prefill(contexts, batch, 1, cache)
        for place in range(len(rows)):
            cache.admit(first + place, found[place].prompt, 1, found[place].states)
        cache.prompt, cache.states.prompts = [], {}
        slots = slice(first, first + len(rows))
        lengths = to_device(torch.tensor([[row.cached, row.drawn] for row in rows]).T, device)
        state.positions[slots], state.drawn[slots] = lengths
        seen = None if state.seen is None else state.seen[slots]
        for own, context in zip([] if seen is None else seen, contexts, strict=False):
            own.zero_()[list(context.token_ids)] = True
        uniform = state.uniforms[slots].gather(1, state.drawn[slots][:, None] - 1).squeeze(1)
        logits = torch.stack([found[place].logits_V for place in range(len(rows))])
        state.tokens[slots], state.new_logprobs[0, slots] = draw(logits, uniform, call.plan, seen)
        state.new_tokens[0, slots] = state.tokens[slots]
        self._collect(rows, *state.read(1, first, len(rows)), call.plan)


def _prefill_batches(prompts: list[Prompt], wanted: list[int]) -> list[list[int]]:
    """Split the indices `wanted` into batches of at most PREFILL_TOKENS tokens, padding included."""
    batches: list[list[int]] = []
    width = 0
    for index in wanted:
        length = len(prompts[index].token_ids)
        if not batches or max(width, length) * (len(batches[-1]) + 1) > PREFILL_TOKENS:
            batches.append([])
            width = 0
        batches[-1].append(index)
        width = max(width, length)
    return batches


def _move(moves: list[tuple[int, int, _Row]], cache: SlotCache, state: _State) -> None:
    """Move rows from slot to slot, given as (target, source, row), all at once."""
    if not moves:
        return
    device = state.tokens.device
    targets, sources = to_device(torch.tensor([[move[0] for move in moves], [move[1] for move in moves]]), device)
    cache.move(targets, sources, max(row.cached for _, _, row in moves))
    state.move(targets, sources)


def _power_of_two(count: int) -> int:
    """Round up to a power of two."""
    return 1 << (count - 1).bit_length()

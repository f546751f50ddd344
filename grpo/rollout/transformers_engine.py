"""The reference engine: model.generate on one prompt's group at a time. Slow and simple; the others must agree with it.

A logits processor draws the tokens, with the counted seeds and the sampler of the other engines. generate does the
caching and the forward passes.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from grpo.errors import is_out_of_memory
from grpo.models.architecture import own_attention
from grpo.rollout.engine import (
    RolloutEngine,
    completion_text,
    device_of,
    end_token_ids,
    hidden_token_ids,
    register_engine,
)
from grpo.rollout.sampling import counted_uniform, draw, stream_key
from grpo.runtime.device import empty_cache
from grpo.types import Completion, Group, Prompt, SamplingPlan

log = logging.getLogger(__name__)


class _Draw(LogitsProcessor):
    """Draws the next tokens and returns logits whose argmax they are, so that generate picks them."""

    def __init__(self, keys_B: Tensor, plan: SamplingPlan, prompt_width: int):
        self.keys, self.plan, self.width = keys_B, plan, prompt_width
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = torch.full_like(self.keys, input_ids.shape[1] - self.width)
        seen = None
        if self.plan.repetition_penalty != 1:
            seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, input_ids, True)
        tokens, logprobs = draw(scores, counted_uniform(self.keys, position), self.plan, seen)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@register_engine("transformers")
class TransformersEngine(RolloutEngine):
    """model.generate with transformers' own attention, for at most `slots` completions of one prompt at a time.

    If memory runs out, half as many are sampled at a time. Random numbers depend on the prompt, sample and position, so
    the completions are the same.

    `use_cache` false (rollout.engine_kwargs) computes the whole sequence again at each token, for models whose cache
    is not exact.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        uses_packed_attention: bool,
        slots: int = 256,
        use_cache: bool = True,
    ):
        self.model, self.tokenizer, self.uses_packed_attention = model, tokenizer, uses_packed_attention
        self.slots, self.use_cache = slots, use_cache
        self.end_ids = end_token_ids(model, tokenizer)
        self.hidden_ids = hidden_token_ids(self.end_ids, tokenizer)

    def state_dict(self) -> dict[str, int]:
        return {"slots": self.slots}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.slots = min(self.slots, state.get("slots", self.slots))

    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], plan: SamplingPlan, finished: Callable[[Group], None] | None = None
    ) -> list[Group]:
        """See RolloutEngine."""
        before = self.model.config._attn_implementation
        if self.uses_packed_attention:
            self.model.set_attn_implementation(own_attention(self.model))
        try:
            groups = []
            for prompt in prompts:
                groups.append(self._group(prompt, plan))
                if finished is not None:
                    finished(groups[-1])
            return groups
        finally:
            self.model.set_attn_implementation(before)

    def _group(self, prompt: Prompt, plan: SamplingPlan) -> Group:
        completions: list[Completion] = []
        while len(completions) < plan.num_generations:
            samples = range(len(completions), min(len(completions) + self.slots, plan.num_generations))
            error: BaseException | None = None
            try:
                completions += self._complete(prompt, plan, samples)
            except (RuntimeError, MemoryError) as caught:
                if not is_out_of_memory(caught) or len(samples) == 1:
                    raise
                error = caught.with_traceback(None)  # whose frames hold the memory
            if error is not None:
                empty_cache(device_of(self.model))
                log.info(
                    "out of memory while sampling: rollout.slots is %d instead of %d", len(samples) // 2, self.slots
                )
                self.slots = len(samples) // 2
        return Group(prompt, completions)

    def _complete(self, prompt: Prompt, plan: SamplingPlan, samples: range) -> list[Completion]:
        device = device_of(self.model)
        ids = torch.tensor([prompt.token_ids] * len(samples), device=device)
        keys = [stream_key(plan.seed, prompt.draw, sample) for sample in samples]
        processor = _Draw(torch.tensor(keys, device=device), plan, ids.shape[1])
        output = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            use_cache=self.use_cache,
            max_new_tokens=plan.max_completion_length,
            eos_token_id=self.end_ids,
            pad_token_id=self.end_ids[0],
            logits_processor=LogitsProcessorList([processor]),
        )
        tokens = output[:, ids.shape[1] :].tolist()
        logprobs = torch.stack(processor.logprobs, dim=1).tolist()
        completions = []
        for row, scores in zip(tokens, logprobs, strict=True):
            ends = [index for index, token in enumerate(row) if token in self.end_ids]
            length = ends[0] + 1 if ends else len(row)
            text = completion_text(row[:length], self.hidden_ids, self.tokenizer)
            completions.append(Completion(row[:length], scores[:length], bool(ends), text))
        return completions

"""LogprobModel: a model and a packed batch -> logprobs and entropies.

`use_grpo_attention` selects the attention by a probe, and `run_self_test` checks the kernels.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo.kernels import layers, self_test
from grpo.kernels.attention import NAME, GroupSpan, PackedLayout, grpo_attention
from grpo.kernels.head import training_dtypes
from grpo.kernels.registry import switch_off
from grpo.logprobs import token_logprobs
from grpo.models.architecture import head_bias, logit_transform, probe_ids, text_config, text_decoder, vocabulary_size
from grpo.models.families import describe
from grpo.models.lora import head_weight
from grpo.models.mixers import has_mixers, layout_arguments, use_grpo_mixers
from grpo.models.routers import LoadBalance, padded_row_counts, row_counts
from grpo.models.shared_prompt import SharedPrompts
from grpo.packing import PackedBatch
from grpo.runtime.precision import PRECISIONS

AttentionInterface.register(NAME, grpo_attention)
PROBE = "grpo_probe"
"""Name of the same attention during the probe."""


class LogprobModel(nn.Module):
    """A causal LM with the forward pass of training: packed batch -> logprobs [N] and entropies [N], in nats.

    It is a module because wrappers (DDP, FSDP, autocast) only apply to `forward`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        uses_packed_attention: bool,
        temperature: float,
        entropy_gradient: bool = False,
        uses_kernels: bool = True,
    ):
        """
        Args:
            model: a causal LM, which is not changed.
            uses_packed_attention: the model uses the attention of grpo/kernels (`use_grpo_attention`).
            temperature: divides the logits.
            entropy_gradient: the entropies carry a gradient.
            uses_kernels: layers may be computed from the model's description instead of by its modules. False if a
                wrapper needs the modules to be called (DeepSpeed).
        """
        super().__init__()
        self.model, self.uses_packed_attention, self.temperature = model, uses_packed_attention, temperature
        self.entropy_gradient, self.uses_kernels = entropy_gradient, uses_kernels
        self.accumulate_grads_inplace = False
        """Backward passes may add directly to `.grad`. Set if no wrapper exchanges gradients (grpo/policy.py)."""
        self.prompts = SharedPrompts()
        self.balance: LoadBalance | None = None
        """Receives the router logits of each forward pass."""
        self._no_split_modules = model._no_split_modules  # the layers that FSDP shards one by one

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return logprobs [N] and entropies [N], float32, of the completion tokens of `batch`."""
        counts_T = row_counts(batch) if self.balance is not None and self.uses_packed_attention else None
        if self.uses_packed_attention and any(span.split for span in batch.spans):
            hidden_NH = self.prompts.hidden(self.hidden_states, batch, counts_T)
        elif self.uses_packed_attention:
            layout = batch.layout
            layout.counts_T = counts_T
            hidden_TH = self.hidden_states(batch.input_ids_T, batch.positions_T, layout)
            # Not hidden_TH[...]: its backward pass adds atomically, in an order that depends on the machine's load.
            hidden_NH = hidden_TH.index_select(0, batch.predictor_N)
        else:
            ids, predictor = batch.rows()
            counts_T = None if self.balance is None else padded_row_counts(batch, ids.shape[1])
            hidden_NH = self._decode(counts_T, input_ids=ids).flatten(0, 1).index_select(0, predictor)
        head, bias = self.model.get_output_embeddings(), head_bias(self.model)
        dtypes = training_dtypes(hidden_NH.device)
        with torch.autocast(hidden_NH.device.type, enabled=False):  # the head in float32: see Float32Head
            return token_logprobs(
                hidden_NH.float(),
                head_weight(head).float(),
                batch.tokens_N,
                self.temperature,
                entropy_gradient=self.entropy_gradient,
                accumulate_grads_inplace=self.accumulate_grads_inplace,
                dtypes=dtypes,
                bias_V=bias,
                transform=logit_transform(self.model),
            )

    def hidden_states(self, ids_T: Tensor, positions_T: Tensor, layout: PackedLayout) -> Tensor:
        """Return the last hidden states [T, H] of one packed row, from the model's description or its modules."""
        described = describe(self.model) if self.uses_kernels else None
        if described is not None and layers.is_supported(described):
            return layers.hidden_states(
                described,
                ids_T,
                positions_T,
                layout,
                accumulate_grads_inplace=self.accumulate_grads_inplace,
            )
        return self._decode(
            layout.counts_T,
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            **layout_arguments(self.model, layout),
        )[0]

    def _decode(self, counts_T: Tensor | None, **inputs: Any) -> Tensor:
        """Return the last hidden states of the text decoder, and record its routers if their tokens are counted."""
        if self.balance is None or counts_T is None:
            hidden: Tensor = text_decoder(self.model)(**inputs, use_cache=False).last_hidden_state
            return hidden
        output = text_decoder(self.model)(**inputs, use_cache=False, output_router_logits=True)
        self.balance.record(output.router_logits, counts_T)
        hidden = output.last_hidden_state
        return hidden


def use_grpo_attention(model: PreTrainedModel) -> bool:
    """Switch the model to the attention of grpo/kernels if a probe finds it exact.

    The probe is two groups with prompts and completions of different lengths. It runs through the modules with their
    own attention as plain rows, through the modules with the new one as a packed row, and through kernels that read
    the model's description. The model keeps its own attention unless

    - its layers are attention or recurrent layers that follow a layout (mixers.py), and those with a sliding window
      pass it to the attention function (the probe is shorter than most windows);
    - plain rows and the packed row give the same logprobs up to rounding;
    - nothing flows from one group into the next (`is_isolated`), as the state of a recurrent layer would.

    If only the kernels differ, the description is not used.

    Returns:
        True if the attention was switched.
    """
    own = model.config._attn_implementation
    # 16-bit weights round differently: in bfloat16, both attentions differ equally from float32.
    tolerance = PRECISIONS[model.dtype].logprob
    batch = probe_batch(vocabulary_size(model)).to(next(model.parameters()).device)
    windows: list[int | None] = []

    def observed(*args: Any, **settings: Any) -> Any:
        windows.append(settings.get("sliding_window"))
        return ALL_ATTENTION_FUNCTIONS[NAME](*args, **settings)

    def logprobs(**settings: bool) -> Tensor:
        found: Tensor = LogprobModel(model, temperature=1.0, **settings)(batch)[0]
        return found

    with torch.no_grad():
        plain = logprobs(uses_packed_attention=False)
        AttentionInterface.register(PROBE, observed)
        try:
            model.set_attn_implementation(PROBE)
            use_grpo_mixers(model)
            packed = logprobs(uses_packed_attention=True, uses_kernels=False)
            exact = _has_windows(model, windows) and torch.allclose(plain, packed, atol=tolerance, rtol=1e-3)
            exact = exact and is_isolated(model, batch)
        except (NotImplementedError, TypeError, ValueError):
            exact = False
        model.set_attn_implementation(NAME if exact else own)
        if not exact:
            return False
        described = logprobs(uses_packed_attention=True)
    if not torch.allclose(plain, described, atol=tolerance, rtol=1e-3):
        distance = float((plain - described).abs().max())
        switch_off("fused_ops", f"logprobs differ by {distance:.2g} from those of the model's modules")
    return True


def _has_windows(model: PreTrainedModel, observed: list[int | None]) -> bool:
    """Return whether as many layers as the config says passed a sliding window, and the trainer knows all others."""
    config = text_config(model.config)
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if not types:
        types = ["full_attention" if window is None else "sliding_attention"]
    attention = [kind for kind in types if kind in ("full_attention", "sliding_attention", "attention")]
    if len(attention) < len(types) and not has_mixers(model):
        return False
    # Of all calls, since some models call their layers several times.
    passed = sum(found is not None for found in observed)
    return passed * len(attention) == attention.count("sliding_attention") * len(observed)


ROUNDING = 1e-5
"""Largest change of a logprob, in nats, that another order of the same sums explains in float32."""


def is_isolated(model: PreTrainedModel, batch: PackedBatch) -> bool:
    """Return whether nothing flows from the first group of `batch` into the last.

    In most models the last group's logprobs then do not change at all. Experts compute the tokens of all groups
    together, and may add up the same numbers in another order. There, the gradient with respect to the first group has
    to be exactly 0.
    """
    change = leak(model, batch)
    device = batch.input_ids_T.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    explained = ROUNDING if dtype == torch.float32 else PRECISIONS[dtype].copy
    return change == 0 or (change <= explained and gradient_leak(model, batch) == 0)


def gradient_leak(model: PreTrainedModel, batch: PackedBatch) -> float:
    """Return the largest gradient of the last group's hidden states with respect to the embeddings before it."""
    first, leaves = batch.spans[-1].start, list[Tensor]()

    def detach(module: nn.Module, args: object, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1]

    hook = model.get_input_embeddings().register_forward_hook(detach)
    try:
        with torch.enable_grad():
            probe = LogprobModel(model, temperature=1.0, uses_packed_attention=True, uses_kernels=False)
            hidden_TH = probe.hidden_states(batch.input_ids_T, batch.positions_T, batch.layout)
            [gradient] = torch.autograd.grad(hidden_TH[first:].float().square().sum(), leaves[:1])
    finally:
        hook.remove()
    return float(gradient[0, :first].abs().max())


@torch.no_grad()
def leak(model: PreTrainedModel, batch: PackedBatch) -> float:
    """Return the largest change of a logprob of the last group when the tokens of the other groups change.

    Args:
        model: a model whose attention reads the layout of a packed row.
        batch: two groups or more.
    """
    first, vocabulary = batch.spans[-1].start, vocabulary_size(model)
    ids = batch.input_ids_T.clone()
    ids[:first] = (ids[:first] + vocabulary // 2) % vocabulary
    probe = LogprobModel(model, temperature=1.0, uses_packed_attention=True, uses_kernels=False)
    before, after = (probe(version)[0] for version in (batch, replace(batch, input_ids_T=ids)))
    return float((after - before)[batch.predictor_N >= first].abs().max())


def run_self_test(model: PreTrainedModel, autocast: torch.dtype | None) -> None:
    """Switch off the kernels that do not agree with the reference at the shapes of `model`
    (grpo/kernels/self_test.py).

    Args:
        model: the model that is trained.
        autocast: dtype of mixed precision. None if it is off.
    """
    tolerance = 0.0 if autocast is None else PRECISIONS[autocast].hidden
    head = model.get_output_embeddings()
    self_test.run(describe(model), head.weight.device, vocabulary_size(model), autocast, tolerance, _heads(model))


def _heads(model: PreTrainedModel) -> tuple[int, int, int] | None:
    """Return the numbers of query heads and key heads, and the head size. None if the config does not say."""
    config = model.config.get_text_config()
    heads, size = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
    if not isinstance(heads, int):
        return None
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, key_heads, size or config.hidden_size // heads


def probe_batch(vocabulary: int) -> PackedBatch:
    """Return a small synthetic batch: two groups, with prompts of 5 and 3 tokens and completions of 4, 2 and 3."""
    ids: list[int] = []
    positions: list[int] = []
    predictor: list[int] = []
    tokens: list[int] = []
    spans, lengths = [], []
    spread = iter(probe_ids(17, vocabulary).tolist())
    for prompt_length, completion_lengths in ((5, (4, 2)), (3, (3,))):
        start = len(ids)
        spans.append(GroupSpan(start, prompt_length, completion_lengths))
        positions += range(prompt_length)
        ids += [next(spread) for _ in range(prompt_length)]
        for length in completion_lengths:
            first = len(ids)
            new = [next(spread) for _ in range(length)]
            predictor += [start + prompt_length - 1, *range(first, first + length - 1)]
            ids += new
            tokens += new
            positions += range(prompt_length, prompt_length + length)
            lengths.append(length)
    lengths_S = torch.tensor(lengths)
    zeros = torch.zeros(len(tokens))
    return PackedBatch(
        torch.tensor(ids),
        torch.tensor(positions),
        spans,
        torch.tensor(predictor),
        torch.tensor(tokens),
        torch.arange(len(lengths)).repeat_interleave(lengths_S),
        zeros,
        zeros,
        zeros,
        lengths_S,
        torch.arange(len(lengths)),
    )

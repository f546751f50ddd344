"""Architecture: what the trainer needs to know of any transformers model that generates text.

A multimodal model is trained on text only: its decoder is called directly, and everything else in it is frozen.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from grpo.errors import ConfigError
from grpo.kernels.head import IDENTITY, LogitTransform


class Float32Head(nn.Linear):
    """The output head, always in float32: logits rounded to bfloat16 put an error of 1e-2 on every logprob."""

    transform: LogitTransform = IDENTITY
    """What the model does with this head's product. The head itself does not apply it."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def text_config(config: PretrainedConfig) -> Any:
    """Return the part of a config that describes the language model."""
    return config.get_text_config(decoder=True)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model knows."""
    return int(text_config(model.config).vocab_size)


def probe_ids(count: int, vocabulary: int, device: torch.device | str = "cpu") -> Tensor:
    """Return `count` token ids spread over the vocabulary, for comparisons of two implementations.

    Small ids are special tokens. Those that training never saw amplify the rounding of 16-bit products in a real model.
    """
    return torch.arange(1, count + 1, device=device) * vocabulary // (count + 1)


def text_decoder(model: PreTrainedModel) -> Any:
    """Return the module that turns token ids into last hidden states."""
    base: Any = model.base_model
    if base is model or text_config(model.config) is not model.config:
        base = model.get_decoder()
    return base.model if base is model else base  # Llama 4 names a decoder that it does not have


def auto_class(config: PretrainedConfig, path: str) -> Any:
    """Return the auto class that loads a model with a language modeling head.

    Raises:
        ConfigError: transformers has none for this model.
    """
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    raise ConfigError(
        f"model.name '{path}' cannot be loaded: transformers has no language model for its model_type "
        f"'{config.model_type}'. Use a model that generates text"
    )


def create_model(config: PretrainedConfig, dtype: torch.dtype | None = None, path: str = "") -> PreTrainedModel:
    """Create the model of `config` with random weights and its own attention, on the default device."""
    made: PreTrainedModel = auto_class(config, path).from_config(config, dtype=dtype or config.dtype)
    return made


def own_attention(model: PreTrainedModel) -> str:
    """Return the attention that transformers selects for this model: sdpa if it is supported, else eager."""
    return "sdpa" if model._supports_sdpa else "eager"


def frozen_parts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the parameters that text does not reach: those of the encoders of a multimodal model."""
    if text_config(model.config) is model.config:
        return
    head: Any = model.get_output_embeddings()
    reached = {id(parameter) for part in (text_decoder(model), head) for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in reached:
            yield name, parameter


def float32_head(model: PreTrainedModel, transform: LogitTransform = IDENTITY) -> None:
    """Let the output head compute in float32 and record its transform. It keeps its parameters, and stays tied."""
    head: Any = model.get_output_embeddings()
    if type(head) is nn.Linear:
        new = Float32Head(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        new.weight, new.bias = head.weight, head.bias
        head = new.train(head.training)
        model.set_output_embeddings(head)
    head.transform = transform


def head_bias(model: PreTrainedModel) -> Tensor | None:
    """Return the bias [V] of the output head."""
    bias: Tensor | None = getattr(_plain_head(model), "bias", None)
    return bias


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Return what the model does with the product of its head."""
    found: LogitTransform = getattr(_plain_head(model), "transform", IDENTITY)
    return found


def _plain_head(model: PreTrainedModel) -> nn.Module:
    head: Any = model.get_output_embeddings()
    return getattr(head, "base_layer", head)  # below an adapter


SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""Config keys of a factor or divisor of the logits (Granite, Cohere, Falcon-H1)."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Config keys of a softcap of the logits (Gemma, RecurrentGemma)."""


def _candidates(config: Any) -> list[LogitTransform]:
    """Return the transformations of logits that the keys of a config can mean, the most likely first."""
    values = [getattr(config, key, None) for key in SCALES]
    scales = [1.0]
    for value in values:
        if isinstance(value, (int, float)) and value not in (0, 1):
            scales[:0] = [float(value), 1 / float(value)]
    if getattr(config, "dim_model_base", None):  # MiniCPM
        scales.insert(0, config.dim_model_base / config.hidden_size)
    caps = [getattr(config, key, None) for key in SOFTCAPS]
    softcaps = [*(float(cap) for cap in caps if cap), None]
    return [LogitTransform(scale, softcap) for softcap in softcaps for scale in scales]


@torch.no_grad()
def find_transform(model: PreTrainedModel, tolerance: float, path: str) -> LogitTransform:
    """Find out what `model` does with the product of its head, by comparison with the logits that it returns.

    Args:
        model: the model, with its weights and a head in float32.
        tolerance: largest difference that rounding explains, relative to the largest logit.
        path: name of the model, for the message.

    Raises:
        ConfigError: the model does something else.
    """
    config = text_config(model.config)
    device = next(model.parameters()).device
    ids = probe_ids(16, vocabulary_size(model), device)[None]
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = text_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0].float()
    head: Any = model.get_output_embeddings()
    bias = head_bias(model)
    product = nn.functional.linear(hidden, head.weight.float(), None if bias is None else bias.float())

    def difference(candidate: LogitTransform) -> float:
        ours = candidate.apply_(product.clone())
        return float((ours - logits).abs().max() / logits.abs().max().clamp(min=1e-6))

    differences = {candidate: difference(candidate) for candidate in _candidates(config)}
    best = min(differences, key=lambda candidate: differences[candidate])
    if not differences[best] <= tolerance:  # NaN included
        raise ConfigError(
            f"model.name '{path}': {type(model).__name__} does not compute its logits from the last hidden states by "
            f"W h + b and a scale or softcap that its config names (they differ by {differences[best]:.1g} of the "
            f"largest logit), so the trainer's logprobs would be wrong. docs/models.md lists the families that work"
        )
    return best

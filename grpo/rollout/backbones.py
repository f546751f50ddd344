"""Backbones for decoding: token ids -> last hidden states and logits.

ModuleBackbone     the model's own modules, with the attention of grpo/kernels
KernelBackbone     a decoder of grpo/kernels, on copies of the weights in the model's description

A KernelBackbone is used only if it gives the same hidden states as the modules.
"""

import itertools
import logging
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.errors import raise_device_error
from grpo.kernels import decode
from grpo.kernels.attention import GroupSpan, PackedLayout, SlotLayout
from grpo.kernels.cpu.decode_step import CompiledDecoder
from grpo.kernels.decode import FusedDecoder
from grpo.kernels.description import Model
from grpo.kernels.head import head_logits, product_dtype
from grpo.kernels.kv_cache import SlotCache
from grpo.kernels.registry import switch_off
from grpo.kernels.transfer import to_device
from grpo.models.architecture import head_bias, logit_transform, probe_ids, text_decoder, vocabulary_size
from grpo.models.families import describe, rope_is_fixed
from grpo.models.lora import head_weight
from grpo.models.mixers import has_mixers, layout_arguments
from grpo.rollout.engine import device_of
from grpo.runtime.precision import PRECISIONS

log = logging.getLogger(__name__)


class Backbone(Protocol):
    """Interface of the engine to a model. H: hidden size, V: vocabulary."""

    model: PreTrainedModel
    state_numbers: int
    """Number of elements of the states of recurrent layers of one completion, known after the first prefill."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of the cached keys and values, under the autocast of the caller."""
        ...

    def refresh(self) -> None:
        """Read the current weights of the model."""
        ...

    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        """Compute prompts and keep their keys and values in cache.prompt, their states in cache.states.prompts.

        Args:
            ids: [prompts, tokens], right-padded.
            cache: receives the keys and values. Its `prompt_lengths` are the numbers of tokens.

        Returns:
            Hidden states [prompts, tokens, H].
        """
        ...

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: SlotCache) -> Tensor:
        """Compute one new token for each active row. Call `cache.aim` first.

        Args:
            tokens_B: [B] token ids.
            positions_B: [B] their positions.
            cache: receives the keys and values of the new tokens.

        Returns:
            Hidden states [B, H].
        """
        ...

    def padded_rows(self, rows: int) -> int:
        """Return the number of rows to compute for `rows` rows."""
        ...

    def logits(self, hidden_BH: Tensor) -> Tensor:
        """Return the logits [B, V], float32, of hidden states [B, H]."""
        ...

    def release(self) -> None:
        """Free memory that is not needed until the next refresh."""
        ...


class ModuleBackbone:
    """Backbone that calls the model's modules, on the live weights."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.has_states, self.state_numbers = model, has_mixers(model), 0

    @property
    def cache_dtype(self) -> torch.dtype:
        return autocast_dtype(self.model) or linear_dtype(self.model)

    def refresh(self) -> None:
        pass

    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        cache.prefilling, cache.prompt = True, []
        if self.has_states:
            hidden = self._packed_prefill(ids, cache)
        else:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            hidden = self._forward(ids, positions, cache, None)
        cache.prefilling = False
        return hidden

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: SlotCache) -> Tensor:
        layout = SlotLayout(positions_B + 1, cache.longest, cache.states)
        return self._forward(tokens_B[:, None], positions_B[:, None], cache, layout)[:, 0]

    def _packed_prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        """Compute the prompts end to end: no padding may enter the state of a recurrent layer.

        All indices come from the host, which therefore does not wait for the device.
        """
        lengths, width, device = cache.prompt_lengths, ids.shape[1], ids.device
        starts = [0, *itertools.accumulate(lengths)]
        spans = [GroupSpan(start, length, ()) for start, length in zip(starts, lengths, strict=False)]
        layout = PackedLayout(spans, device, states=cache.states)
        real = [(row * width + column, column) for row, length in enumerate(lengths) for column in range(length)]
        order, positions = to_device(torch.tensor(real).T, device)
        hidden = self._forward(ids.flatten().index_select(0, order)[None], positions[None], cache, layout)[0]
        self.state_numbers = cache.states.numbers
        # Back to rows. Padding takes any token's place: it is not read.
        places = to_device((torch.tensor(starts[:-1])[:, None] + torch.arange(width)).clamp(max=starts[-1] - 1), device)
        cache.prompt = [(_rows(key, places), _rows(value, places)) for key, value in cache.prompt]
        return hidden[places]

    def padded_rows(self, rows: int) -> int:
        return decode.padded_rows(rows, device_of(self.model))

    def logits(self, hidden_BH: Tensor) -> Tensor:
        head = head_weight(self.model.get_output_embeddings()).detach()
        return transformed(self.model, head_logits(hidden_BH, head, product_dtype(hidden_BH.device)))

    def release(self) -> None:
        pass

    def _forward(
        self, ids: Tensor, positions: Tensor, cache: SlotCache, layout: SlotLayout | PackedLayout | None
    ) -> Tensor:
        arguments = {} if layout is None else layout_arguments(self.model, layout)
        return text_decoder(self.model)(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **arguments
        ).last_hidden_state


def _rows(packed: Tensor, places: Tensor) -> Tensor:
    """[1, K, tokens, D] -> [prompts, K, L, D]"""
    return packed[0][:, places].transpose(0, 1)


class KernelBackbone:
    """Backbone that uses a decoder of grpo/kernels, on copies of the weights that `refresh` makes."""

    def __init__(self, model: PreTrainedModel, decoder: FusedDecoder):
        self.model, self.decoder, self.state_numbers = model, decoder, 0
        self.prefill, self.step = decoder.prefill, decoder.step
        self.padded_rows, self.release = decoder.padded_rows, decoder.release

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.decoder.cache_dtype(self._described()[1])

    def logits(self, hidden_BH: Tensor) -> Tensor:
        return transformed(self.model, self.decoder.logits(hidden_BH))

    def refresh(self) -> None:
        described, dtype = self._described()
        self.decoder.refresh(described, head_weight(self.model.get_output_embeddings()).detach(), dtype)

    def _described(self) -> tuple[Model, torch.dtype]:
        """Return the description of the model, and the dtype of products."""
        described = describe(self.model)
        assert described is not None, "the model had a description when its backbone was chosen"
        return described, decode.decoding_dtype(described, autocast_dtype(self.model) or torch.float32)


def transformed(model: PreTrainedModel, product_BV: Tensor) -> Tensor:
    """Return the logits [B, V] of `model` from the product of its head, which is overwritten."""
    bias = head_bias(model)
    return logit_transform(model).apply_(product_BV, None if bias is None else bias.detach().float())


def choose_backbone(model: PreTrainedModel) -> tuple[Backbone, int]:
    """Return the fastest backbone that gives the same hidden states as the model's modules on a probe.

    Returns:
        The backbone, and the number of elements that the cache holds per position of one completion.
    """
    modules = ModuleBackbone(model)
    expected, numbers = _probe(modules)
    described = describe(model) if rope_is_fixed(model) else None
    # 16-bit products round differently in the two; a wrong layer causes a much larger difference.
    dtype = linear_dtype(model)
    tolerance = PRECISIONS[dtype].hidden
    for name, kind in (("decode_step", CompiledDecoder), ("fused_decode", FusedDecoder)):
        if described is None or not kind.is_supported(described, dtype):
            continue
        backbone = KernelBackbone(model, kind())
        try:
            hidden, _ = _probe(backbone)
        except (RuntimeError, TypeError) as error:  # an operation that this device or this torch lacks
            raise_device_error(error)
            switch_off(name, f"it failed on this device ({str(error).splitlines()[0]})")
            continue
        backbone.release()
        distance = _distance(hidden, expected)
        if distance < tolerance:
            return backbone, numbers
        log.info(
            f"kernel {name} is off for this model: hidden states differ by {distance:.1g} from those of its modules"
        )
    return modules, numbers


def _distance(hidden: Tensor, expected: Tensor) -> float:
    """Return the relative difference of a typical token of the prefill or of the step, whichever is larger."""
    relative = (hidden - expected).norm(dim=-1) / expected.norm(dim=-1)
    return max(float(relative[:, :-1].median()), float(relative[:, -1].median()))


@torch.no_grad()
def _probe(backbone: Backbone) -> tuple[Tensor, int]:
    """Return the hidden states of a prefill and one step, and the number of cached elements per position."""
    model = backbone.model
    ids = probe_ids(12, vocabulary_size(model), device_of(model)).reshape(2, 6)
    dtype = linear_dtype(model)
    # 16-bit weights belong to mixed precision, so autocast is on here as in every later call.
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
        cache = SlotCache(2, 8, backbone.cache_dtype)
        backbone.refresh()
        cache.prompt_lengths = [6, 6]
        hidden = backbone.prefill(ids, cache)
        for row in range(2):
            prompt = [(key[row], value[row]) for key, value in cache.prompt]
            cache.admit(row, prompt, 1, cache.states.of_prompt(row))
        positions = torch.tensor([6, 6], device=ids.device)
        cache.aim(positions, 7)
        after = backbone.step(ids[:, 0], positions, cache)[:, None]
    return torch.cat([hidden, after], dim=1).float(), cache.numbers // (cache.slots * cache.length)


def autocast_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """Return the dtype of autocast on the device of `model`. None if autocast is off."""
    kind = device_of(model).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def linear_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the weight dtype of the first linear layer that is not the output head. float32 if there is none."""
    head = model.get_output_embeddings()
    return next((m.weight.dtype for m in model.modules() if isinstance(m, nn.Linear) and m is not head), torch.float32)

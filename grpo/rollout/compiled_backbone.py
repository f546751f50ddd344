"""CompiledBackbone: one call per token into decode_step.c, which is compiled on this machine at first use -> hidden states.

A decoding step of a small model is some three hundred operations of a few microseconds each, and products of a few rows that
general libraries do at a third of the rate of large ones. In C it is one pass over the weights. Where there is no C compiler,
or the result is not that of the modules, the engine decodes with FusedBackbone, in torch.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from grpo.kernels.cpu.compiler import compiled, pointer
from grpo.rollout.backbones import FusedBackbone, full_tensor
from grpo.rollout.kv_cache import SlotCache


def library() -> Any:
    """decode_step.c, or None where it cannot be compiled."""
    return compiled(SOURCE, pack="iiipp", multiply="iiiipppp", step="pipppp")


SOURCE = Path(__file__).parents[1] / "kernels" / "cpu" / "decode_step.c"
PANEL = 16
"""Outputs that lie side by side in memory, as in decode_step.c."""


@dataclass(frozen=True)
class Panels:
    """A weight [O, I] as [ceil(O / 16), I, 16], the last panel filled up with zeros."""

    tensor: Tensor
    outputs: int

    @classmethod
    def of(cls, weight: Tensor) -> "Panels":
        weight = weight.float().contiguous()
        outputs, inputs = weight.shape
        panels = torch.empty(-(-outputs // PANEL), inputs, PANEL)
        library().pack(torch.get_num_threads(), inputs, outputs, pointer(weight), pointer(panels))
        return cls(panels, outputs)


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("norm", "qkv", "qkv_bias", "head_norm", "out", "mlp_norm", "gate", "up", "down", "keys", "values")
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layers", "embedding", "norm", "turns")),
        *((name, ctypes.c_float) for name in ("epsilon", "scaling")),
        *(
            (name, ctypes.c_int32)
            for name in ("layer_count", "hidden", "inside", "heads", "key_heads", "head_size", "length", "threads")
        ),
    ]


class CompiledBackbone(FusedBackbone):
    """FusedBackbone whose products, and whole decoding steps, are those of decode_step.c. For float32 on a CPU; in any other
    dtype it is FusedBackbone."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.panels = False
        self.described: tuple[SlotCache, _Model, Any] | None = None
        """What C reads, for the cache that it was made for."""

    @classmethod
    def fits(cls, model: PreTrainedModel) -> bool:
        return (
            FusedBackbone.fits(model)
            and model.device.type == "cpu"
            and model.base_model.layers[0].self_attn.head_dim % 8 == 0  # type: ignore[union-attr, index]
            and library() is not None
        )

    def padded_rows(self, rows: int) -> int:
        return rows if self.panels else super().padded_rows(rows)

    def packing(self, dtype: torch.dtype) -> Callable[[Tensor], Any] | None:
        self.panels = self.dtype == torch.float32
        return Panels.of if self.panels else super().packing(dtype)

    def release(self) -> None:
        self.described = None
        super().release()

    def refresh(self) -> None:
        self.described = None
        super().refresh()
        if not self.panels:
            return
        self.embedding = full_tensor(self.base.get_input_embeddings().weight).float().contiguous()
        for layer in self.layers:
            gate, up = layer.source.mlp.gate_proj, layer.source.mlp.up_proj
            filled = -gate.out_features % PANEL
            if filled:  # both halves in whole panels: what is filled up gives zeros, which meet zeros in `down`
                halves = [F.pad(full_tensor(half.weight), (0, 0, 0, filled)) for half in (gate, up)]
                layer.tensors["gate_up"] = Panels.of(torch.cat(halves))
                layer.tensors["down"] = Panels.of(F.pad(full_tensor(layer.source.mlp.down_proj.weight), (0, filled)))

    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        cache.zeroed = not self.panels  # a step looks at what was written, and at nothing else
        return super().prefill(ids, cache)

    def product(self, states: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, Panels):
            return super().product(states, weight, bias)
        states = states.contiguous()
        result = torch.empty(*states.shape[:-1], weight.outputs)
        library().multiply(
            torch.get_num_threads(),
            states.numel() // states.shape[-1],
            states.shape[-1],
            weight.outputs,
            pointer(states),
            pointer(weight.tensor),
            pointer(bias),
            pointer(result),
        )
        return result

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: SlotCache) -> Tensor:
        if not self.panels:
            return super().step(tokens_B, positions_B, cache)
        rows = len(tokens_B)
        if self.described is None or self.described[0] is not cache:
            self.described = (cache, *self._describe(cache))
        model = self.described[1]
        mixed = (model.heads + 2 * model.key_heads) * model.head_size
        numbers = model.hidden + mixed + model.heads * model.head_size + model.inside
        weights = model.threads * -(-cache.length // 8) * 8
        hidden, scratch = torch.empty(rows, model.hidden), torch.empty(rows * numbers + weights)
        tokens, positions = tokens_B.contiguous(), positions_B.contiguous()
        library().step(
            ctypes.addressof(model), rows, pointer(tokens), pointer(positions), pointer(hidden), pointer(scratch)
        )
        return hidden

    def _describe(self, cache: SlotCache) -> tuple[_Model, Any]:
        """Where everything lies; the second is the array that the first points into."""
        assert self.table is not None
        layers = (_Layer * len(self.layers))()
        for described, layer, keys, values in zip(layers, self.layers, cache.keys, cache.values, strict=True):
            weights = layer.tensors
            for name in ("norm", "mlp_norm", "head_norm", "qkv_bias"):
                setattr(described, name, pointer(weights.get(name)))
            for name in ("qkv", "out", "down"):
                setattr(described, name, pointer(weights[name].tensor))
            gate, up = weights["gate_up"].tensor.chunk(2)
            described.gate, described.up = pointer(gate), pointer(up)
            described.keys, described.values = pointer(keys), pointer(values)
        first = self.layers[0]
        model = _Model(
            layers=ctypes.addressof(layers),
            embedding=pointer(self.embedding),
            norm=pointer(self.norm),
            turns=pointer(self.table),
            epsilon=self.base.norm.variance_epsilon,
            scaling=first.scaling,
            layer_count=len(self.layers),
            hidden=self.embedding.shape[1],
            inside=first.tensors["gate_up"].outputs // 2,
            heads=first.heads,
            key_heads=first.key_heads,
            head_size=first.head_dim,
            length=cache.length,
            threads=torch.get_num_threads(),
        )
        return model, layers

"""Decoding steps in C, one call per token, for CPUs. Products read float32 or bfloat16 weights.

In PyTorch, a decoding step of a small model takes about three hundred operations of a few microseconds each. General
libraries compute products of a few rows at about a third of the rate of large ones.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.cpu.compiler import pointer
from grpo.kernels.cpu.ops import PANEL
from grpo.kernels.cpu.panels import Panels, has_bfloat16, library
from grpo.kernels.decode import FusedDecoder, merged
from grpo.kernels.description import Model
from grpo.kernels.kv_cache import SlotCache
from grpo.kernels.registry import is_on

MAX_HEAD_SIZE = 512
"""As in decode_step.c."""


class _Layer(ctypes.Structure):
    """One layer as decode_step.c reads it: addresses of weights and of cached keys and values."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("norm", "qkv", "qkv_bias", "head_norm", "out", "mlp_norm", "gate", "up", "down", "keys", "values")
    ]


class _Model(ctypes.Structure):
    """The model as decode_step.c reads it. Fields in the order of the C struct."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layers", "embedding", "norm", "rotations")),
        *((name, ctypes.c_float) for name in ("epsilon", "scaling")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "layer_count",
                "hidden",
                "intermediate_size",
                "heads",
                "key_heads",
                "head_size",
                "length",
                "threads",
                "narrow",
            )
        ),
    ]


class CompiledDecoder(FusedDecoder):
    """FusedDecoder with the products and whole steps of decode_step.c."""

    def __init__(self) -> None:
        super().__init__()
        self.described: tuple[SlotCache, _Model, Any] | None = None
        """Cache, the C structs that describe it and the weights, and the memory that they refer to."""

    @staticmethod
    def is_supported(model: Model, dtype: torch.dtype) -> bool:
        """Return whether decode_step.c can compute every layer.

        It needs rotary embeddings in every layer, one epsilon for all norms, biases only for query, key and value, and
        a processor with AVX512_BF16 for bfloat16.
        """
        first = model.layers[0]
        return (
            FusedDecoder.is_supported(model, dtype)
            and is_on("decode_step")
            and model.embedding.is_cpu
            and model.embedding.dtype == torch.float32
            and (dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16()))
            and first.head_size % 8 == 0
            and first.head_size <= MAX_HEAD_SIZE
            and all(layer.rotary and all(part.bias is None for part in layer.linears[3:]) for layer in model.layers)
            and all({layer.epsilon, layer.mlp_epsilon} == {model.epsilon} for layer in model.layers)
            and all(layer.head_epsilon in (0.0, model.epsilon) for layer in model.layers)
            and library() is not None
        )

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return bfloat16 if that was asked for and the processor has products for it, else float32."""
        return torch.bfloat16 if dtype == torch.bfloat16 and has_bfloat16() else torch.float32

    @property
    def bias_dtype(self) -> torch.dtype:
        return torch.float32

    def padded_rows(self, rows: int) -> int:
        return rows

    def pack(self, weight: Tensor, before: Any) -> Panels:
        return Panels.of(weight, self.dtype)

    def release(self) -> None:
        self.described = None
        super().release()

    def refresh(self, model: Model, head: Tensor, dtype: torch.dtype) -> None:
        self.described = None
        dtype = self.cache_dtype(dtype)
        super().refresh(model, head, dtype)
        self.embedding = self.embedding.contiguous()
        for working, layer in zip(self.layers, model.layers, strict=True):
            filled = -layer.gate.weight.shape[0] % PANEL
            if filled:  # pad both halves to whole panels: the extra outputs are 0, as are the extra inputs of `down`
                halves = [F.pad(merged(half), (0, 0, 0, filled)) for half in (layer.gate, layer.up)]
                working.tensors["gate_up"] = Panels.of(torch.cat(halves), dtype)
                working.tensors["down"] = Panels.of(F.pad(merged(layer.down), (0, filled)), dtype)

    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        cache.zeroed = False  # a step reads only positions that were written
        return super().prefill(ids, cache)

    def logits(self, hidden_BH: Tensor) -> Tensor:
        return self.product(hidden_BH.to(self.dtype), self.head)

    def product(self, states: Tensor, weight: Panels, bias: Tensor | None = None) -> Tensor:
        return weight.product(states, bias)

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: SlotCache) -> Tensor:
        rows = len(tokens_B)
        if self.described is None or self.described[0] is not cache:
            self.described = (cache, *self._describe(cache))
        model = self.described[1]
        mixed = (model.heads + 2 * model.key_heads) * model.head_size
        numbers = model.hidden + mixed + model.heads * model.head_size + model.intermediate_size
        weights = model.threads * -(-cache.length // 8) * 8
        hidden, workspace = torch.empty(rows, model.hidden), torch.empty(rows * numbers + weights)
        tensors = (tokens_B.contiguous(), positions_B.contiguous(), hidden, workspace)
        library().step(ctypes.addressof(model), rows, *map(pointer, tensors))
        return hidden

    def _head_weight(self, head: Tensor) -> Panels:
        return Panels.of(head, self.dtype)

    def _describe(self, cache: SlotCache) -> tuple[_Model, Any]:
        """Return the C struct of the model, and the array of layers that it points to."""
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
            rotations=pointer(self.table),
            epsilon=self.model.epsilon,
            scaling=first.scaling,
            layer_count=len(self.layers),
            hidden=self.embedding.shape[1],
            intermediate_size=first.tensors["gate_up"].outputs // 2,
            heads=first.heads,
            key_heads=first.key_heads,
            head_size=first.head_size,
            length=cache.length,
            threads=torch.get_num_threads(),
            narrow=self.dtype == torch.bfloat16,
        )
        return model, layers

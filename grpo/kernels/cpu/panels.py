"""Products with weights in panels of 16 outputs, by decode_step.c: for the few rows of a decoding step, and for
bfloat16 inputs with a float32 result, which PyTorch does not have on a CPU."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.kernels.cpu.compiler import compiled, pointer
from grpo.kernels.cpu.ops import PANEL, operator

SOURCE = Path(__file__).with_name("decode_step.c")


@functools.cache
def has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 numbers in vectors (AVX512_BF16), as decode_step.c then
    does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return any(line.startswith("flags") and "avx512_bf16" in line.split() for line in lines)


def library() -> Any:
    """The functions of decode_step.c; None where it cannot be compiled."""
    return compiled(SOURCE, pack="iiipp", pack_bf16="iiipp", multiply="iiiiipppp", step="pipppp")


@operator("Tensor weight, Tensor(a!) panels")
def pack_panels(weight: Tensor, panels: Tensor) -> None:
    """weight [O, I] -> panels, in their dtype."""
    outputs, inputs = weight.shape
    pack = library().pack_bf16 if panels.dtype == torch.bfloat16 else library().pack
    pack(torch.get_num_threads(), inputs, outputs, pointer(weight), pointer(panels))


@operator("Tensor states, Tensor panels, int outputs, Tensor? bias, Tensor(a!) result")
def multiply_panels(states: Tensor, panels: Tensor, outputs: int, bias: Tensor | None, result: Tensor) -> None:
    """result [..., O] float32 = states [..., I], of the dtype of panels, times the weight, plus bias."""
    inputs = states.shape[-1]
    shape = (panels.dtype == torch.bfloat16, states.numel() // inputs, inputs, outputs)
    library().multiply(torch.get_num_threads(), *shape, *map(pointer, (states, panels, bias, result)))


@dataclass(frozen=True)
class Panels:
    """A weight [O, I] as [ceil(O / 16), I, 16], or in bfloat16 as [ceil(O / 16), I / 2, 16, 2], the last panel
    filled up with zeros."""

    tensor: Tensor
    outputs: int
    is_mkldnn = False

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype = torch.float32) -> "Panels":
        weight = weight.float().contiguous()
        outputs, inputs = weight.shape
        panels = torch.empty(-(-outputs // PANEL), inputs, PANEL, dtype=dtype)
        pack_panels(weight, panels)
        return cls(panels, outputs)

    def product(self, states: Tensor, bias: Tensor | None = None) -> Tensor:
        """states [..., I] and a float32 bias [O] or None -> [..., O] float32. With bfloat16 panels the states
        are rounded to bfloat16; sums are float32."""
        states = states.to(self.tensor.dtype).contiguous()
        result = torch.empty(*states.shape[:-1], self.outputs)
        multiply_panels(states, self.tensor, self.outputs, bias, result)
        return result

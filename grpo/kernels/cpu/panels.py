"""Products by decode_step.c with weights in panels of 16 outputs.

They serve the few rows of a decoding step, and bfloat16 inputs with a float32 result, which PyTorch does not have on a
CPU.
"""

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
    """Return whether the processor, and therefore decode_step.c, has bfloat16 vector products (AVX512_BF16)."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return any(line.startswith("flags") and "avx512_bf16" in line.split() for line in lines)


def library() -> Any:
    """Return the functions of decode_step.c. None if it cannot be compiled."""
    return compiled(SOURCE, pack="iiipp", pack_bf16="iiipp", multiply="iiiiipppp", step="pipppp")


@operator("Tensor weight, Tensor(a!) panels")
def pack_panels(weight: Tensor, panels: Tensor) -> None:
    """Write weight [O, I] into panels, in the dtype of the panels."""
    outputs, inputs = weight.shape
    pack = library().pack_bf16 if panels.dtype == torch.bfloat16 else library().pack
    pack(torch.get_num_threads(), inputs, outputs, pointer(weight), pointer(panels))


@operator("Tensor states, Tensor panels, int outputs, Tensor? bias, Tensor(a!) result")
def multiply_panels(states: Tensor, panels: Tensor, outputs: int, bias: Tensor | None, result: Tensor) -> None:
    """result [..., O] float32 = states [..., I], in the dtype of the panels, times the weight, plus bias."""
    inputs = states.shape[-1]
    shape = (panels.dtype == torch.bfloat16, states.numel() // inputs, inputs, outputs)
    library().multiply(torch.get_num_threads(), *shape, *map(pointer, (states, panels, bias, result)))


@dataclass(frozen=True)
class Panels:
    """A weight [O, I] in panels; the last one is padded with zeros.

    float32: [ceil(O / 16), I, 16]. bfloat16: [ceil(O / 16), I / 2, 16, 2] in memory.
    """

    tensor: Tensor
    outputs: int
    is_mkldnn = False

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype = torch.float32) -> "Panels":
        """Pack a weight [O, I]."""
        weight = weight.float().contiguous()
        outputs, inputs = weight.shape
        panels = torch.empty(-(-outputs // PANEL), inputs, PANEL, dtype=dtype)
        pack_panels(weight, panels)
        return cls(panels, outputs)

    def product(self, states: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply states by the weight.

        With bfloat16 panels, states are rounded to bfloat16. Sums are float32.

        Args:
            states: [..., I].
            bias: [O] float32, or None.

        Returns:
            [..., O] float32.
        """
        states = states.to(self.tensor.dtype).contiguous()
        result = torch.empty(*states.shape[:-1], self.outputs)
        multiply_panels(states, self.tensor, self.outputs, bias, result)
        return result

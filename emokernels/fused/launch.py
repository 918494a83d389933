"""A kernel launch as data: the launcher runs it, the audit compiles the very same thing without a GPU.

Every fused operation first builds its `Launch` from tensors and only then runs it. Built from tensors on the "meta"
device, the same code yields what `python -m emokernels.audit` compiles, so that the two can never differ.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""True when the kernels of this process run in Triton's interpreter (fixed when triton is imported)."""

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""What configuration tables are keyed by."""


class Config(NamedTuple):
    """Tile sizes and launch options of one kernel: what a static table holds per architecture, head size and dtype."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Launch:
    """One call of one Triton kernel.

    `args` are the run-time arguments by name (tensors, ints, floats, None for an absent tensor), `meta` the
    ``tl.constexpr`` ones. `writes` names the arguments the kernel writes, for tests and for the audit's listing.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    meta: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Launch on the current stream of the tensors' device."""
        if 0 in self.grid:
            return
        device = next(value.device for value in self.args.values() if isinstance(value, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch()
        else:
            self._launch()

    def _launch(self) -> None:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        self.kernel[self.grid](**self.args, **self.meta, **options)


def arch_of(tensor: Tensor, arch: str | None = None) -> str:
    """The architecture whose configurations serve `tensor`: `arch` when given, the interpreter takes "sm_90".

    >>> arch_of(torch.empty(1), "sm_80")
    'sm_80'
    """
    if arch is not None:
        return arch
    if tensor.device.type != "cuda":
        return "sm_90"
    major = torch.cuda.get_device_capability(tensor.device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def padded_dim(dim: int) -> int:
    """The head dimension as kernels tile it: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())

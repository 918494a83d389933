"""The definition in plain torch, readable beside docs/kernels.md; runs in any float dtype, float64 included."""

from .attention import attend
from .mlp import activate

__all__ = ["activate", "attend"]

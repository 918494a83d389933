"""The definition in plain torch, readable beside docs/kernels.md; runs in any float dtype, float64 included."""

from .attention import attend
from .flow import measure_flow
from .lens import measure_lens
from .mlp import activate

__all__ = ["activate", "attend", "measure_flow", "measure_lens"]

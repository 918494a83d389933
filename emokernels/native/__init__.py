"""The CUDA C++ kernels of csrc: attention of a few queries over many keys, and the gated activation. Forward only.

They are built when the package is installed with nvcc at hand, for torch's stable ABI, so one build serves all versions
of torch it was made for. Where they are missing or cannot run, `why_not` says so.
"""

from .activation import activate
from .attention import MAX_QUERIES, attend
from .library import why_not

__all__ = ["MAX_QUERIES", "activate", "attend", "why_not"]

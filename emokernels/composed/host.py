"""What the host may know of a tensor: values on a CPU are read freely, those of a device by waiting for it.

`composed` plans its calls from role layouts and tables, which are small. On a device they are read once per tensor and
version (`memo`), which makes the host wait in the first layer of a prefill; decode steps and CUDA graphs do without.
"""

from __future__ import annotations

import torch
from torch import Tensor


def owns(tensor: Tensor) -> bool:
    """True when the host reads the values of a tensor without waiting."""
    return tensor.is_cpu


def read(tensor: Tensor) -> Tensor:
    """The values of a tensor on the CPU. Waits until its device has computed them."""
    return tensor.detach().cpu()


def capturing() -> bool:
    """True while a CUDA graph is recorded: nothing can be read, and what was read before need not hold at replay."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

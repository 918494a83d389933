"""The activations of the gated MLP, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * x)
    return grad * (gate + 1.702 * x * gate * (1 - gate))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "relu": F.relu,
    "quick_gelu": _quick_gelu,
}
"""Name (as in the Hugging Face configurations) to function. gelu_new is gelu_pytorch_tanh."""

ACT_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward.default,
    "gelu": torch.ops.aten.gelu_backward.default,
    "gelu_pytorch_tanh": lambda grad, x: torch.ops.aten.gelu_backward.default(grad, x, approximate="tanh"),
    "gelu_new": lambda grad, x: torch.ops.aten.gelu_backward.default(grad, x, approximate="tanh"),
    "relu": lambda grad, x: grad * (x > 0),
    "quick_gelu": _quick_gelu_backward,
}
"""``(grad of act(x), x) -> grad of x``."""

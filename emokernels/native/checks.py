"""What both native ops refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import message

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WAY_OUT = "Use backend='fused' or 'composed'."


def check_input(name: str, tensor: Tensor) -> None:
    """NotImplementedError unless the kernels can read `tensor` through its strides."""
    if tensor.dtype not in DTYPES:
        raise NotImplementedError(
            message(name, "float32, float16 or bfloat16 for 'native'", tensor, "Use backend='reference' or 'composed'.")
        )
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise NotImplementedError(
            message(
                name,
                "a last dimension with stride 1 for 'native'",
                f"strides {tuple(tensor.stride())}",
                f"Pass {name}.contiguous(), or use backend='fused' or 'composed'.",
            )
        )


def refuse_gradient(**inputs: Tensor | None) -> None:
    """NotImplementedError when gradients are recorded and an input wants one: these kernels are forward only."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in inputs.items():
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                message(name, "inputs that need no gradient for 'native'", "one with requires_grad=True", WAY_OUT)
            )


def called_directly(tensor: Tensor) -> bool:
    """True when torch's dispatcher has nothing to add: eager mode, a plain tensor, no mode active."""
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and torch._C._len_torch_dispatch_stack() == 0

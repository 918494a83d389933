"""Measurements are forward only: a gradient through them is refused before anything runs, never dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import message


def refuse_gradients(operation: str, **inputs: Tensor | None) -> None:
    """NotImplementedError naming the first input that wants a gradient, unless gradients are off."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in inputs.items():
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                message(
                    name,
                    f"an input that needs no gradient ({operation} is forward only)",
                    "one with requires_grad=True",
                    "Call it under torch.no_grad(), or detach the input.",
                )
            )


def make_forward_only(op: Any) -> None:
    """Give a custom op the autograd rule of a measurement, for callers that reach the op itself."""

    def refuse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        raise NotImplementedError(
            f"inputs: expected inputs that need no gradient, got some with requires_grad=True ({op._qualname} is "
            "forward only). Call it under torch.no_grad(), or detach the inputs."
        )

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{op._qualname} has no derivative")

    op.register_autograd(backward, setup_context=refuse)

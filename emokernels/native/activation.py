"""The gated activation with neuron edits, on the CUDA kernels of csrc."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import message
from . import library
from .checks import WAY_OUT, called_directly, check_input, refuse_gradient

ACTS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3, "quick_gelu": 4}
"""Names to the numbers of Act in csrc/include/activation.cuh."""


def activate(
    gate: Tensor,
    up: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    replace: Tensor | None,
    mask: Tensor | None,
    act: str,
) -> Tensor:
    """``a = act(gate) * up`` with edited columns, contiguous ``[..., F]`` in gate's dtype.

    Arguments as in `emokernels.gated_activation`. Computed in float32 and rounded once; one read of gate and up, one
    write, edits in the same launch.

    Raises:
        NotImplementedError: float64, a last dimension with a stride, or an input that wants a gradient.
    """
    refuse_gradient(gate=gate, up=up, scale=scale, shift=shift, replace=replace)
    _check(gate, up)
    implementation = _activate if called_directly(gate) else gated_activation
    return implementation(gate, up, index, scale, shift, replace, mask, act)


def _check(gate: Tensor, up: Tensor | None) -> None:
    check_input("gate", gate)
    if up is not None:
        check_input("up", up)


def _activate(
    gate: Tensor,
    up: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    replace: Tensor | None,
    mask: Tensor | None,
    act: str,
) -> Tensor:
    _check(gate, up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    library.ops().gated_activation(
        _three_dimensional(gate),
        None if up is None else _three_dimensional(up),
        None if index is None else index.contiguous(),
        *(None if value is None else value.float() for value in (scale, shift, replace)),
        mask,
        ACTS[act],
        out,
    )
    return out


def _three_dimensional(x: Tensor) -> Tensor:
    """[B, N, F] whatever the leading dimensions are."""
    return x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])


def _refuse(ctx: Any, *inputs: Any, **named: Any) -> Any:
    raise NotImplementedError(
        message("gate", "inputs that need no gradient for 'native'", "one with requires_grad=True", WAY_OUT)
    )


gated_activation = torch.library.custom_op(
    "emokernels::gated_activation_native",
    _activate,
    mutates_args=(),
    schema=(
        "(Tensor gate, Tensor? up, Tensor? index, Tensor? scale, Tensor? shift, Tensor? replace, Tensor? mask, "
        "str act) -> Tensor"
    ),
)
gated_activation.register_fake(lambda gate, *rest: torch.empty_like(gate, memory_format=torch.contiguous_format))
gated_activation.register_autograd(_refuse, setup_context=_refuse)

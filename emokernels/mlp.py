"""The gated activation of an MLP with sparse neuron edits: the public function and its ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import composed, native, reference
from .acts import ACT_BACKWARDS, ACTS
from .backends import resolve
from .checks import FLOATS
from .errors import message, require_tensor
from .neurons import NeuronEdits

_ARGUMENTS = (
    "Tensor gate, Tensor? up, Tensor? index, Tensor? scale, Tensor? shift, Tensor? replace, Tensor? mask, str act"
)
_FORWARD = 8
"""How many arguments these are."""
_DIFFERENTIABLE = (0, 1, 3, 4, 5)
"""Positions of gate, up, scale, shift and replace."""
_ALL = (True,) * len(_DIFFERENTIABLE)


def gated_activation(
    gate: Tensor,
    up: Tensor | None,
    *,
    act: str = "silu",
    neurons: NeuronEdits | None = None,
    backend: str = "auto",
) -> Tensor:
    """``a = act(gate) * up`` (or ``act(gate)`` with ``up=None``) with edits on a few neurons, the input of down_proj.

    Args:
        gate: ``[B, N, F]`` (any leading dimensions without neurons), float32, bfloat16, float16 or float64.
        up: like gate, or None for an MLP without gate.
        act: "silu", "gelu", "gelu_pytorch_tanh" (also called "gelu_new"), "relu" or "quick_gelu".
        neurons: edits of indexed columns of a; the others are not touched. Costs time in proportion to the number of
            edited neurons, never to F.
        backend: "auto", "reference", "composed", "fused" or "native" (forward only), see `backends()`. Halves of one
            tensor ``[..., 2F]`` and other views are read where they are, without a copy.

    Returns:
        a, contiguous, in gate's dtype and shape; fresh memory. "composed" rounds like Hugging Face's
        ``act_fn(gate) * up``; "reference" and "fused" compute in float32 ("reference" in float64 for float64) and
        round once. Differentiable in gate, up and the values of the edits.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `attention`.
    """
    _check(gate, up, act, neurons)
    chosen = resolve(backend, gate, "gated_activation")
    return run_activation(gate, up, act=act, neurons=neurons, backend=chosen)


def run_activation(
    gate: Tensor, up: Tensor | None, *, act: str = "silu", neurons: NeuronEdits | None = None, backend: str = "composed"
) -> Tensor:
    """`gated_activation` without validation, for callers that have validated once."""
    index = scale = shift = replace = mask = None
    if neurons is not None:
        index, scale, shift = neurons.index, neurons.scale, neurons.shift
        replace, mask = neurons.replace, neurons.mask
    if (
        backend in _DIRECT
        and not torch.compiler.is_compiling()
        and type(gate) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and not (
            torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in (gate, up, scale, shift, replace))
        )
    ):
        return _DIRECT[backend](gate, up, index, scale, shift, replace, mask, act)
    return _OPS[backend](gate, up, index, scale, shift, replace, mask, act)


def _check(gate: Tensor, up: Tensor | None, act: str, neurons: NeuronEdits | None) -> None:
    require_tensor("gate", gate, "Pass the output of gate_proj, or of fc1 with up=None.")
    if gate.dtype not in FLOATS:
        raise TypeError(message("gate", "float32, bfloat16, float16 or float64", gate, "Convert with .float()."))
    if gate.dim() < 1 or 0 in gate.shape:
        raise ValueError(message("gate", "a non-empty tensor [B, N, F]", gate, "Skip the call for empty input."))
    if up is not None:
        require_tensor("up", up, "Pass the output of up_proj, or None.")
        if up.dtype != gate.dtype:
            raise TypeError(message("up", f"the dtype of gate ({gate.dtype})", up, "Convert both to one dtype."))
        if up.shape != gate.shape or up.device != gate.device:
            raise ValueError(
                message(
                    "up", f"shape {tuple(gate.shape)} on {gate.device} like gate", up, "gate and up belong together."
                )
            )
    if act not in ACTS:
        known = ", ".join(repr(name) for name in ACTS)
        raise ValueError(
            message("act", f"one of {known}", act, "Name the activation as the model's configuration does.")
        )
    if neurons is not None:
        if not isinstance(neurons, NeuronEdits):
            raise TypeError(
                message("neurons", "NeuronEdits or None", neurons, "Build emokernels.NeuronEdits(index, ...).")
            )
        if gate.dim() != 3:
            raise ValueError(
                message("gate", "shape [B, N, F] with neurons", gate, "Add batch and position dimensions.")
            )
        neurons.check_against(gate.shape[0], gate.shape[1], gate.shape[2], gate.device)


def _gradients(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    replace: Tensor | None,
    mask: Tensor | None,
    act: str,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Gradients of gate, up, scale, shift, replace in plain torch, in float32 (float64) inside and rounded once."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    x = gate.to(wide)
    da = grad.to(wide)
    hidden = ACTS[act](x)
    dscale = dshift = dreplace = None
    if index is not None:
        columns = (
            index.expand(*gate.shape[:-1], -1) if index.dim() == 1 else index[:, None].expand(*gate.shape[:-1], -1)
        )
        kept = da.gather(-1, columns)
        if mask is not None and replace is not None:
            dreplace = _sum_to(torch.where(mask, kept, 0.0), replace)
            kept = torch.where(mask, 0.0, kept)
        if shift is not None:
            dshift = _sum_to(kept, shift)
        if scale is not None:
            a = hidden.gather(-1, columns)
            if up is not None:
                a = a * up.to(wide).gather(-1, columns)
            dscale = _sum_to(kept * a, scale)
            kept = kept * scale.to(wide)
        da = da.scatter(-1, columns, kept)
    dup = None if up is None else (da * hidden).to(up.dtype)
    dgate = ACT_BACKWARDS[act](da if up is None else da * up.to(wide), x).to(gate.dtype)
    return dgate, dup, dscale, dshift, dreplace


def _sum_to(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum_to_size(like.shape).to(like.dtype)


def _register(name: str, forward: Callable[..., Tensor], gradients: Callable[..., Sequence[Tensor | None]]) -> Any:
    def kernel_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        args, given, wanted = _split(args)
        grads = gradients(grad, *args, wanted)
        return tuple(
            args[0].new_empty(0) if t is None or not want else torch.zeros_like(t) if g is None else g.contiguous()
            for t, want, g in zip(given, wanted, grads, strict=True)
        )

    def fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        args, given, wanted = _split(args)
        return tuple(
            args[0].new_empty(0)
            if t is None or not want
            else torch.empty_like(t, memory_format=torch.contiguous_format)
            for t, want in zip(given, wanted, strict=True)
        )

    backward_op = torch.library.custom_op(
        f"emokernels::{name}_backward",
        kernel_backward,
        mutates_args=(),
        schema=f"(Tensor grad, {_ARGUMENTS}, bool[]? wanted=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    backward_op.register_fake(fake_backward)

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"backend: expected a first derivative, got a second derivative of emokernels::{name}. "
            "Write act(gate) * up in plain torch where second derivatives are needed."
        )

    backward_op.register_autograd(refuse)
    op = torch.library.custom_op(f"emokernels::{name}", forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
    op.register_fake(lambda gate, *rest: torch.empty_like(gate, memory_format=torch.contiguous_format))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.act = inputs[-1]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        grads = backward_op(grad, *ctx.saved_tensors, ctx.act, wanted)
        by_input: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for position, g, want in zip(_DIFFERENTIABLE, grads, wanted, strict=True):
            by_input[position] = g if want else None
        return tuple(by_input)

    op.register_autograd(backward, setup_context=setup_context)
    return op


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor | None], Sequence[bool]]:
    """Arguments of the forward op, the differentiable ones among them, and which gradients a backward op was asked."""
    forward, rest = args[:_FORWARD], args[_FORWARD:]
    return forward, [forward[i] for i in _DIFFERENTIABLE], rest[0] if rest and rest[0] is not None else _ALL


def _fused(*args: Any) -> Tensor:
    from .fused import mlp  # imports triton

    return mlp.activate(*args)


def _fused_gradients(*args: Any) -> Sequence[Tensor | None]:
    from .fused import mlp_backward

    return mlp_backward.gradients(*args)


_DIRECT: dict[str, Callable[..., Tensor]] = {"composed": composed.activate, "fused": _fused}
"""Backends that `run_activation` calls without the dispatcher where no gradient and no trace is asked for."""

_OPS: dict[str, Any] = {
    "reference": _register("gated_activation_reference", reference.activate, _gradients),
    "composed": _register("gated_activation_composed", composed.activate, _gradients),
    "fused": _register("gated_activation_fused", _fused, _fused_gradients),
    "native": native.activate,  # an op of its own, forward only
}

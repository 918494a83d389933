"""How a backend becomes a torch op: one schema, one fake and one autograd rule for every attention backend.

The ops are opaque to the compiler, read their tables from memory at every call (so refilling a table never recompiles),
honour strides and never return an alias of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import message
from .heads import HeadEdits
from .problem import Problem

_PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor? roles, Tensor? query_roles, Tensor? bias, Tensor? factor, "
    "Tensor? magnitude, Tensor? gain, Tensor? mask, Tensor? lengths, "
    "bool causal, float scale, int window, float softcap"
)
_DIFFERENTIABLE = (0, 1, 2, 5, 6, 7, 8)
"""Positions in Problem of q, k, v, bias, factor, magnitude, gain."""
_MASK = 9
TENSORS = 11
"""The first eleven fields of Problem are tensors or None."""

_EXTRAS = (
    "Tensor? head_scale, Tensor? head_shift, Tensor? head_replace, Tensor? head_mask, "
    "Tensor? prefix_k, Tensor? prefix_v"
)

Forward = Callable[[Problem], tuple[Tensor, Tensor]]
Backward = Callable[[Problem, Tensor, Tensor, Tensor, Tensor, Sequence[bool]], list[Tensor | None]]


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh z ``[B, H, N, D]`` laid out as [B, N, H, D] in memory (what o_proj reads), and lse ``[B, H, N]``."""
    batch, heads, n, dim = q.shape
    z = q.new_empty(batch, n, heads, dim).transpose(1, 2)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return z, q.new_empty(batch, heads, n, dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    if ctx.needs_input_grad[_MASK]:
        raise NotImplementedError(
            "mask: expected a mask that needs no gradient, got one with requires_grad=True. "
            "Detach the mask, or learn a Routes.bias instead, which is differentiable."
        )
    ctx.save_for_backward(*inputs[:TENSORS], *output)
    ctx.numbers = inputs[TENSORS:]


def _spread(grads: Sequence[Tensor | None], count: int) -> tuple[Tensor | None, ...]:
    out: list[Tensor | None] = [None] * count
    for position, grad in zip(_DIFFERENTIABLE, grads, strict=True):
        out[position] = grad
    return tuple(out)


def register_recomputed(name: str, forward: Forward) -> Any:
    """An attention op whose gradient is plain autograd through `forward`, recomputed; also differentiable twice."""

    def kernel(*args: Any) -> tuple[Tensor, Tensor]:
        return forward(Problem(*args))

    def backward(ctx: Any, grad_z: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors[:TENSORS]
        again = torch.is_grad_enabled()
        wanted = [i for i in _DIFFERENTIABLE if ctx.needs_input_grad[i]]
        with torch.enable_grad():
            inputs = list(saved)
            for i in wanted:
                # A view, so that the gradient is taken with respect to this use of the tensor only.
                inputs[i] = saved[i].view_as(saved[i]) if again else saved[i].detach().requires_grad_()
            outputs = forward(Problem(*inputs, *ctx.numbers))
            grads = torch.autograd.grad(
                outputs, [inputs[i] for i in wanted], (grad_z, grad_lse), create_graph=again, allow_unused=True
            )
        by_position = dict(zip(wanted, grads, strict=True))
        return _spread([by_position.get(i) for i in _DIFFERENTIABLE], len(ctx.needs_input_grad))

    return _define(name, kernel, backward)


def register_with_backward(name: str, forward: Forward, backward_kernel: Backward) -> Any:
    """An attention op with a backward of its own, which is an op too and refuses to be differentiated again."""
    pieces = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"

    def kernel(*args: Any) -> tuple[Tensor, Tensor]:
        return forward(Problem(*args))

    def kernel_backward(
        grad_z: Tensor, grad_lse: Tensor, z: Tensor, lse: Tensor, wanted: list[bool], *args: Any
    ) -> Any:
        problem = Problem(*args)
        grads = backward_kernel(problem, grad_z, grad_lse, z, lse, wanted)
        return tuple(problem.q.new_empty(0) if grad is None else grad for grad in grads)

    def fake_backward(grad_z: Tensor, grad_lse: Tensor, z: Tensor, lse: Tensor, wanted: list[bool], *args: Any) -> Any:
        return tuple(
            torch.empty_like(args[position], memory_format=torch.contiguous_format) if want else args[0].new_empty(0)
            for position, want in zip(_DIFFERENTIABLE, wanted, strict=True)
        )

    backward_op = torch.library.custom_op(
        f"emokernels::{name}_backward",
        kernel_backward,
        mutates_args=(),
        schema=f"(Tensor grad_z, Tensor grad_lse, Tensor z, Tensor lse, bool[] wanted, {_PROBLEM}) -> ({pieces})",
    )
    backward_op.register_fake(fake_backward)

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"backend: expected a first derivative, got a second derivative of emokernels::{name}. "
            "Use backend='reference', which is differentiable any number of times."
        )

    backward_op.register_autograd(refuse)

    def backward(ctx: Any, grad_z: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        grads = backward_op(grad_z, grad_lse, *saved[TENSORS:], wanted, *saved[:TENSORS], *ctx.numbers)
        kept = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return _spread(kept, len(ctx.needs_input_grad))

    return _define(name, kernel, backward)


def register_forward_only(
    name: str,
    forward: Callable[[Problem, HeadEdits | None, tuple[Tensor, Tensor] | None], tuple[Tensor, Tensor]],
    way_out: str,
) -> Any:
    """An attention op that also takes head edits and a prefix, and refuses inputs that want a gradient."""

    def kernel(*args: Any) -> tuple[Tensor, Tensor]:
        scale, shift, replace, mask, prefix_k, prefix_v = args[-6:]
        edited = any(x is not None for x in (scale, shift, mask))
        heads = HeadEdits(scale, shift, replace, mask) if edited else None
        return forward(Problem(*args[:-6]), heads, None if prefix_k is None else (prefix_k, prefix_v))

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            message("q", "inputs that need no gradient", "an input with requires_grad=True", f"Use {way_out}.")
        )

    op = torch.library.custom_op(
        f"emokernels::{name}", kernel, mutates_args=(), schema=f"({_PROBLEM}, {_EXTRAS}) -> (Tensor z, Tensor lse)"
    )
    op.register_fake(lambda q, *rest: empty_outputs(q))
    op.register_autograd(refuse)
    return op


def _define(name: str, kernel: Callable[..., tuple[Tensor, Tensor]], backward: Callable[..., Any]) -> Any:
    op = torch.library.custom_op(
        f"emokernels::{name}", kernel, mutates_args=(), schema=f"({_PROBLEM}) -> (Tensor z, Tensor lse)"
    )
    op.register_fake(lambda q, *rest: empty_outputs(q))
    op.register_autograd(backward, setup_context=_setup_context)
    return op

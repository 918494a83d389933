"""Attention with routes and head edits: the public function, and the entry without validation for patched models."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import composed, native, reference
from .backends import resolve
from .checks import check_attention
from .composed.backward import attend_backward
from .heads import HeadEdits, apply_head_edits
from .ops import register_forward_only, register_recomputed, register_with_backward
from .problem import Problem, make_problem
from .routes import Routes

logger = logging.getLogger("emokernels")

Prefix = tuple[Tensor, Tensor]
"""Keys and values ``[1, Hkv, P, D]`` that all batch rows share."""


def _fused(problem: Problem) -> tuple[Tensor, Tensor]:
    from .fused.attention import attend

    z, lse = attend(problem)
    return z, lse  # type: ignore[return-value]  # lse is there unless it is declined


def _fused_backward(problem: Problem, *args: Any) -> list[Tensor | None]:
    from .fused.backward import attend_backward

    return attend_backward(problem, *args)


def _fused_edited(problem: Problem, heads: HeadEdits | None, prefix: Prefix | None) -> tuple[Tensor, Tensor]:
    from .fused.attention import attend

    z, lse = attend(problem, heads, prefix=prefix)
    return z, lse  # type: ignore[return-value]


_OPS: dict[str, Any] = {
    "reference": register_recomputed("attention_reference", reference.attend),
    "composed": register_with_backward("attention_composed", composed.attend_with_lse, attend_backward),
    "fused": register_with_backward("attention_fused", _fused, _fused_backward),
}
_fused_forward = register_forward_only("attention_fused_edited", _fused_edited, "backend='composed'")
_announced: set[str] = set()


class AttentionOutput(NamedTuple):
    """z ``[B, H, N, D]`` in q's dtype; lse ``[B, H, N]`` float32 (float64 for float64 q), natural logarithm."""

    z: Tensor
    lse: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    roles: Tensor | None = None,
    query_roles: Tensor | None = None,
    routes: Routes | None = None,
    heads: HeadEdits | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    prefix: Prefix | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """Softmax attention whose logits, weights and outputs are changed per head and per route.

    For query i of role d and key j of role r (docs/kernels.md)::

        s   = scale * <q_i, k_j>;  s = softcap * tanh(s / softcap)
        s'  = routes.scale[d, r] * s + routes.abs[d, r] * |s| + routes.bias[d, r] (+ additive mask)
        p   = softmax over the visible keys of s';   lse = logsumexp over the visible keys of s'
        z   = sum_j p_j * routes.gain[d, r] * v_j    (not renormalised)
        z'  = heads.scale * z + heads.shift, or heads.replace where heads.mask

    A boost never revives a masked key. A query that sees no key gets z = 0 and lse = -inf.

    Args:
        q: ``[B, H, N, D]`` float32, float64, bfloat16 or float16, any strides.
        k: ``[B, Hkv, K, D]`` like q, with H a multiple of Hkv.
        v: like k.
        roles: ``[B|1, K]`` uint8, the Role of every key. Needed with routes.
        query_roles: ``[B|1, N]`` uint8; by default the roles of the last N keys.
        routes: tables ``[B|1, H, R, R]``, differentiable. None changes nothing.
        heads: edits of z. None changes nothing.
        mask: ``[B|1, 1|H, N, K]``, bool (True = attend) or additive float. Additive values of -inf or the dtype's
        lowest
            finite number mask. Applies together with `causal` and `window`; not differentiable.
        lengths: ``[B|1]`` int32, the number of keys that exist yet, on q's device: the rest of a static cache is
            hidden, and `causal` and `window` count from ``lengths`` instead of K. Needs query_roles with routes.
        prefix: ``(k, v)`` of ``[1, Hkv, P, D]`` that come before the keys of every batch row and are read once for all
            of them. roles and mask then cover P + K columns, and K counts them below.
        causal: query i sees keys ``j <= i + K - N`` (bottom-right aligned; needs N <= K).
        scale: multiplies the logits; by default ``D ** -0.5``.
        window: query i sees keys ``j > i + K - N - window``; needs `causal`.
        softcap: caps logits before the routes, as Gemma 2 does.
        backend: "auto", "reference", "composed", "fused" or "native" (see `backends()`).

    Returns:
        AttentionOutput(z, lse). z is fresh memory, in the layout of stock attention's output or as [B, N, H, D], which
        o_proj reads without a copy. lse does not depend on gain or head edits.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and the way out.
        NotImplementedError: the backend is not available here, or a gradient was asked that does not exist.
    """
    check_attention(
        q, k, v, roles, query_roles, routes, heads, mask, lengths, prefix, causal, scale, window, softcap
    )  # fmt: skip
    chosen = resolve(backend, q)
    if backend == "auto" and chosen not in _announced and not torch.compiler.is_compiling():
        _announced.add(chosen)
        logger.info("backend='auto' uses %r for attention on %s", chosen, q.device.type)
    z, lse = run(
        q,
        k,
        v,
        roles=roles,
        query_roles=query_roles,
        routes=routes,
        heads=heads,
        mask=mask,
        lengths=lengths,
        prefix=prefix,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        need_lse=True,
        backend=chosen,
    )
    return AttentionOutput(z, lse)  # type: ignore[arg-type]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    roles: Tensor | None = None,
    query_roles: Tensor | None = None,
    routes: Routes | None = None,
    heads: HeadEdits | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    prefix: Prefix | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    need_lse: bool = False,
    backend: str = "composed",
) -> tuple[Tensor, Tensor | None]:
    """`attention` without validation, for callers that have validated once and call every layer and step.

    Arguments as in `attention`; `backend` must be a name that `resolve` returned. lse is None unless `need_lse`.
    Without routes and with `need_lse=False` this is exactly ``F.scaled_dot_product_attention`` with the arguments that
    Hugging Face's sdpa path gives it, so an unedited layer stays bit for bit what it was.
    """
    problem = make_problem(q, k, v, roles, query_roles, routes, mask, causal, scale, window, softcap, lengths)
    direct = _callable_directly(problem)
    if backend == "fused" and (direct or not torch.is_grad_enabled()):
        if direct:
            from .fused.attention import attend

            return attend(problem, heads, need_lse, prefix)
        edits = (None,) * 4 if heads is None else (heads.scale, heads.shift, heads.replace, heads.mask)
        return _fused_forward(*problem, *edits, *(prefix or (None, None)))
    if prefix is not None:
        problem = problem.prepend(prefix)
    if backend != "reference" and backend != "native":
        problem = problem.fold_lengths()
    lse: Tensor | None
    if backend == "native":
        z, lse = native.attend(problem, need_lse)
    elif backend == "composed" and not need_lse and composed.is_plain(problem):
        z, lse = composed.plain(problem), None
    elif backend == "composed" and direct:
        z, lse = composed.attend(problem, need_lse)
    else:
        z, lse = _OPS[backend](*problem)
    if heads is not None:
        z = apply_head_edits(z, heads, inplace=not torch.is_grad_enabled() and not torch.compiler.is_compiling())
    return z, lse


def prepare_step(
    q: Tensor, k: Tensor, v: Tensor, *, roles: Tensor, query_roles: Tensor, routes: Routes, backend: str = "composed"
) -> composed.Step | None:
    """Analyse a decode step once, for callers that keep the tables and the roles of a generation frozen.

    The result maps ``(q, k, v, step_mask(mask), scale)`` to z, without looking at roles and tables again: until the
    last step the tables stay unwritten, the keys there are keep their roles, and keys that follow are GENERATED. None
    when that is not possible (devices other than CPUs, half precision, routes from GENERATED keys, mixed queries).
    """
    if backend != "composed":
        return None
    return composed.prepare_step(make_problem(q, k, v, roles, query_roles, routes, None, False, None, None, None))


def step_mask(mask: Tensor | None, dtype: torch.dtype) -> composed.StepMask | None:
    """The mask of a decode step as prepared steps take it; make it once and give it to every layer of the step."""
    return (
        None if mask is None else composed.StepMask.of(mask, torch.float64 if dtype == torch.float64 else torch.float32)
    )


def _callable_directly(problem: Problem) -> bool:
    """True when the dispatcher has nothing to add: eager mode, plain tensors, no gradient wanted, no mode active."""
    if torch.compiler.is_compiling() or type(problem.q) is not Tensor or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(isinstance(t, Tensor) and t.requires_grad for t in problem)

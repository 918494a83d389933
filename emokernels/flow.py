"""Attention flow: how much attention, or how much influence on a loss, every route of every head carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import composed, reference
from .backends import resolve
from .checks import check_attention
from .errors import message, require_tensor
from .forward_only import make_forward_only, refuse_gradients
from .ops import _PROBLEM
from .problem import Problem, make_problem
from .routes import ROLES, Routes

Flow = Callable[[Problem, Tensor | None], Tensor]


def attention_flow(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    roles: Tensor,
    query_roles: Tensor | None = None,
    grad_z: Tensor | None = None,
    routes: Routes | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention per route: the mass it carries, or with `grad_z` its saliency, without keeping an N x K matrix.

    With ``A_ij = p_ij * routes.gain[d, r]``, the weights by which `attention` multiplies the values (softmax weights
    where there is no gain), summed over the queries i of role d and the keys j of role r::

        mass      flow[b, h, d, r] = sum_ij A_ij
        saliency  flow[b, h, d, r] = sum_ij |A_ij * dL/dA_ij|      dL/dA_ij = <grad_z_i, v_j>

    The second is the information flow of Wang et al. ("Label words are anchors", 2023) before it is divided by the
    number of pairs. Because ``dL/dp = gain * dL/dA``, it is also ``|p * dL/dp|``: one number, whichever of the two
    is called the attention weight. Every role is counted, PAD like any other, and a query that sees no key adds 0.
    Rows of the result sum to the number of queries of that role that see a key, as long as no gain is given.

    Args:
        q: ``[B, H, N, D]`` float32, float64, bfloat16 or float16, any strides.
        k: ``[B, Hkv, K, D]`` like q, with H a multiple of Hkv.
        v: like k. Read with `grad_z` only, and may be None without it.
        roles: ``[B|1, K]`` uint8, the Role of every key.
        query_roles: ``[B|1, N]`` uint8; by default the roles of the last N keys.
        grad_z: ``[B, H, N, D]`` in q's dtype, any strides: the gradient of a loss with respect to the output of
            attention *before* head edits.
        routes: tables ``[B|1, H, R, R]`` as in `attention`: measures the model as it is patched.
        mask, causal, scale, window, softcap: as in `attention`.
        backend: "auto", "reference", "composed" or "fused" (see `backends()`).

    Returns:
        ``[B, H, R, R]`` float32 (float64 for float64 q), indexed [row, head, destination role, source role], the
        shape of a Routes table.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and the way out.
        NotImplementedError: the backend is not available here, or an input wants a gradient (forward only).
    """
    _check(q, k, v, roles, query_roles, grad_z, routes, mask, causal, scale, window, softcap)
    chosen = resolve(backend, q, "attention_flow")
    return run_flow(
        q,
        k,
        v,
        roles=roles,
        query_roles=query_roles,
        grad_z=grad_z,
        routes=routes,
        mask=mask,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        backend=chosen,
    )


def run_flow(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    roles: Tensor,
    query_roles: Tensor | None = None,
    grad_z: Tensor | None = None,
    routes: Routes | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "composed",
) -> Tensor:
    """`attention_flow` without validation, for callers that have validated once."""
    if query_roles is None:
        query_roles = roles[:, k.shape[2] - q.shape[2] :]
    # The values are not read without a gradient; the keys stand in for them.
    values = k if v is None or grad_z is None else v
    problem = make_problem(q, k, values, roles, query_roles, routes, mask, causal, scale, window, softcap)
    return _OPS[backend](grad_z, *problem)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    roles: Tensor,
    query_roles: Tensor | None,
    grad_z: Tensor | None,
    routes: Routes | None,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> None:
    if roles is None:
        raise ValueError(message("roles", "[B|1, K] uint8", None, "Say what every key is with emokernels.Role."))
    check_attention(
        q,
        k,
        k if v is None else v,
        roles,
        query_roles,
        routes,
        heads=None,
        mask=mask,
        lengths=None,
        prefix=None,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    if query_roles is None and q.shape[2] > k.shape[2]:
        raise ValueError(
            message(
                "query_roles",
                f"[B|1, N={q.shape[2]}] when N > K={k.shape[2]}",
                None,
                "Say what every query is with emokernels.Role.",
            )
        )
    if grad_z is not None:
        require_tensor("grad_z", grad_z, "Pass the gradient of a loss with respect to attention's z.")
        if v is None:
            raise ValueError(message("v", "a tensor [B, Hkv, K, D] with grad_z", None, "Saliency reads the values."))
        if grad_z.dtype != q.dtype:
            raise TypeError(
                message("grad_z", f"the dtype of q ({q.dtype})", grad_z, "Convert with grad_z.to(q.dtype).")
            )
        if grad_z.shape != q.shape:
            raise ValueError(
                message("grad_z", f"the shape of q and z {tuple(q.shape)}", grad_z, "Transpose [B, N, H, D] first.")
            )
        if grad_z.device != q.device:
            raise ValueError(message("grad_z", f"the device of q ({q.device})", grad_z, "Move it with .to(q.device)."))
    tables = {} if routes is None else {f"routes.{name}": table for name, table in routes.tables()}
    refuse_gradients("attention_flow", q=q, k=k, v=v, grad_z=grad_z, **tables)


def _fused(problem: Problem, grad_z: Tensor | None) -> Tensor:
    from .fused.flow import measure_flow

    return measure_flow(problem, grad_z)


def _register(name: str, forward: Flow) -> Any:
    def kernel(grad_z: Tensor | None, *args: Any) -> Tensor:
        return forward(Problem(*args), grad_z)

    def fake(grad_z: Tensor | None, q: Tensor, *args: Any) -> Tensor:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_empty(q.shape[0], q.shape[1], ROLES, ROLES, dtype=wide)

    op = torch.library.custom_op(
        f"emokernels::attention_flow_{name}", kernel, mutates_args=(), schema=f"(Tensor? grad_z, {_PROBLEM}) -> Tensor"
    )
    op.register_fake(fake)
    make_forward_only(op)
    return op


_OPS: dict[str, Any] = {
    "reference": _register("reference", reference.measure_flow),
    "composed": _register("composed", composed.measure_flow),
    "fused": _register("fused", _fused),
}

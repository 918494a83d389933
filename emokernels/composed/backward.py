"""The gradient of routed attention, flash style: scores are recomputed tile by tile from q, k and the saved lse.

With ``p = exp(s' - lse)`` and ``z = sum_j p_j g_j v_j``:

    dp_j  = g_j <dz, v_j>          dg_j = p_j <dz, v_j>         dv_j = p_j g_j dz
    ds'_j = p_j (dp_j - <dz, z> + dlse)
    db = ds', da = ds' s, dc = ds' |s|, ds = ds' (a + c sign s), each summed over the pairs of a (dst, src) route.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import Problem
from ..routes import ROLES
from .tiles import Cut, Tiles


def attend_backward(
    problem: Problem, grad_z: Tensor, grad_lse: Tensor, z: Tensor, lse: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v, bias, factor, magnitude, gain; None where not wanted."""
    wide = lse.dtype
    tiles = Tiles(problem, wide)
    targets = (problem.q, problem.k, problem.v, problem.bias, problem.factor, problem.magnitude, problem.gain)
    sums = [
        torch.zeros(target.shape, dtype=wide, device=target.device) if want and target is not None else None
        for target, want in zip(targets, wanted, strict=True)
    ]
    grad_z = grad_z.to(wide)
    # Softmax pulls every logit of a row down by <dz, z>; a gradient of lse pushes them up.
    pull = (grad_z * z.to(wide)).sum(-1) - grad_lse.to(wide)
    for cut in tiles.cuts():
        _accumulate(tiles, cut, grad_z, lse, pull, sums)
    return [
        None if total is None or target is None else total.to(target.dtype)
        for total, target in zip(sums, targets, strict=True)
    ]


def _accumulate(
    tiles: Tiles, cut: Cut, grad_z: Tensor, lse: Tensor, pull: Tensor, sums: Sequence[Tensor | None]
) -> None:
    problem, share, wide = tiles.problem, tiles.share, tiles.wide
    dq, dk, dv, dbias, dfactor, dmagnitude, dgain = sums
    b, g, n, keys = cut.b1 - cut.b0, cut.g1 - cut.g0, cut.i1 - cut.i0, cut.j1 - cut.j0
    rows = (slice(cut.b0, cut.b1), slice(cut.g0 * share, cut.g1 * share), slice(cut.i0, cut.i1))
    span = (slice(cut.b0, cut.b1), slice(cut.g0, cut.g1), slice(cut.j0, cut.j1))
    folded = (b * g, share * n, -1)

    s = tiles.scores(cut)
    routed = s.clone()
    lookup, heads = tiles.lookup, tiles.heads(cut)
    if lookup is not None:
        lookup.route(routed, cut, heads)
    tiles.hide(routed, cut)
    own_lse = lse[rows].unsqueeze(-1)
    p = torch.exp(routed - own_lse).masked_fill(own_lse == -torch.inf, 0.0)
    k, v = tiles.k[span].reshape(b * g, keys, -1), tiles.v[span].reshape(b * g, keys, -1)
    dz = grad_z[rows].reshape(folded)
    dot = torch.bmm(dz, v.mT).view_as(p)
    gain = lookup.gathered(lookup.gain, cut, heads) if lookup is not None and lookup.gain is not None else None
    if dv is not None:
        weight = p if gain is None else p * gain
        dv[span] += torch.bmm(weight.view(folded).mT, dz).view(b, g, keys, -1)
    if dgain is not None:
        _add_by_role(tiles, cut, p * dot, dgain)
    drouted = p * ((dot if gain is None else dot * gain) - pull[rows].unsqueeze(-1))
    if dbias is not None:
        _add_by_role(tiles, cut, drouted, dbias)
    if dfactor is not None:
        _add_by_role(tiles, cut, drouted * s, dfactor)
    if dmagnitude is not None:
        _add_by_role(tiles, cut, drouted * s.abs(), dmagnitude)
    if dq is None and dk is None:
        return
    ds = drouted
    if lookup is not None and lookup.factor is not None:
        ds = drouted * lookup.gathered(lookup.factor, cut, heads)
    if lookup is not None and lookup.magnitude is not None:
        ds = ds + drouted * lookup.gathered(lookup.magnitude, cut, heads) * s.sign()
    if problem.softcap:
        ds = ds * (1 - (s / problem.softcap).square())
    ds = (ds * problem.scale).reshape(folded)
    if dq is not None:
        dq[rows] = dq[rows] + torch.bmm(ds, k).view(b, g * share, n, -1)
    if dk is not None:
        dk[span] += torch.bmm(ds.mT, problem.q[rows].to(wide).reshape(folded)).view(b, g, keys, -1)


def _add_by_role(tiles: Tiles, cut: Cut, pairs: Tensor, total: Tensor) -> None:
    """Add ``pairs [b, h, n, k]``, summed over keys by role and queries by role, to ``total [B|1, H, R, R]``."""
    roles, query_roles = tiles.problem.roles, tiles.problem.query_roles
    if roles is None or query_roles is None:
        return
    by_source = pairs @ _one_hot(roles, cut, cut.j0, cut.j1, tiles.wide)
    by_route = _one_hot(query_roles, cut, cut.i0, cut.i1, tiles.wide).mT @ by_source
    heads = tiles.heads(cut)
    if total.shape[0] == 1:
        total[0, heads] += by_route.sum(0)
    else:
        total[cut.b0 : cut.b1, heads] += by_route


def _one_hot(roles: Tensor, cut: Cut, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """``[b|1, 1, length, R]``."""
    part = roles[0:1, start:stop] if roles.shape[0] == 1 else roles[cut.b0 : cut.b1, start:stop]
    return torch.nn.functional.one_hot(part.long(), ROLES).to(dtype).unsqueeze(1)

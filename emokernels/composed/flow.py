"""Attention flow in bounded tiles of scores: every tile holds whole rows, so one pass over the keys is enough."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from ..routes import ROLES
from . import host
from .layout import Run, known_runs, row_bytes
from .softmax import accumulator
from .tiles import Cut, Tiles

MAX_RUNS = 32
"""Runs of equal roles that are summed slice by slice; layouts of more runs are a matrix product with one-hot roles."""


def measure_flow(problem: Problem, grad_z: Tensor | None) -> Tensor:
    """Mass, or with `grad_z` saliency, per (destination role, source role): ``[B, H, R, R]`` float32 or float64."""
    q, roles, query_roles = problem.q, problem.roles, problem.query_roles
    if roles is None or query_roles is None:
        raise ValueError("roles: expected role tensors, got None. Pass roles=[B|1, K] uint8.")
    wide = accumulator(q.dtype)
    k = problem.k.to(wide)
    tiles = Tiles(problem._replace(k=k, v=k if grad_z is None else problem.v.to(wide)), wide)
    runs = _shared_runs(roles)
    queries = _one_hot(query_roles, wide)
    keys = _one_hot(roles, wide)
    out = torch.zeros(q.shape[0], q.shape[1], ROLES, ROLES, dtype=wide, device=q.device)
    for cut in tiles.cuts():
        pairs = _weights(tiles, cut)
        if grad_z is not None:
            _times_gradient(pairs, grad_z, tiles, cut)
        by_source = pairs @ keys[_rows(keys, cut), :, cut.j0 : cut.j1] if runs is None else _sum_runs(pairs, runs, cut)
        by_route = queries[_rows(queries, cut), :, cut.i0 : cut.i1].mT @ by_source
        out[cut.b0 : cut.b1, tiles.heads(cut)] += by_route
    return out


def _weights(tiles: Tiles, cut: Cut) -> Tensor:
    """``A [b, h, n, k]`` of a rectangle: softmax weights times gain, 0 in rows without keys."""
    s = tiles.scores(cut)
    lookup, heads = tiles.lookup, tiles.heads(cut)
    if lookup is not None:
        lookup.route(s, cut, heads)
    tiles.hide(s, cut)
    p = torch.softmax(s, -1)
    if tiles.may_be_empty:
        p.masked_fill_(s.amax(-1, keepdim=True) == -torch.inf, 0.0)
    if lookup is not None:
        lookup.weigh(p, cut, heads)
    return p


def _times_gradient(pairs: Tensor, grad_z: Tensor, tiles: Tiles, cut: Cut) -> None:
    """``|A * dL/dA|`` in place, ``dL/dA_ij = <grad_z_i, v_j>``."""
    groups = (cut.b1 - cut.b0) * (cut.g1 - cut.g0)
    n, dim = cut.i1 - cut.i0, grad_z.shape[3]
    dz = grad_z[cut.b0 : cut.b1, tiles.heads(cut), cut.i0 : cut.i1].to(tiles.wide)
    v = tiles.v[cut.b0 : cut.b1, cut.g0 : cut.g1, cut.j0 : cut.j1]
    dot = torch.bmm(dz.reshape(groups, tiles.share * n, dim), v.reshape(groups, -1, dim).mT)
    pairs.mul_(dot.view_as(pairs)).abs_()


def _shared_runs(roles: Tensor) -> list[Run] | None:
    """The runs of equal roles that all batch rows have, or None when they differ, are many or cannot be read here."""
    if not host.owns(roles):
        return None
    rows = row_bytes(roles)
    if rows is None or len(rows) != 1:
        return None
    runs = known_runs(rows[0])
    return runs if len(runs) <= MAX_RUNS else None


def _sum_runs(pairs: Tensor, runs: list[Run], cut: Cut) -> Tensor:
    """``pairs [b, h, n, k]`` summed over the keys of each role: ``[b, h, n, R]``. A tenth of the product's time."""
    total = pairs.new_zeros(*pairs.shape[:3], ROLES)
    for role, start, stop in runs:
        start, stop = max(start, cut.j0), min(stop, cut.j1)
        if start < stop:
            total[..., role] += pairs[..., start - cut.j0 : stop - cut.j0].sum(-1)
    return total


def _one_hot(roles: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B|1, 1, length, R]``."""
    return torch.nn.functional.one_hot(roles.long(), ROLES).to(dtype).unsqueeze(1)


def _rows(tensor: Tensor, cut: Cut) -> slice:
    return slice(0, 1) if tensor.shape[0] == 1 else slice(cut.b0, cut.b1)

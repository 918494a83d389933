"""Routed attention on a GPU, where the host must not wait for values more often than it has to.

A prefill is planned on the host from role layouts, tables and masks that are read once and remembered (`host`, `memo`)
and then runs as stock attention merged by log-sum-exp. Everything else runs as tiles, which gather table values on the
device and read nothing: decode steps, CUDA graphs while they are recorded, and problems that stock kernels do not take.
"""

from __future__ import annotations

from torch import Tensor

from ..problem import Problem
from . import host, stock
from .layout import row_bytes
from .plain import is_plain, plain
from .spans import attend_by_spans, group_rows
from .tables import NOTHING, Alike, inspect
from .tiles import attend_tiled
from .visible import visible_keys

FEW_ROWS = 16
"""Up to this many query rows (decode steps, checked drafts) tiles take fewer launches than a merge."""


def attend_on_device(problem: Problem, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Z ``[B, H, N, D]`` and lse ``[B, H, N]`` (None unless needed)."""
    if is_plain(problem) and not need_lse:
        return plain(problem), None
    if problem.q.shape[2] > FEW_ROWS and not problem.softcap and not host.capturing():
        try:
            done = _attend_stock(problem, need_lse)
        except stock.Refused:
            done = None
        if done is not None:
            return done
    return attend_tiled(problem, need_lse)


def _attend_stock(problem: Problem, need_lse: bool) -> tuple[Tensor, Tensor | None] | None:
    """By stock kernels, or None when the problem needs more than they offer."""
    q, k, v = (stock.aligned(x) for x in (problem.q, problem.k, problem.v))
    stock.choose(q, k, v, False)  # before anything is read for nothing
    alike = NOTHING
    if problem.routed:
        alike = inspect(problem)
        if alike.magnitude:
            return None
        if not _acts(problem, alike):
            alike = NOTHING
            problem = problem._replace(roles=None, query_roles=None, bias=None, factor=None, magnitude=None, gain=None)
            if is_plain(problem) and not need_lse:
                return plain(problem), None
    visible = visible_keys(problem)
    groups = None if visible is None else group_rows(problem, alike, visible)
    if groups is None:
        return None
    z, lse = attend_by_spans(problem._replace(q=q, k=k, v=v), alike, groups, need_lse)
    return z[..., : problem.q.shape[3]], lse


def _acts(problem: Problem, alike: Alike) -> bool:
    """Whether a table changes anything for the roles that the queries have."""
    queries = None if problem.query_roles is None else row_bytes(problem.query_roles)
    return queries is None or alike.changes(set().union(*queries))

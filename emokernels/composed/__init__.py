"""Routed attention from stock pieces: stock attention kernels merged by log-sum-exp, and tiles for the rest.

| problem | how |
|---|---|
| no route changes anything | `plain`: stock attention as it is |
| one query per row, on a CPU | `step`: two products and a softmax; `prepared` once for a generation |
| long prefill | `spans`: stock attention per class of keys (`plan`), merged (`merge`) |
| short prefill whose end changes, on a CPU | `rows`: stock attention up to there, then tiles |
| softcap, abs, windows, irregular masks, mixed problems, decode on a GPU | `tiles`: bounded tiles of scores |

`attend` below chooses for a CPU, `device` for a GPU. Which kernels are stock says `stock`, how each is called
`libraries`; `host` and `memo` are about what is known of roles, tables and masks, and when.
"""

from __future__ import annotations

from torch import Tensor

from ..problem import Problem
from . import host
from .device import attend_on_device
from .flow import measure_flow
from .layout import row_bytes
from .lens import measure_lens
from .mlp import activate
from .plain import is_plain, plain, plain_with_lse
from .prepared import Step, StepMask, prepare_step
from .rows import attend_from, first_changed
from .spans import attend_by_spans, group_rows
from .step import Where, attend_step, dense_of, slices_of
from .tables import inspect
from .tiles import attend_tiled
from .visible import visible_keys

__all__ = [
    "Step",
    "StepMask",
    "activate",
    "attend",
    "attend_with_lse",
    "is_plain",
    "measure_flow",
    "measure_lens",
    "plain",
    "prepare_step",
]

SMALL_SCORES = 1 << 18
"""Problems with fewer scores than this finish in one tile before a merge has made its calls."""
FEW_ROWS = 16
"""Up to this many query rows the tile is small and one read of K and V is the whole cost."""
SMALL_HALF_KEYS = 1 << 18
"""Half-precision keys (elements) that may be converted to float32 for a tile; more are left to stock kernels."""


def attend(problem: Problem, need_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Z ``[B, H, N, D]`` and lse ``[B, H, N]`` (None unless needed); no gradient."""
    if not host.owns(problem.q):
        return attend_on_device(problem, need_lse)
    if problem.roles is None or problem.query_roles is None or not problem.routed:
        return _unrouted(problem, need_lse)
    alike = inspect(problem)
    queries = row_bytes(problem.query_roles)
    if queries is not None and not alike.changes(set().union(*queries)):
        return _unrouted(problem, need_lse)
    n = problem.q.shape[2]
    stock = not problem.softcap and not alike.magnitude
    if n > FEW_ROWS or (stock and problem.q.element_size() == 2 and problem.k.numel() > SMALL_HALF_KEYS):
        if stock and problem.q.shape[1] * n * problem.k.shape[2] >= SMALL_SCORES:
            visible = visible_keys(problem)
            groups = None if visible is None else group_rows(problem, alike, visible)
            if groups is not None:
                return attend_by_spans(problem, alike, groups, need_lse)
        if stock and queries is not None:
            done = attend_from(problem, first_changed(queries, alike), need_lse)
            if done is not None:
                return done
    elif n == 1 and queries is not None and len(queries) == 1:
        keys = row_bytes(problem.roles)
        dst = queries[0][0]
        where: Where | None = None
        if keys is not None:
            where = slices_of(keys[0], dst, alike) if len(keys) == 1 else dense_of(keys, dst, alike, problem)
        if where is not None:
            return attend_step(problem, dst, where, problem.mask is not None or alike.masks, need_lse)
    return attend_tiled(problem, need_lse)


def _unrouted(problem: Problem, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    problem = problem._replace(bias=None, factor=None, magnitude=None, gain=None)
    if not is_plain(problem):
        return attend_tiled(problem, need_lse)
    if need_lse:
        return plain_with_lse(problem)
    return plain(problem), None


def attend_with_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    """`attend` in the form the op needs: z in its declared layout, lse always there, nothing shared with an input."""
    z, lse = attend(problem, need_lse=True)
    if lse is None:
        raise RuntimeError("lse was asked for and not computed")
    return z.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()

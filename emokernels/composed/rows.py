"""Prefills too small for a merge: stock attention for all rows, and tiles for the few rows that routes change.

In a LLaVA prompt that is the text after the image. Rows that no route changes keep the bits of stock attention.
"""

from __future__ import annotations

from torch import Tensor

from ..problem import Problem
from .plain import is_plain, plain, plain_with_lse
from .tables import Alike
from .tiles import attend_tiled

WORTH = 0.5
"""Largest share of the rows that may be computed twice."""


def changed_rows(queries: list[bytes], alike: Alike) -> range:
    """The shortest range of query rows that holds every row, of any layout, with a role that routes change."""
    changing = {d for d in set().union(*queries) if alike.changes({d})}
    found = [i for layout in set(queries) for i, role in enumerate(layout) if role in changing]
    return range(min(found), max(found) + 1) if found else range(0)


def attend_changed(problem: Problem, rows: range, need_lse: bool) -> tuple[Tensor, Tensor | None] | None:
    """Z ``[B, H, N, D]`` and lse ``[B, H, N]`` (None unless needed); None when this way does not pay."""
    n, keys = problem.q.shape[2], problem.k.shape[2]
    bare = problem._replace(bias=None, factor=None, magnitude=None, gain=None)
    if len(rows) > WORTH * n or not is_plain(bare) or problem.roles is None or problem.query_roles is None:
        return None
    z, lse = plain_with_lse(bare) if need_lse else (plain(bare), None)
    # Causal attention is aligned at the last row: the last of these rows sees keys up to `seen`.
    seen = keys - n + rows.stop if problem.causal else keys
    mask = problem.mask
    part, part_lse = attend_tiled(
        problem._replace(
            q=problem.q[:, :, rows.start : rows.stop],
            k=problem.k[:, :, :seen],
            v=problem.v[:, :, :seen],
            roles=problem.roles[:, :seen],
            query_roles=problem.query_roles[:, rows.start : rows.stop],
            mask=None if mask is None else mask[:, :, rows.start : rows.stop, :seen],
        ),
        need_lse,
    )
    z[:, :, rows.start : rows.stop] = part
    if lse is not None and part_lse is not None:
        lse[:, :, rows.start : rows.stop] = part_lse
    return z, lse

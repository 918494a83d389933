"""Prefills too small for a merge: stock attention for the rows before the first that a route changes, tiles from there.

In a LLaVA prompt the routes act on the text after the image, which is its end.
"""

from __future__ import annotations

from torch import Tensor

from ..problem import Problem
from .plain import is_plain, plain, plain_with_lse
from .tables import Alike
from .tiles import attend_tiled

WORTH = 0.5
"""Largest share of the rows for which tiles, slower than stock attention, still pay."""


def first_changed(queries: list[bytes], alike: Alike) -> int:
    """The first query row, of any layout, with a role that routes change; the number of rows when there is none."""
    changing = {d for d in set().union(*queries) if alike.changes({d})}
    return min(next((i for i, role in enumerate(q) if role in changing), len(q)) for q in set(queries))


def attend_from(problem: Problem, start: int, need_lse: bool) -> tuple[Tensor, Tensor | None] | None:
    """Z ``[B, H, N, D]`` and lse ``[B, H, N]`` (None unless needed); None when this way does not pay."""
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    batch, heads, n, dim = q.shape
    bare = problem._replace(bias=None, factor=None, magnitude=None, gain=None)
    if start == 0 or n - start > WORTH * n or not is_plain(bare) or problem.query_roles is None:
        return None
    # Causal attention is aligned at the last row: row `start - 1` sees `seen` keys.
    seen = k.shape[2] - n + start if problem.causal else k.shape[2]
    before = bare._replace(
        q=q[:, :, :start],
        k=k[:, :, :seen],
        v=v[:, :, :seen],
        mask=None if mask is None else mask[:, :, :start, :seen],
    )
    after = problem._replace(
        q=q[:, :, start:],
        query_roles=problem.query_roles[:, start:],
        mask=None if mask is None else mask[:, :, start:],
    )
    z = q.new_empty(batch, n, heads, dim).transpose(1, 2)
    if need_lse:
        z[:, :, :start], lse = plain_with_lse(before)
    else:
        z[:, :, :start], lse = plain(before), None
    z[:, :, start:], rest = attend_tiled(after, need_lse)
    if lse is None or rest is None:
        return z, None
    both = rest.new_empty(batch, heads, n)
    both[:, :, :start], both[:, :, start:] = lse, rest
    return z, both

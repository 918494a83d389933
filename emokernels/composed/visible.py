"""Which keys each batch row's queries see, when that is one interval cut by one diagonal.

Query i of a batch row sees key j when ``start <= j < min(stop, i + offset + 1)``. Causal attention, left and right
padding, static caches with a zero tail and chunks of a prompt are all of this form, so a padding mask costs one
comparison per generation step instead of one read per layer. Any other mask is left to the tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from .memo import LastSeen


class Visible(NamedTuple):
    """``start <= j < min(stop, i + offset + 1)``; offset is at least K when there is no diagonal."""

    start: int
    stop: int
    offset: int


_last_mask = LastSeen()


def visible_keys(problem: Problem) -> list[Visible] | None:
    """One entry per batch row (a single one when all rows are alike), or None when the mask is of another form."""
    n, keys = problem.q.shape[2], problem.k.shape[2]
    offset = keys - n if problem.causal else keys
    if problem.window and problem.window < keys:
        return None
    mask = problem.mask
    if mask is None:
        return [Visible(0, keys, offset)]
    if mask.shape[1] != 1:
        return None
    found = _last_mask.get(mask, None, lambda: _read(mask))
    if found is None:
        return None
    return [Visible(one.start, one.stop, min(one.offset, offset)) for one in found]


def _read(mask: Tensor) -> list[Visible] | None:
    if mask.dtype != torch.bool:
        hides = mask <= torch.finfo(mask.dtype).min
        if not bool((hides | (mask == 0)).all()):
            return None
        mask = ~hides
    rows = [_read_row(mask[b, 0]) for b in range(mask.shape[0])]
    known = [row for row in rows if row is not None]
    return known if len(known) == len(rows) else None


def _read_row(mask: Tensor) -> Visible | None:
    """Guess the interval from the last query and the diagonal from the first, then compare the whole mask."""
    n, keys = mask.shape
    last = mask[-1]
    count = int(last.sum())
    if count == 0:
        return Visible(0, 0, keys) if not bool(mask.any()) else None
    start = int(last.to(torch.uint8).argmax())
    stop = start + count
    # Key `start` is first seen by query i0 = max(0, start - offset). It sees keys below min(stop, i0 + offset + 1).
    first = int(mask[:, start].to(torch.uint8).argmax())
    seen = int(mask[first].sum())
    offset = start + seen - 1 - first if start + seen < stop or first > 0 else keys
    guess = torch.ones(n, keys, dtype=torch.bool, device=mask.device)
    if offset < keys:
        guess = guess.tril_(offset)
    guess[:, :start] = False
    guess[:, stop:] = False
    return Visible(start, stop, offset) if torch.equal(guess, mask) else None

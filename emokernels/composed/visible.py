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
from . import host
from .memo import Seen


class Visible(NamedTuple):
    """``start <= j < min(stop, i + offset + 1)``; offset is at least K when there is no diagonal."""

    start: int
    stop: int
    offset: int


_masks: Seen[list[Visible] | None] = Seen(8)
"""A model has a few masks at a time, one for each kind of its layers."""


def visible_keys(problem: Problem) -> list[Visible] | None:
    """One entry per batch row (a single one when all rows are alike), or None when the mask is of another form.

    A mask on a device is analysed there; two small results are read, once per mask object and version.
    """
    n, keys = problem.q.shape[2], problem.k.shape[2]
    offset = keys - n if problem.causal else keys
    if problem.window and problem.window < keys:
        return None
    mask = problem.mask
    if mask is None:
        return [Visible(0, keys, offset)]
    if mask.shape[1] != 1:
        return None
    found = _masks.get(mask, lambda: _read(mask))
    if found is None:
        return None
    return [Visible(one.start, one.stop, min(one.offset, offset)) for one in found]


def _read(mask: Tensor) -> list[Visible] | None:
    """Guess every row's interval from its last query and its diagonal from the first, then compare the whole mask."""
    shown, only_hides = mask, None
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min
        shown, only_hides = ~hidden, (hidden | (mask == 0)).all()
    rows = shown[:, 0]
    measured = host.read(_measure(rows)).tolist()
    guesses = [_guess(start, count, first, seen, rows.shape[2]) for start, count, first, seen in measured]
    same = [(_as_mask(guess, rows[0]) == row).all() for guess, row in zip(guesses, rows, strict=True)]
    if only_hides is not None:
        same.append(only_hides)
    return guesses if bool(host.read(torch.stack(same)).all()) else None


def _measure(rows: Tensor) -> Tensor:
    """Per row of ``[B, N, K]``, int64 ``[B, 4]``.

    The first key and the number of keys that the last query sees, the first query that sees this key, and how many keys
    that query sees.
    """
    last = rows[:, -1]
    start = last.to(torch.uint8).argmax(-1)
    column = rows.gather(2, start[:, None, None].expand(-1, rows.shape[1], 1)).squeeze(2)
    first = column.to(torch.uint8).argmax(-1)
    seen = rows.gather(1, first[:, None, None].expand(-1, 1, rows.shape[2])).squeeze(1)
    return torch.stack([start, last.sum(-1), first, seen.sum(-1)], 1)


def _guess(start: int, count: int, first: int, seen: int, keys: int) -> Visible:
    """The only interval and diagonal that `_measure` can have come from."""
    if count == 0:
        return Visible(0, 0, keys)
    stop = start + count
    # Key `start` is first seen by query i0 = max(0, start - offset). It sees keys below min(stop, i0 + offset + 1).
    offset = start + seen - 1 - first if start + seen < stop or first > 0 else keys
    return Visible(start, stop, offset)


def _as_mask(visible: Visible, like: Tensor) -> Tensor:
    """``[N, K]`` bool."""
    mask = torch.ones_like(like, memory_format=torch.contiguous_format)
    if visible.offset < like.shape[1]:
        mask = mask.tril_(visible.offset)
    mask[:, : visible.start] = False
    mask[:, visible.stop :] = False
    return mask

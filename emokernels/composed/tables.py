"""What the values of the routes tables allow: which source roles act alike, and which fields change nothing.

Two source roles act alike for a destination role when every table holds the same value for both, in every batch row and
head: their keys can then share one call of stock attention, because adding one bias to all of them, or multiplying all
their weights by one gain, is done once on the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from ..routes import ROLES
from .memo import Memo, content, restore

Flags = tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, eq=False)
class Alike:
    """What `inspect` finds. Indexed ``[dst role][src role]``.

    `label`: the smallest source role that acts alike; `bias`, `factor`, `gain`: whether any row or head differs from
    the identity; `magnitude`: whether the absolute value of a logit is used anywhere; `masks`: whether some bias is
    -inf.
    """

    label: tuple[tuple[int, ...], ...]
    bias: Flags
    factor: Flags
    gain: Flags
    magnitude: bool
    masks: bool
    slices: Memo[Any] = field(default_factory=lambda: Memo(64))
    """Remembered by `step` per layout."""
    dense: Memo[Any] = field(default_factory=lambda: Memo(4))
    """Remembered by `step` per batch of layouts."""

    def changes_logits(self, dst: int, src: int) -> bool:
        """True when bias, factor or magnitude may differ from the identity on this route."""
        return self.magnitude or self.bias[dst][src] or self.factor[dst][src]

    def changes_weights(self, dst: int, src: int) -> bool:
        """True when the gain differs from the identity on this route."""
        return self.gain[dst][src]

    def changes(self, roles: set[int]) -> bool:
        """True when a destination role of `roles` has a table row that is not the identity."""
        return self.magnitude or any(
            any(self.bias[d]) or any(self.factor[d]) or any(self.gain[d]) for d in roles if d < ROLES
        )


_known: Memo[Alike] = Memo(256)


def inspect(problem: Problem) -> Alike:
    """Read the tables of a problem. Remembered by content; tables on a device are read once per tensor and version."""
    tables = (problem.bias, problem.factor, problem.magnitude, problem.gain)
    keys = tuple(None if table is None else content(table) for table in tables)
    if any(key is None and table is not None for key, table in zip(keys, tables, strict=True)):
        return _inspect(*tables)
    return _known.get(keys, lambda: _inspect(*(None if key is None else restore(key) for key in keys)))


def _inspect(bias: Tensor | None, factor: Tensor | None, magnitude: Tensor | None, gain: Tensor | None) -> Alike:
    same = torch.ones(ROLES, ROLES, ROLES, dtype=torch.bool)
    for table in (bias, factor, magnitude, gain):
        if table is not None:
            flat = table.detach().flatten(0, 1)
            same &= (flat.unsqueeze(3) == flat.unsqueeze(2)).all(0)
    label = tuple(tuple(row.index(True) for row in rows) for rows in same.tolist())
    return Alike(
        label,
        _differs(bias, 0.0),
        _differs(factor, 1.0),
        _differs(gain, 1.0),
        magnitude is not None and bool((magnitude != 0).any()),
        bias is not None and bool((bias == -torch.inf).any()),
    )


def _differs(table: Tensor | None, neutral: float) -> Flags:
    if table is None:
        return ((False,) * ROLES,) * ROLES
    return tuple(tuple(row) for row in (table.detach() != neutral).flatten(0, 1).any(0).tolist())


NOTHING = _inspect(None, None, None, None)
"""No table changes anything: all source roles act alike."""

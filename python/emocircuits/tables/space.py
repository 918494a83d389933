"""How tables are indexed: by batch row (one for all, when no edit names batch rows) and by kind of token.

The kinds are the roles and, where edits name positions, those of :mod:`emocircuits.positions`.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from emocircuits.edits import Edit
from emocircuits.families import Geometry
from emocircuits.positions import Kind
from emokernels import Role

R = len(Role)
GENERATED = int(Role.GENERATED)
STEP = 8
"""Extra kinds come in whole steps, so that tables of different prompts mostly have one form."""


@dc.dataclass(frozen=True)
class Space:
    """Sizes, device and precision of the tables of one plan.

    Attributes:
        rows: 1, or the batch when the plan names batch rows.
        dtype: of values and vectors; factors and routes are float32 (float64 for a float64 model).
        extra: the kinds after the roles, for every row of the tables.
        key_extra: the same of keys.
    """

    geometry: Geometry
    rows: int
    batch: int
    device: torch.device
    dtype: torch.dtype
    extra: tuple[tuple[Kind, ...], ...] = ()
    key_extra: tuple[tuple[Kind, ...], ...] = ()

    @property
    def exact(self) -> torch.dtype:
        """What factors are kept in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def kinds(self) -> int:
        """Kinds of token that tables tell apart."""
        return _count(self.extra)

    @property
    def key_kinds(self) -> int:
        """Kinds of key that tables of routes tell apart."""
        return _count(self.key_extra)

    def full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype | None = None) -> Tensor:
        """A table ``[rows, kinds, *shape]`` filled with ``value``."""
        return torch.full((self.rows, self.kinds, *shape), value, device=self.device, dtype=dtype or self.exact)

    def selection(self, edit: Edit) -> tuple[Tensor, Tensor]:
        """Batch rows ``[n]`` and kinds ``[n]`` of the table rows that an edit changes."""
        rows = range(self.rows) if edit.rows is None else edit.rows
        pairs, wanted = [], edit.destinations()
        for row in rows:
            if edit.positions is None:
                pairs += [(row, int(role)) for role in wanted]
            for i, (role, positions) in enumerate(self.extra[row] if self.extra else ()):
                if role in wanted and (edit.positions is None or edit.positions in positions):
                    pairs.append((row, R + i))
        index = torch.tensor(pairs, device=self.device, dtype=torch.int64).reshape(-1, 2).T
        return index[0], index[1]


def _count(extra: tuple[tuple[Kind, ...], ...]) -> int:
    most = max((len(kinds) for kinds in extra), default=0)
    return R + -(-most // STEP) * STEP


def by_row(table: Tensor, kinds: Tensor) -> Tensor:
    """Pick the row of ``table`` ``[B|1, kinds, ...]`` for each token: ``[B, N, ...]``."""
    if table.shape[0] == 1:
        return table[0][kinds.long()]
    rows = torch.arange(table.shape[0], device=table.device)[:, None]
    return table[rows, kinds.long()]


def phases(changes: Tensor) -> frozenset[str]:
    """The phases in which any entry of ``changes [B|1, kinds, ...]`` (bool) is set."""
    by_kind = changes.movedim(1, 0).flatten(1).any(1).tolist()
    decode = by_kind.pop(GENERATED)
    return frozenset({"prefill"} if any(by_kind) else ()) | frozenset({"decode"} if decode else ())

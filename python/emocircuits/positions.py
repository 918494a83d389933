"""Edits that name prompt positions: which columns they are, and the kinds of token that tables then tell apart.

A table has a row for every role. Where edits name positions, it gets further rows: one for every (role, sets of
positions that hold the token) that occurs in the prompt. Tokens of a prompt are looked up by their kind: the role, or
the number of such a row.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from emocircuits.edits import Edit
from emocircuits.plan import Plan
from emokernels import Role

R = len(Role)
Kind = tuple[Role, frozenset[tuple[int, ...]]]
"""A role and the ``positions`` of edits that hold a token."""
Named = tuple[int, Edit, tuple[int, ...]]
"""The number of an edit in its plan, the edit, and positions that it names."""


@dc.dataclass(frozen=True)
class Selection:
    """The tokens of one prompt that edits name by position.

    Attributes:
        kinds: ``[B, columns]`` int16: roles, and R + i for tokens of the i-th extra kind of their row of the tables.
        extra: the extra kinds of every row of the tables: one row, or one for each of the batch.
        keys, key_extra: the same of the tokens that routes name as keys; None and empty where none are named.
    """

    kinds: Tensor
    extra: tuple[tuple[Kind, ...], ...]
    keys: Tensor | None
    key_extra: tuple[tuple[Kind, ...], ...]


def select(plan: Plan, roles: Tensor) -> Selection | None:
    """Find the positions that ``plan`` names; None when it names none.

    Args:
        plan: of the whole batch (`Plan.expanded`).
        roles: ``[B, columns]`` of every column up to the end of the prompt, also of those before it in a cache.

    Raises:
        ValueError: a prompt is shorter than a position.
    """
    rows, keys = _named(plan, "positions"), _named(plan, "source_positions")
    if not rows and not keys:
        return None
    kinds, extra = _kinds(plan, rows, roles)
    of_keys, key_extra = _kinds(plan, keys, roles) if keys else (None, ())
    return Selection(kinds, extra, of_keys, key_extra)


def _named(plan: Plan, field: str) -> list[Named]:
    edits = ((i, edit, getattr(edit, field, None)) for i, edit in enumerate(plan))
    return [(i, edit, positions) for i, edit, positions in edits if positions is not None]


def _kinds(plan: Plan, named: list[Named], roles: Tensor) -> tuple[Tensor, tuple[tuple[Kind, ...], ...]]:
    shared = plan.batch_rows() is None
    kinds = roles.to(torch.int16)
    numbers: list[dict[Kind, int]] = [{} for _ in range(1 if shared else roles.shape[0])]
    for row, of_row in enumerate(roles.tolist()):
        columns = [c for c, role in enumerate(of_row) if role != Role.PAD]
        held: dict[int, set[tuple[int, ...]]] = {}
        for i, edit, positions in named:
            if edit.rows is not None and row not in edit.rows:
                continue
            for position in positions:
                if not -len(columns) <= position < len(columns):
                    raise ValueError(
                        f"edit {i} ({type(edit).__name__}) names position {position}, but the prompt of batch row "
                        f"{row} has {len(columns)} tokens; name positions that all prompts have, or the rows that do"
                    )
                held.setdefault(columns[position], set()).add(positions)
        mine = numbers[0 if shared else row]
        for column, groups in sorted(held.items()):
            kind = (Role(of_row[column]), frozenset(groups))
            kinds[row, column] = R + mine.setdefault(kind, len(mine))
    return kinds, tuple(tuple(mine) for mine in numbers)

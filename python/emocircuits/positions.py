"""Edits that name prompt positions: which columns they are, and the kinds of token that tables then tell apart.

A table has a row for every role. Where edits name positions, it gets further rows: one for every (role, sets of
positions that hold the token) that occurs in the prompt. Tokens of a prompt are looked up by their kind: the role, or
the number of such a row.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from emocircuits.plan import Plan
from emokernels import Role

R = len(Role)
Kind = tuple[Role, frozenset[tuple[int, ...]]]
"""A role and the ``positions`` of edits that hold a token."""


@dc.dataclass(frozen=True)
class Selection:
    """The tokens of one prompt that edits name by position.

    Attributes:
        kinds: ``[B, columns]`` int16: roles, and R + i for tokens of the i-th extra kind of their row of the tables.
        extra: the extra kinds of every row of the tables: one row, or one for each of the batch.
    """

    kinds: Tensor
    extra: tuple[tuple[Kind, ...], ...]


def select(plan: Plan, roles: Tensor) -> Selection | None:
    """Find the positions that ``plan`` names; None when it names none.

    Args:
        plan: of the whole batch (`Plan.expanded`).
        roles: ``[B, columns]`` of every column up to the end of the prompt, also of those before it in a cache.

    Raises:
        ValueError: a prompt is shorter than a position.
    """
    edits = [(i, edit) for i, edit in enumerate(plan) if edit.positions is not None]
    if not edits:
        return None
    shared = plan.batch_rows() is None
    kinds = roles.to(torch.int16)
    numbers: list[dict[Kind, int]] = [{} for _ in range(1 if shared else roles.shape[0])]
    for row, of_row in enumerate(roles.tolist()):
        columns = [c for c, role in enumerate(of_row) if role != Role.PAD]
        held: dict[int, set[tuple[int, ...]]] = {}
        for i, edit in edits:
            if edit.rows is not None and row not in edit.rows:
                continue
            for position in edit.positions or ():
                if not -len(columns) <= position < len(columns):
                    raise ValueError(
                        f"edit {i} ({type(edit).__name__}) names position {position}, but the prompt of batch row "
                        f"{row} has {len(columns)} tokens; name positions that all prompts have, or the rows that do"
                    )
                held.setdefault(columns[position], set()).add(tuple(edit.positions or ()))
        mine = numbers[0 if shared else row]
        for column, groups in sorted(held.items()):
            kind = (Role(of_row[column]), frozenset(groups))
            kinds[row, column] = R + mine.setdefault(kind, len(mine))
    return Selection(kinds, tuple(tuple(mine) for mine in numbers))

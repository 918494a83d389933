"""Which tokens are captured: chosen by role, position or column, pass by pass, as a generation goes on."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from emocircuits.context import Context
from emocircuits.edits import ROLE_NAMES
from emokernels import Role

Steps = Literal["all", "last", "prompt"]
Where = int | slice | Sequence[int] | None


@dc.dataclass(frozen=True)
class Index:
    """Which token a captured value belongs to: int64 tensors on the CPU, all of the shape of the token axes.

    Attributes:
        row: row of the batch.
        column: column of the sequence, padding included; generated tokens go on counting.
        position: the same without the padding.
        role: :class:`emokernels.Role` of the token.
        step: 0 for the prompt, 1 for the first token that was generated and run, and so on.
    """

    row: Tensor
    column: Tensor
    position: Tensor
    role: Tensor
    step: Tensor

    def map(self, change: Any) -> Index:
        """``change`` applied to every tensor."""
        return Index(**{f.name: change(getattr(self, f.name)) for f in dc.fields(self)})

    @staticmethod
    def cat(parts: Sequence[Index], dim: int) -> Index:
        """Several of them, one after the other."""
        return Index(**{f.name: torch.cat([getattr(p, f.name) for p in parts], dim) for f in dc.fields(Index)})


@dc.dataclass
class Chosen:
    """The tokens chosen of one forward pass.

    Attributes:
        index: ``[B, P]`` where all rows have the same columns, else ``[T]``.
        columns: those columns, counted in the pass; None where rows differ.
        local: ``[T]`` columns counted in the pass, where rows differ.
        want: ``[B, P]`` the positions asked for one by one, counted from 0; None where they were not.
    """

    index: Index
    columns: Tensor | None
    local: Tensor
    want: Tensor | None
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = dc.field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return self.index.row.numel()

    def pairs(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Batch row and column (counted in the pass) of every token, ``[T]`` each; ``[B, P]`` flattened."""
        device = torch.device("cpu") if device is None else device
        if device not in self._moved:
            rows = self.index.row.flatten()
            local = self.local if self.columns is None else self.columns.repeat(self.index.row.shape[0])
            self._moved[device] = (rows.to(device), local.to(device))
        return self._moved[device]

    def take(self, value: Tensor) -> Tensor:
        """``[B, N, ...]`` to ``[B, P, ...]`` or ``[T, ...]``, always a copy."""
        if self.columns is not None:
            return value[:, self.columns.to(value.device)]
        rows, local = self.pairs(value.device)
        return value[rows, local]

    def shaped(self, value: Tensor) -> Tensor:
        """``[T, ...]`` to the shape of `take`."""
        return value if self.columns is None else value.unflatten(0, tuple(self.index.row.shape))


class Choice:
    """What the arguments ``roles``, ``positions``, ``columns`` and ``steps`` of a capture mean.

    Attributes:
        flat: rows may keep different numbers of tokens.
        slots: how many tokens of every row were asked for one by one (0: none).
    """

    def __init__(self, roles: str | Sequence[str] | None, positions: Where, columns: Where, steps: Steps) -> None:
        if steps not in ("all", "last", "prompt"):
            raise ValueError(f"steps={steps!r}: expected 'all', 'last' or 'prompt'")
        if positions is not None and columns is not None:
            raise ValueError("positions and columns were both given; positions leave padding out, columns count it")
        self.steps = steps
        self.roles = None if roles is None else _roles(roles)
        self.by_position = positions is not None
        self.asked: list[int] | slice | None = _asked(
            "columns" if positions is None else "positions", positions, columns
        )
        listed = isinstance(self.asked, list)
        self.flat = self.roles is not None or (self.by_position and not listed)
        self.slots = len(self.asked) if isinstance(self.asked, list) and not self.flat else 0

    def choose(self, context: Context, end: int, since: int, step: int) -> Chosen | None:
        """The tokens of the forward pass in progress; None where there are none.

        Args:
            context: roles of the sequence and the columns of this pass.
            end: column after the last one of the prompt.
            since: first column that counts; those before it have been captured.
            step: number of the pass.
        """
        assert context.columns is not None
        known = context.columns.roles[:, : context.seen].cpu()
        real = known != int(Role.PAD)
        position = real.long().cumsum(1) - 1
        batch, first = known.shape[0], context.first
        start = max(first, since)
        columns = torch.arange(start, context.seen)

        def index(rows: Tensor, at: Tensor) -> Index:
            return Index(rows, at, position[rows, at], known[rows, at].long(), torch.full_like(rows, step))

        if not self.flat and not self.by_position:
            if self.asked is not None:
                found = _resolve(self.asked, end, context.seen)
                if min(found, default=0) < 0:
                    raise ValueError(f"columns={self.asked}: the prompt has {end} columns")
                columns = torch.tensor([c for c in found if start <= c < context.seen], dtype=torch.long)
            if not len(columns):
                return None
            grid = columns.expand(batch, -1)
            rows = torch.arange(batch)[:, None].expand_as(grid)
            return Chosen(index(rows, grid), columns - first, columns, None)

        chosen = real[:, start:] if self.roles is None else torch.isin(known[:, start:].long(), self.roles)
        want: list[list[int]] = []
        if self.asked is not None:
            number = position if self.by_position else torch.arange(context.seen).expand(batch, -1)
            keep = torch.zeros_like(chosen)
            for b in range(batch):
                size = int(real[b, :end].sum()) if self.by_position else end
                reach = int(real[b].sum()) if self.by_position else context.seen
                want.append(_resolve(self.asked, size, reach))
                keep[b] = torch.isin(number[b, start:], torch.tensor(want[b], dtype=torch.long))
            chosen = chosen & keep & real[:, start:]
        rows, local = chosen.nonzero(as_tuple=True)
        if not len(rows):
            return None
        return Chosen(
            index(rows, local + start),
            None,
            local + start - first,
            torch.tensor(want) if self.slots and self.by_position else None,
        )


def _roles(roles: str | Sequence[str]) -> Tensor:
    names = [roles] if isinstance(roles, str) else list(roles)
    unknown = [n for n in names if n not in ROLE_NAMES]
    if unknown or not names:
        raise ValueError(f"roles={roles!r}: expected one or more of {', '.join(ROLE_NAMES)}")
    return torch.tensor([int(Role[n.upper()]) for n in names])


def _asked(name: str, positions: Where, columns: Where) -> list[int] | slice | None:
    where = columns if positions is None else positions
    if where is None or isinstance(where, slice):
        return where
    numbers = [where] if isinstance(where, int) else list(where)
    if not numbers or any(isinstance(p, bool) or not isinstance(p, int) for p in numbers):
        raise ValueError(
            f"{name}={where!r}: expected whole numbers or a slice; negative ones count from the prompt's end"
        )
    return numbers


def _resolve(asked: list[int] | slice, end: int, reach: int) -> list[int]:
    """Numbers from 0 of what was asked for: negative ones count from ``end``, open slices go on to ``reach``."""
    if isinstance(asked, slice):
        if asked.step is not None and asked.step < 1:
            raise ValueError(f"{asked}: a slice of tokens goes forward")
        low = 0 if asked.start is None else asked.start + end if asked.start < 0 else asked.start
        high = reach if asked.stop is None else asked.stop + end if asked.stop < 0 else min(asked.stop, reach)
        return list(range(max(low, 0), high, asked.step or 1))
    return [p + end if p < 0 else p for p in asked]

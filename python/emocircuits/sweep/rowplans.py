"""A batch whose rows each follow a plan of their own, also while rows leave it.

``patch`` compiles a plan for the rows of a batch, and rows stay until generation ends. Here plans are compiled once,
and every batch picks its rows' tables from them, whichever rows it has.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import DynamicCache

from emocircuits.context import COLUMNS, Columns
from emocircuits.edits import GateHeads, GateRoute
from emocircuits.patching import Patched
from emocircuits.plan import Plan
from emocircuits.tables import LayerTables, compile_plan
from emokernels import Role

T = TypeVar("T")
SHARED = ("index", "basis")
"""Tensors of a table that are the same for all rows."""


class RowPlans(Patched):
    """``patch`` with a plan for each row: bound by ``with``, then told which row follows which plan.

    Args:
        model: the model.
        plans: without batch rows; none of them may name positions, hold values of batch rows, or be a gate.

    Raises:
        NotImplementedError: a plan that cannot be moved from row to row.
        ValueError, TypeError: as :func:`~emocircuits.patching.patch`.
    """

    def __init__(self, model: nn.Module, plans: Sequence[Plan]) -> None:
        for i, plan in enumerate(plans):
            refuse_fixed(plan, f"plan {i}")
        self.plans = list(plans)
        self.which: Tensor | None = None
        self._compiled: dict[int, LayerTables] | None = None
        self._columns: Columns | None = None
        super().__init__(model, Plan.per_row(self.plans), "auto", None, None)

    def __enter__(self) -> RowPlans:
        super().__enter__()
        return self

    def follow(self, which: Tensor) -> None:
        """Rows ``[B]`` of the batches to come follow these plans."""
        self.which = which
        self._fill(len(which))

    def take_up(self, cache: DynamicCache, roles: Tensor, which: Tensor) -> None:
        """Go on with a cache that was filled elsewhere.

        Args:
            cache: with B rows.
            roles: of its columns, ``[B, T]``.
            which: plan of each row.
        """
        self._columns = Columns(roles.clone(), roles.shape[1])
        self._prompt, self._all = roles, which
        setattr(cache, COLUMNS, self._columns)
        self.follow(which)

    def keep(self, rows: Tensor) -> None:
        """Rows ``[n]``, numbers in the batch that was taken up, go on; the others have left."""
        columns = self._columns
        assert columns is not None
        columns.roles = self._prompt[rows]
        columns.grow(columns.seen)
        self.follow(self._all[rows])

    def _fill(self, batch: int, expand: int = 1) -> None:
        """Pick the tables of the rows; nothing is edited before :meth:`follow`."""
        self.context.select(None, None)
        if self.which is None or not self.plan:
            self.state.tables = {}
            return
        self.state.tables = {layer: picked(tables, self.which) for layer, tables in self.compiled().items()}

    def compiled(self) -> dict[int, LayerTables]:
        """Tables by layer, with a row for each plan."""
        if self._compiled is None:
            self._compiled = compile_plan(self.plan, self.handle.geometry, len(self.plans), self._device, self._dtype)
        return self._compiled

    def use(self, compiled: dict[int, LayerTables]) -> None:
        """Take tables that were compiled before, of the same plans and model."""
        self._compiled = compiled

    def _require_visual(self) -> None:
        """Rows of the batch are not those that the edits name, which are plans: every row must suit every plan."""
        missing = self.context.without(Role.VISUAL)
        if self.which is not None and missing and Role.VISUAL in self.plan.roles_used():
            raise ValueError(f"a plan needs visual tokens, and the prompt of row {missing[0]} has none")


def picked(table: T, rows: Tensor) -> T:
    """A table with rows ``[n]`` of another one that has a row for each plan."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(0, rows)
        if isinstance(value, dict):
            return {k: of(v) for k, v in value.items()}
        return picked(value, rows) if dc.is_dataclass(value) else value

    fields = dc.fields(table)  # type: ignore[arg-type]
    changes = {f.name: of(getattr(table, f.name)) for f in fields if f.init and f.name not in SHARED}
    return dc.replace(table, **changes)  # type: ignore[type-var]


def refuse_fixed(plan: Plan, name: str) -> None:
    """Refuse a plan whose tables depend on the batch it meets.

    Raises:
        NotImplementedError: it names positions, holds values of batch rows, or has a gate.
        ValueError: it names batch rows.
    """
    for edit in plan:
        if edit.rows is not None:
            raise ValueError(f"{name} names batch rows {edit.rows}; give plans without rows")
        if isinstance(edit, GateHeads | GateRoute):
            raise NotImplementedError(f"{name} has a {type(edit).__name__}, which cannot be moved from row to row")
    if plan.per_batch():
        raise NotImplementedError(f"{name} names positions, or holds a value for each batch row")

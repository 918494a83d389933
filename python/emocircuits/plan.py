"""A Plan: named edits as data. It has no device and no model; it prints, compares, hashes and travels as JSON."""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emocircuits.edits import EDITS, Edit
from emocircuits.files import read_json, write_json
from emokernels import Role

FORMAT = "emocircuits/plan"
VERSION = 1


class Plan:
    """An ordered set of edits.

    Edits that meet on the same place combine: gains, scales and head factors multiply, logit biases and vectors add,
    replacements come after factors (of two replacements the later one wins).

    >>> plan = Plan([BoostRoute(heads=[(3, 1)], to="query", source="visual", by=1.5)])
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        edits = tuple(edits)
        for i, edit in enumerate(edits):
            if not isinstance(edit, Edit):
                raise TypeError(f"edit {i} is {type(edit).__name__}: expected one of {', '.join(EDITS)}")
        self.edits = edits

    # -- a container ---------------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.edits + other.edits)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.edits == other.edits

    def __hash__(self) -> int:
        return hash(self.edits)

    def __repr__(self) -> str:
        return f"Plan({len(self)} edits, {self.digest()[:12]})"

    @staticmethod
    def per_row(plans: Sequence[Plan]) -> Plan:
        """One plan for a batch whose row i is changed by ``plans[i]``.

        Raises:
            ValueError: an edit of ``plans[i]`` already names batch rows.
        """
        edits = []
        for row, plan in enumerate(plans):
            for edit in plan:
                if edit.rows is not None:
                    raise ValueError(f"plan {row} already names rows {edit.rows}; give plans without rows")
                edits.append(dc.replace(edit, rows=(row,)))
        return Plan(edits)

    # -- what it needs -------------------------------------------------------------------------------------------
    def roles_used(self) -> set[Role]:
        """Roles that edits name."""
        return set().union(*(e.roles_used() for e in self)) if self.edits else set()

    def batch_rows(self) -> int | None:
        """Smallest batch the plan fits, or None when no edit names rows."""
        rows = [max(e.rows) for e in self if e.rows is not None]
        return max(rows) + 1 if rows else None

    def per_batch(self) -> bool:
        """Whether its tables depend on the batch: edits that name rows or positions, or hold a value for each row."""
        values = (getattr(e, "value", None) for e in self)
        fields = ("positions", "source_positions")
        named = self.batch_rows() is not None or any(getattr(e, f, None) is not None for e in self for f in fields)
        return named or any(v is not None and v.ndim == 4 for v in values)

    def expanded(self, times: int) -> Plan:
        """The plan for a batch in which ``times`` rows stand for each row of this one: beams, returned sequences."""
        if times == 1 or not self.per_batch():
            return self
        edits = []
        for edit in self:
            changes: dict[str, Any] = {}
            if edit.rows is not None:
                changes["rows"] = tuple(row * times + i for row in edit.rows for i in range(times))
            value = getattr(edit, "value", None)
            if value is not None and value.ndim == 4:
                changes["value"] = np.repeat(np.asarray(value), times, axis=0)
            edits.append(dc.replace(edit, **changes))
        return Plan(edits)

    # -- JSON ----------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """``{"format", "version", "edits"}`` with plain values only."""
        return {"format": FORMAT, "version": VERSION, "edits": [e.to_dict() for e in self]}

    def to_json(self) -> str:
        """Canonical JSON: equal plans give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: the same on every machine and in every run."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> Plan:
        """The inverse of :meth:`to_dict`. Unknown formats, edits and fields are a ``ValueError`` that names them."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'{where}: not a plan: expected an object with "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise ValueError(f"{where}: plan version {data.get('version')!r}; this release reads version {VERSION}")
        extra = sorted(set(data) - {"format", "version", "edits"})
        if extra or not isinstance(data.get("edits"), list):
            raise ValueError(
                f"{where}: unknown or missing field {', '.join(extra) or 'edits'}; a plan holds format, version, edits"
            )
        edits = []
        for i, item in enumerate(data["edits"]):
            kind = item.get("edit") if isinstance(item, dict) else None
            if kind not in EDITS:
                raise ValueError(f"{where}: edit {i} is {kind!r}; expected one of {', '.join(EDITS)}")
            names = {f.name for f in dc.fields(EDITS[kind])}
            unknown = sorted(set(item) - names - {"edit"})
            if unknown:
                raise ValueError(
                    f"{where}: edit {i} ({kind}) has unknown field {', '.join(unknown)}; "
                    f"it takes {', '.join(sorted(names))}"
                )
            try:
                edits.append(EDITS[kind](**{k: v for k, v in item.items() if k != "edit"}))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: edit {i} ({kind}): {error}") from error
        return cls(edits)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse :meth:`to_json`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"plan: broken JSON ({error})") from error
        return cls.from_dict(data)

    def save(self, path: str | Path) -> Path:
        """Write JSON; an interrupted write leaves the old file."""
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(read_json(path, "a plan"), str(path))

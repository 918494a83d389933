"""Everything a plan does to one layer, and how compiled graphs follow when it changes."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

from torch import Tensor

from emocircuits.tables.attention import HeadTable
from emocircuits.tables.gates import Gate
from emocircuits.tables.neurons import NeuronTable
from emocircuits.tables.vectors import VectorTable
from emokernels import Routes


@dc.dataclass(frozen=True)
class LayerTables:
    """Tables of one layer; the ``phases`` say in which phase each part does anything."""

    routes: Routes | None = None
    selected: dict[str, Routes] = dc.field(default_factory=dict)
    """Routes of tokens that edits name by position, by their first kind; see `tables.reroute`."""
    slots: Tensor | None = None
    keyed: Routes | None = None
    """Where edits name keys by position, routes of a prompt; see `RouteTables`."""
    heads: HeadTable | None = None
    gates: dict[str, Gate] = dc.field(default_factory=dict)
    neurons: NeuronTable | None = None
    vectors: dict[str, VectorTable] = dc.field(default_factory=dict)
    attention_phases: frozenset[str] = frozenset()
    neuron_phases: frozenset[str] = frozenset()
    vector_phases: dict[str, frozenset[str]] = dc.field(default_factory=dict)

    def refill(self, other: LayerTables) -> bool:
        """Take over the values of `other` in place, so that graphs compiled on these tables follow.

        False, and nothing is changed, when the two differ in more than values.
        """
        mine, theirs = _parts(self), _parts(other)
        if mine.keys() != theirs.keys() or not all(_alike(mine[key], theirs[key]) for key in mine):
            return False
        for key, value in mine.items():
            if isinstance(value, Tensor):
                value.copy_(theirs[key])
        return True


def _parts(tables: Any) -> dict[str, Any]:
    """The tensors and other values of a table by their place; views made from them are not parts."""
    found: dict[str, Any] = {}
    for field in dc.fields(tables):
        value = getattr(tables, field.name)
        if not field.init:
            continue
        items = value.items() if isinstance(value, dict) else [("", value)]
        for key, item in items:
            place = f"{field.name}.{key}"
            if dc.is_dataclass(item):
                found |= {f"{place}.{name}": part for name, part in _parts(item).items()}
            else:
                found[place] = item
    return found


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)

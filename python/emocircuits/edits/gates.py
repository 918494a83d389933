"""Edits whose strength depends on what a head attends to."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from emocircuits.edits.arrays import number
from emocircuits.edits.base import ATTENTION, ROLE_NAMES, Edit, layer_numbers, role_names
from emocircuits.edits.heads import HeadEdit
from emokernels import Role

if TYPE_CHECKING:
    from emocircuits.families import Geometry

Measure = Literal["logits", "weights"]

MEASURES = ("logits", "weights")


@dc.dataclass(frozen=True)
class GateHeads(Edit):
    """In every row, keep the heads that attend most to keys of ``source``; the output z of all others times ``by``.

    Which heads these are is found anew in every row, from its own attention before routes. A row that sees no such key
    is left alone.

    Args:
        layers: a layer or several; heads of a layer compete with each other.
        keep: how many heads of a layer are left alone.
        by: factor on the output of the others; 0 silences them, 1 changes nothing.
        source: role or roles of the keys.
        measure: what is compared: the sum of a head's ``"logits"`` over the keys of ``source`` that the row sees
            (SPIN's code), or of its softmax ``"weights"``.
    """

    layers: Sequence[int] = ()
    keep: int = 1
    by: float = 0.0
    source: Sequence[str] = ("visual",)
    measure: Measure = "logits"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", layer_numbers(self.layers))
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise ValueError(f"keep={self.keep!r}: expected a number of heads, at least 1")
        object.__setattr__(self, "by", number("by", self.by))
        object.__setattr__(self, "source", _source(self.source))
        if self.measure not in MEASURES:
            raise ValueError(f"measure={self.measure!r}: expected one of {', '.join(MEASURES)}")

    def roles_used(self) -> set[Role]:
        """Roles of rows and keys that the edit names."""
        return super().roles_used() | {Role[n.upper()] for n in self.source}

    def layers_used(self) -> set[int]:
        """The layers named."""
        return set(self.layers)

    def place(self) -> str:
        """Heads are edited in the attention call."""
        return ATTENTION

    def check(self, geometry: Geometry) -> None:
        """ValueError when a layer is not there or has fewer heads than are kept."""
        super().check(geometry)
        if self.keep > geometry.heads:
            raise ValueError(f"keep={self.keep}: a layer of this model has {geometry.heads} heads")


@dc.dataclass(frozen=True)
class GateRoute(HeadEdit):
    """Where a row's softmax weights on keys of ``source`` sum to ``threshold`` or more: these weights times ``by``.

    Not renormalised. Every head and row decides by itself, on the device. Heads that a BoostRoute changes cannot have
    one.

    Args:
        heads: (layer, head) pairs.
        source: role or roles of the keys.
        by: factor, >= 0; 0 takes these keys away, 1 changes nothing.
        threshold: from 0 (always) to 1.
    """

    source: Sequence[str] = ("visual",)
    by: float = 0.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "source", _source(self.source))
        object.__setattr__(self, "by", number("by", self.by, minimum=0.0))
        object.__setattr__(self, "threshold", number("threshold", self.threshold, minimum=0.0))

    def roles_used(self) -> set[Role]:
        """Roles of rows and keys that the edit names."""
        return super().roles_used() | {Role[n.upper()] for n in self.source}


def _source(value: str | Sequence[str] | None) -> tuple[str, ...]:
    names = role_names("source", value)
    if names is None:
        raise ValueError(f"source is None: expected one or more of {', '.join(ROLE_NAMES)}")
    return names

"""What all edits share: which token rows of which batch rows change, and how an edit travels as JSON."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from emocircuits.edits.arrays import FrozenArray
from emokernels import Role

if TYPE_CHECKING:
    from emocircuits.families import Geometry

Phase = Literal["both", "prefill", "decode"]

PHASES = ("both", "prefill", "decode")
ROLE_NAMES = tuple(role.name.lower() for role in Role)
ATTENTION, NEURONS = "attention", "neurons"


@dc.dataclass(frozen=True, kw_only=True)
class Edit:
    """Base of all edits.

    Args:
        to: roles of the rows that change (``"query"``, ``["query", "last"]``, ...); None means every row.
        phase: ``"prefill"`` keeps only prompt roles of ``to``, ``"decode"`` only ``generated``.
        rows: batch rows (None: all), so that one batch can hold different interventions.
        positions: tokens of the prompt (None: all), counted from 0 without padding, or from -1 at its end backwards.
            Rows change that have one of the roles AND one of the positions, in prefill only. On a kept cache they
            count from the beginning of the conversation.
    """

    to: Sequence[str] | None = None
    phase: Phase = "both"
    rows: Sequence[int] | None = None
    positions: Sequence[int] | None = None

    arrays: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "to", role_names("to", self.to))
        if self.phase not in PHASES:
            raise ValueError(f"phase={self.phase!r}: expected one of {', '.join(PHASES)}")
        if self.rows is not None:
            rows = tuple(int(r) for r in ([self.rows] if isinstance(self.rows, int) else self.rows))
            if not rows or min(rows) < 0:
                raise ValueError(f"rows={self.rows!r}: expected batch rows counted from 0 (or None for all of them)")
            object.__setattr__(self, "rows", rows)
        if self.positions is not None:
            object.__setattr__(self, "positions", token_numbers("positions", self.positions))
            if self.phase == "decode":
                raise ValueError("positions are those of prompt tokens, which decode does not run; drop phase='decode'")
        if not self.destinations():
            raise ValueError(
                f"to={list(self.to or ())} never occurs in phase={self.phase!r}: prompt rows exist in prefill only, "
                "generated rows in decode only; drop phase or change to"
            )

    def destinations(self) -> tuple[Role, ...]:
        """The roles whose rows this edit changes, after ``phase``."""
        chosen = tuple(Role) if self.to is None else tuple(Role[n.upper()] for n in self.to)
        if self.phase == "prefill":
            return tuple(r for r in chosen if r != Role.GENERATED)
        if self.phase == "decode":
            return tuple(r for r in chosen if r == Role.GENERATED)
        return chosen

    def roles_used(self) -> set[Role]:
        """Roles that must exist in a prompt for the edit to do anything (named ones, not "every role")."""
        return {Role[n.upper()] for n in self.to or ()}

    def layers_used(self) -> set[int]:
        """Layers the edit touches."""
        raise NotImplementedError

    def place(self) -> str:
        """What of a layer is edited: ``ATTENTION``, ``NEURONS`` or the site of a vector."""
        raise NotImplementedError

    def check(self, geometry: Geometry) -> None:
        """ValueError (or NotImplementedError) when a model of these sizes does not have what the edit names."""
        for layer in sorted(self.layers_used()):
            if layer >= geometry.layers:
                raise ValueError(f"no layer {layer}; this model has layers 0 to {geometry.layers - 1}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; defaults are left out."""
        fields = {f.name: getattr(self, f.name) for f in dc.fields(self) if getattr(self, f.name) != f.default}
        plain = {k: v.tolist() if isinstance(v, FrozenArray) else v for k, v in fields.items()}
        return {"edit": type(self).__name__, **plain}


def token_numbers(name: str, value: int | Iterable[int]) -> tuple[int, ...]:
    """Distinct positions of tokens, in the order given."""
    try:
        positions = tuple(int(v) for v in ([value] if isinstance(value, int) else value))
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r}: expected token numbers such as [0, 5, -1]") from None
    if not positions or len(set(positions)) != len(positions):
        raise ValueError(f"{name}={value!r}: expected one or more distinct token numbers (or None for every token)")
    return positions


def role_names(name: str, value: str | Role | Iterable[str | Role] | None) -> tuple[str, ...] | None:
    """Role names in lower case; None stays None.

    Raises:
        ValueError: an unknown role, or none at all.
    """
    if value is None:
        return None
    items = [value] if isinstance(value, str | Role) else list(value)
    names = tuple(Role(v).name.lower() if isinstance(v, int) else str(v).lower() for v in items)
    unknown = [n for n in names if n not in ROLE_NAMES]
    if unknown or not names:
        raise ValueError(f"{name}={value!r}: expected one or more of {', '.join(ROLE_NAMES)} (or None for every role)")
    return names


def layer_numbers(value: int | Iterable[int]) -> tuple[int, ...]:
    """Distinct layer numbers, in the order given."""
    layers = (int(value),) if isinstance(value, int) else tuple(int(v) for v in value)
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
        raise ValueError(f"layers={value!r}: expected one or more distinct non-negative layer numbers")
    return layers


def check_length(name: str, array: FrozenArray, size: int) -> None:
    """ValueError unless the last axis of ``array`` has ``size`` entries."""
    if array.shape[-1] != size:
        raise ValueError(f"{name} has length {array.shape[-1]}; this model needs {size}")

"""Edits of attention heads: routes between roles, and head outputs z before the output projection."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from emocircuits.edits.arrays import FrozenArray, number
from emocircuits.edits.base import ATTENTION, ROLE_NAMES, Edit, check_length, role_names, token_numbers
from emokernels import Role

if TYPE_CHECKING:
    from emocircuits.families import Geometry

Reading = Literal["weight", "logit-add", "logit-scale", "logit-abs"]

READINGS = ("weight", "logit-add", "logit-scale", "logit-abs")


@dc.dataclass(frozen=True)
class HeadEdit(Edit):
    """Base of the edits that name heads.

    Args:
        heads: (layer, head) pairs; query heads, counted from 0.
    """

    heads: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "heads", head_pairs(self.heads))

    def layers_used(self) -> set[int]:
        """Layers of the heads."""
        return {layer for layer, _ in self.heads}

    def place(self) -> str:
        """Heads are edited in the attention call."""
        return ATTENTION

    def check(self, geometry: Geometry) -> None:
        """ValueError when a layer or head is not there, or a value does not fit a head."""
        super().check(geometry)
        for layer, head in self.heads:
            if head >= geometry.heads:
                raise ValueError(f"layer {layer} has no head {head}; this model has heads 0 to {geometry.heads - 1}")
        for name in self.arrays:
            check_length(name, getattr(self, name), geometry.head_dim)


@dc.dataclass(frozen=True)
class BoostRoute(HeadEdit):
    """Multiply the attention that rows of role ``to`` pay to keys of role ``source``, for some heads.

    Args:
        heads: (layer, head) pairs; query heads, counted from 0.
        source: role or roles of the keys.
        by: strength, in the sense of ``reading``:
            ``"weight"`` softmax weights times ``by``, not renormalised (>= 0; 1 changes nothing);
            ``"logit-add"`` logits plus ln(``by``): multiply and renormalise (>= 0; 0 knocks the route out);
            ``"logit-scale"`` logits times ``by``;
            ``"logit-abs"`` logits plus ``by`` * abs(logits) (PAI; 0 changes nothing).
        source_positions: keys have one of the roles AND one of these positions, counted as ``positions`` are; with
            them ``source=None`` means any role. Rows of a prompt change only.
    """

    source: Sequence[str] = ("visual",)
    by: float = 1.0
    reading: Reading = "weight"
    source_positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.source_positions is not None:
            numbers = token_numbers("source_positions", self.source_positions)
            object.__setattr__(self, "source_positions", numbers)
            if self.phase == "decode" or role_names("to", self.to) == ("generated",):
                raise ValueError(
                    "source_positions change rows of a prompt only: name its roles in to, and drop phase='decode'"
                )
            object.__setattr__(self, "source", ROLE_NAMES if self.source is None else self.source)
        super().__post_init__()
        if self.source is None:
            raise ValueError(f"source is None: expected one or more of {', '.join(ROLE_NAMES)}")
        object.__setattr__(self, "source", role_names("source", self.source))
        if self.reading not in READINGS:
            raise ValueError(f"reading={self.reading!r}: expected one of {', '.join(READINGS)}")
        low = 0.0 if self.reading in ("weight", "logit-add") else None
        object.__setattr__(self, "by", number("by", self.by, minimum=low))

    def destinations(self) -> tuple[Role, ...]:
        """The roles whose rows this edit changes, after ``phase``; with ``source_positions`` only those of a prompt."""
        roles = super().destinations()
        return roles if self.source_positions is None else tuple(r for r in roles if r != Role.GENERATED)

    def roles_used(self) -> set[Role]:
        """Roles of rows and keys that the edit names."""
        sources = set() if self.source == ROLE_NAMES else {Role[n.upper()] for n in self.source}
        return super().roles_used() | sources


@dc.dataclass(frozen=True)
class ScaleHead(HeadEdit):
    """Multiply the output z of some heads by ``by`` (0 ablates, > 1 enhances) before the output projection."""

    by: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "by", number("by", self.by))


@dc.dataclass(frozen=True)
class AddHead(HeadEdit):
    """Add ``by * vector`` to the output z of some heads, after factors (ITI, ICT).

    Args:
        heads: (layer, head) pairs.
        vector: array of shape ``[D]`` (one for all heads) or ``[n, D]`` (one per head, in the order of ``heads``).
        by: factor on the vector (alpha, times sigma where a method scales by the spread of activations).
    """

    vector: Any = ()
    by: float = 1.0

    arrays: ClassVar[tuple[str, ...]] = ("vector",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "vector", FrozenArray("vector", self.vector))
        object.__setattr__(self, "by", number("by", self.by))
        shape = self.vector.shape
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != len(self.heads)):
            raise ValueError(f"vector has shape {shape} for {len(self.heads)} heads: expected [D] or [n_heads, D]")


@dc.dataclass(frozen=True)
class ReplaceHead(HeadEdit):
    """Set the output z of some heads: activation patching.

    Args:
        heads: (layer, head) pairs.
        value: array of shape ``[D]`` (one vector for all), ``[n, D]`` (one per head, in the order of ``heads``), or
            ``[B, P, n, D]`` with P the number of prompt columns: the value of each batch row and column of the prompt
            (padding included). The last form acts in prefill only.
    """

    value: Any = ()

    arrays: ClassVar[tuple[str, ...]] = ("value",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "value", FrozenArray("value", self.value))
        shape = self.value.shape
        if len(shape) not in (1, 2, 4) or (len(shape) > 1 and shape[-2] != len(self.heads)):
            raise ValueError(
                f"value has shape {shape} for {len(self.heads)} heads: expected [D], [n_heads, D] or "
                "[batch, prompt columns, n_heads, D]"
            )


def head_pairs(value: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Distinct (layer, head) pairs, in the order given.

    Raises:
        TypeError: not pairs of integers.
        ValueError: none, twice the same, or negative.
    """
    try:
        heads = tuple((int(layer), int(head)) for layer, head in value)
    except (TypeError, ValueError):
        raise TypeError(f"heads={value!r}: expected (layer, head) pairs such as [(12, 18), (14, 3)]") from None
    if not heads:
        raise ValueError("heads is empty: name at least one (layer, head) pair, or leave the edit out of the plan")
    if len(set(heads)) != len(heads) or min(min(h) for h in heads) < 0:
        raise ValueError(f"heads={list(heads)}: expected distinct pairs of non-negative integers")
    return heads

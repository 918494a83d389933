"""The edits a Plan is made of: plain, frozen, hashable values that name what changes and by how much.

Every edit says *where* (layers, heads or neurons), *which rows* (``to``: roles of the destination tokens, ``phase``,
and ``rows`` of the batch) and *what* (a factor or a vector). Nothing here touches a model or a device.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from emokernels import Role

Phase = Literal["both", "prefill", "decode"]
Reading = Literal["weight", "logit-add", "logit-scale", "logit-abs"]
Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]

READINGS = ("weight", "logit-add", "logit-scale", "logit-abs")
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")
PHASES = ("both", "prefill", "decode")
ROLE_NAMES = tuple(role.name.lower() for role in Role)
PREFILL = (Role.SYSTEM, Role.VISUAL, Role.QUERY, Role.LAST)


def _roles(name: str, value: str | Role | Iterable[str | Role] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = [value] if isinstance(value, str | Role) else list(value)
    names = tuple(Role(v).name.lower() if isinstance(v, int) else str(v).lower() for v in items)
    unknown = [n for n in names if n not in ROLE_NAMES]
    if unknown or not names:
        raise ValueError(f"{name}={value!r}: expected one or more of {', '.join(ROLE_NAMES)} (or None for every role)")
    return names


def _heads(value: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    try:
        heads = tuple((int(layer), int(head)) for layer, head in value)
    except (TypeError, ValueError):
        raise TypeError(f"heads={value!r}: expected (layer, head) pairs such as [(12, 18), (14, 3)]") from None
    if not heads:
        raise ValueError("heads is empty: name at least one (layer, head) pair, or leave the edit out of the plan")
    if len(set(heads)) != len(heads) or min(min(h) for h in heads) < 0:
        raise ValueError(f"heads={list(heads)}: expected distinct pairs of non-negative integers")
    return heads


def _layers(value: int | Iterable[int]) -> tuple[int, ...]:
    layers = (int(value),) if isinstance(value, int) else tuple(int(v) for v in value)
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
        raise ValueError(f"layers={value!r}: expected one or more distinct non-negative layer numbers")
    return layers


def _number(name: str, value: float, *, minimum: float | None = None) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
        raise TypeError(f"{name}={value!r}: expected a finite number")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}={value!r}: expected at least {minimum}")
    return float(value)


class FrozenArray:
    """A float32 array that compares and hashes by value; ``numpy.asarray`` and ``tolist`` give its content."""

    __slots__ = ("_array",)

    def __init__(self, name: str, value: Any) -> None:
        if isinstance(value, FrozenArray):
            self._array: np.ndarray = value._array
            return
        given = value.detach().cpu().float().numpy() if isinstance(value, torch.Tensor) else value
        try:
            array = np.array(given, np.float32)
        except (TypeError, ValueError):
            raise TypeError(
                f"{name} is {type(value).__name__}: expected a tensor, an array or nested lists of numbers"
            ) from None
        if array.ndim == 0 or array.size == 0 or not np.isfinite(array).all():
            raise ValueError(f"{name} has shape {array.shape}: expected a non-empty array of finite numbers")
        array.flags.writeable = False
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._array.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._array.ndim

    def tolist(self) -> list[Any]:
        """Nested lists of Python floats; exact."""
        return self._array.tolist()

    def tensor(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A fresh tensor with the content."""
        return torch.tensor(self._array, device=device, dtype=dtype)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._array.astype(dtype) if dtype is not None else self._array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrozenArray) and np.array_equal(self._array, other._array)

    def __hash__(self) -> int:
        return hash((self.shape, self._array.tobytes()))

    def __repr__(self) -> str:
        return f"<float32 array {'x'.join(map(str, self.shape))}>"


@dc.dataclass(frozen=True, kw_only=True)
class Edit:
    """What all edits share: which token rows of which batch rows they act on.

    Args:
        to: roles of the rows that change (``"query"``, ``["query", "last"]``, ...); None means every row.
        phase: ``"prefill"`` keeps only prompt roles of ``to``, ``"decode"`` only ``generated``.
        rows: batch rows (None: all), so that one batch can hold different interventions.
    """

    to: Sequence[str] | None = None
    phase: Phase = "both"
    rows: Sequence[int] | None = None

    arrays: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "to", _roles("to", self.to))
        if self.phase not in PHASES:
            raise ValueError(f"phase={self.phase!r}: expected one of {', '.join(PHASES)}")
        if self.rows is not None:
            rows = tuple(int(r) for r in ([self.rows] if isinstance(self.rows, int) else self.rows))
            if not rows or min(rows) < 0:
                raise ValueError(f"rows={self.rows!r}: expected batch rows counted from 0 (or None for all of them)")
            object.__setattr__(self, "rows", rows)
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
        pairs = [*getattr(self, "heads", ()), *getattr(self, "neurons", ())]
        return {layer for layer, _ in pairs} | set(getattr(self, "layers", ()))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; defaults are left out."""
        fields = {f.name: getattr(self, f.name) for f in dc.fields(self) if getattr(self, f.name) != f.default}
        plain = {k: v.tolist() if isinstance(v, FrozenArray) else v for k, v in fields.items()}
        return {"edit": type(self).__name__, **plain}


@dc.dataclass(frozen=True)
class BoostRoute(Edit):
    """Multiply the attention that rows of role ``to`` pay to keys of role ``source``, for some heads.

    Args:
        heads: (layer, head) pairs; query heads, counted from 0.
        source: role or roles of the keys.
        by: strength, in the sense of ``reading``:
            ``"weight"`` softmax weights times ``by``, not renormalised (>= 0; 1 changes nothing);
            ``"logit-add"`` logits plus ln(``by``): multiply and renormalise (>= 0; 0 knocks the route out);
            ``"logit-scale"`` logits times ``by``;
            ``"logit-abs"`` logits plus ``by`` * abs(logits) (PAI; 0 changes nothing).
    """

    heads: Sequence[tuple[int, int]] = ()
    source: Sequence[str] = ("visual",)
    by: float = 1.0
    reading: Reading = "weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "heads", _heads(self.heads))
        if self.source is None:
            raise ValueError(f"source is None: expected one or more of {', '.join(ROLE_NAMES)}")
        object.__setattr__(self, "source", _roles("source", self.source))
        if self.reading not in READINGS:
            raise ValueError(f"reading={self.reading!r}: expected one of {', '.join(READINGS)}")
        low = 0.0 if self.reading in ("weight", "logit-add") else None
        object.__setattr__(self, "by", _number("by", self.by, minimum=low))

    def roles_used(self) -> set[Role]:
        """Roles of rows and keys that the edit names."""
        return super().roles_used() | {Role[n.upper()] for n in self.source}


@dc.dataclass(frozen=True)
class ScaleHead(Edit):
    """Multiply the output z of some heads by ``by`` (0 ablates, > 1 enhances) before the output projection."""

    heads: Sequence[tuple[int, int]] = ()
    by: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "heads", _heads(self.heads))
        object.__setattr__(self, "by", _number("by", self.by))


@dc.dataclass(frozen=True)
class ReplaceHead(Edit):
    """Set the output z of some heads: activation patching.

    Args:
        heads: (layer, head) pairs.
        value: array of shape ``[D]`` (one vector for all), ``[n, D]`` (one per head, in the order of ``heads``), or
            ``[B, P, n, D]`` with P the number of prompt columns: the value of each batch row and column of the prompt
            (padding included). The last form acts in prefill only.
    """

    heads: Sequence[tuple[int, int]] = ()
    value: Any = ()

    arrays: ClassVar[tuple[str, ...]] = ("value",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "heads", _heads(self.heads))
        object.__setattr__(self, "value", FrozenArray("value", self.value))
        shape = self.value.shape
        if len(shape) not in (1, 2, 4) or (len(shape) > 1 and shape[-2] != len(self.heads)):
            raise ValueError(
                f"value has shape {shape} for {len(self.heads)} heads: expected [D], [n_heads, D] or "
                "[batch, prompt columns, n_heads, D]"
            )


@dc.dataclass(frozen=True)
class ScaleNeurons(Edit):
    """Multiply MLP neurons (entries of the input of ``down_proj``) by ``by``.

    Args:
        neurons: ``{layer: [neuron, ...]}``.
        by: factor; 0 ablates, > 1 amplifies.
    """

    neurons: tuple[tuple[int, tuple[int, ...]], ...] = ()
    by: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.neurons
        try:
            items = given.items() if isinstance(given, Mapping) else given
            neurons = tuple(sorted((int(layer), tuple(int(i) for i in index)) for layer, index in items))
        except (TypeError, ValueError):
            raise TypeError(f"neurons={given!r}: expected {{layer: [neuron, ...]}} such as {{20: [8483]}}") from None
        if not neurons or any(not i or min(i) < 0 or layer < 0 or len(set(i)) != len(i) for layer, i in neurons):
            raise ValueError(f"neurons={given!r}: expected distinct non-negative neuron numbers, at least one a layer")
        object.__setattr__(self, "neurons", neurons)
        object.__setattr__(self, "by", _number("by", self.by))


@dc.dataclass(frozen=True)
class AddVector(Edit):
    """Add ``by`` times a vector of length d_model to the residual stream (steering).

    Args:
        layers: a layer or several.
        vector: ``[d_model]``, or ``[n_layers, d_model]`` in the order of ``layers``.
        site: ``resid_pre`` (enters the block), ``resid_post`` (leaves it), ``attn_out`` or ``mlp_out``.
        by: factor on the vector (alpha).
    """

    layers: Sequence[int] = ()
    vector: Any = ()
    site: Site = "resid_post"
    by: float = 1.0

    arrays: ClassVar[tuple[str, ...]] = ("vector",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_vector(self)
        object.__setattr__(self, "by", _number("by", self.by))


@dc.dataclass(frozen=True)
class ReplaceVector(Edit):
    """Set rows of the residual stream, or of an attention or MLP output, to a vector. Arguments as in AddVector."""

    layers: Sequence[int] = ()
    vector: Any = ()
    site: Site = "resid_post"

    arrays: ClassVar[tuple[str, ...]] = ("vector",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_vector(self)


def _check_vector(edit: AddVector | ReplaceVector) -> None:
    object.__setattr__(edit, "layers", _layers(edit.layers))
    object.__setattr__(edit, "vector", FrozenArray("vector", edit.vector))
    shape = edit.vector.shape
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != len(edit.layers)):
        raise ValueError(
            f"vector has shape {shape} for {len(edit.layers)} layers: expected [d_model] or [layers, d_model]"
        )
    if edit.site not in SITES:
        raise ValueError(f"site={edit.site!r}: expected one of {', '.join(SITES)}")


EDITS: dict[str, type[Edit]] = {
    c.__name__: c for c in (BoostRoute, ScaleHead, ReplaceHead, ScaleNeurons, AddVector, ReplaceVector)
}

"""Edits of whole vectors of a token: the residual stream, and what attention and MLP write to it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from emocircuits.edits.arrays import FrozenArray, number
from emocircuits.edits.base import Edit, check_length, layer_numbers

if TYPE_CHECKING:
    from emocircuits.families import Geometry

Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]
Norm = Literal["free", "keep"]

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")
NORMS = ("free", "keep")


@dc.dataclass(frozen=True)
class VectorEdit(Edit):
    """Base of the edits of vectors. On one place they act in this order: project out, add, add and keep the norm, set.

    Args:
        layers: a layer or several.
        vector: ``[d_model]``, or ``[n_layers, d_model]`` in the order of ``layers``.
        site: ``resid_pre`` (enters the block), ``resid_post`` (leaves it), ``attn_out`` or ``mlp_out``.
    """

    layers: Sequence[int] = ()
    vector: Any = ()
    site: Site = "resid_post"

    arrays: ClassVar[tuple[str, ...]] = ("vector",)
    stacked: ClassVar[bool] = False
    """Whether a vector may be several directions, ``[k, d_model]``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", layer_numbers(self.layers))
        if self.site not in SITES:
            raise ValueError(f"site={self.site!r}: expected one of {', '.join(SITES)}")
        object.__setattr__(self, "vector", FrozenArray("vector", self.vector))
        self._check_shape()

    def _check_shape(self) -> None:
        shape, axes = self.vector.shape, 2 if self.stacked else 1
        per_layer = len(shape) == axes + 1
        if not (per_layer or 1 <= len(shape) <= axes) or (per_layer and shape[0] != len(self.layers)):
            forms = (
                "[d_model], [k, d_model] or [layers, k, d_model]" if self.stacked else "[d_model] or [layers, d_model]"
            )
            raise ValueError(f"vector has shape {shape} for {len(self.layers)} layers: expected {forms}")

    def at(self, layer: int) -> np.ndarray:
        """What is given for one layer: ``[d_model]``, or ``[k, d_model]`` where directions may be several."""
        array = np.asarray(self.vector)
        if array.ndim == (3 if self.stacked else 2):
            array = array[self.layers.index(layer)]
        return np.atleast_2d(array) if self.stacked else array

    def layers_used(self) -> set[int]:
        """The layers named."""
        return set(self.layers)

    def place(self) -> str:
        """The site."""
        return self.site

    def check(self, geometry: Geometry) -> None:
        """ValueError when a layer is not there or the vector does not fit the residual stream."""
        super().check(geometry)
        check_length("vector", self.vector, geometry.d_model)


@dc.dataclass(frozen=True)
class AddVector(VectorEdit):
    """Add ``by`` times a vector of length d_model (steering).

    Args:
        layers: a layer or several.
        vector: ``[d_model]``, or ``[n_layers, d_model]`` in the order of ``layers``.
        site: ``resid_pre`` (enters the block), ``resid_post`` (leaves it), ``attn_out`` or ``mlp_out``.
        by: factor on the vector (alpha).
        norm: ``"keep"`` scales the sum back to the length that the row h had: ``(h + v) * |h| / |h + v|`` (VISTA).
        relative: the vector gives a direction only, ``by`` is in units of the length of h: ``h + by * |h| * v / |v|``.
    """

    by: float = 1.0
    norm: Norm = "free"
    relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "by", number("by", self.by))
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r}: expected one of {', '.join(NORMS)}")
        if not isinstance(self.relative, bool):
            raise TypeError(f"relative={self.relative!r}: expected True or False")
        if self.relative:
            _require_direction(self)


@dc.dataclass(frozen=True)
class ProjectOut(VectorEdit):
    """Remove what a row has along one or several directions: ``h - (h . v) v / |v|^2`` (directional ablation).

    Several directions, also of several edits that meet, are orthonormalised: the row keeps nothing in their span.

    Args:
        layers: a layer or several.
        vector: ``[d_model]`` or ``[k, d_model]`` for all layers, or ``[n_layers, k, d_model]`` in their order.
        site: ``resid_pre`` (enters the block), ``resid_post`` (leaves it), ``attn_out`` or ``mlp_out``.
    """

    stacked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_direction(self)


@dc.dataclass(frozen=True)
class ReplaceVector(VectorEdit):
    """Set rows of the residual stream, or of an attention or MLP output, to a vector. Arguments as in VectorEdit."""


def _require_direction(edit: VectorEdit) -> None:
    if any(not np.asarray(edit.at(layer)).any() for layer in edit.layers):
        raise ValueError("vector is zero, which is no direction: leave out the layers where it is")

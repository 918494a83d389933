"""Edits of whole vectors of a token: the residual stream, what is written to it, and cached keys and values."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from emocircuits.edits.arrays import FrozenArray, number
from emocircuits.edits.base import Edit, check_length, layer_numbers, role_names
from emokernels import Role

if TYPE_CHECKING:
    from emocircuits.families import Geometry

Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "k", "v"]
Norm = Literal["free", "keep"]

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")
CACHE_SITES = ("k", "v")
NORMS = ("free", "keep")


@dc.dataclass(frozen=True)
class VectorEdit(Edit):
    """Base of the edits of vectors. On one place they act in this order: project out, add, add and keep the norm, set.

    Args:
        layers: a layer or several.
        vector: ``[d_model]``, or ``[n_layers, d_model]`` in the order of ``layers``.
        site: ``resid_pre`` (enters the block), ``resid_post`` (leaves it), ``attn_out`` or ``mlp_out``; or ``k`` or
            ``v``: the keys or values that a prompt leaves in the cache, edited once when its forward pass has ended.
            Keys are those after rotary embedding. There a vector is ``[kv_heads, head_dim]``, or ``[n_layers,
            kv_heads, head_dim]``; lengths and directions are those of each head.
    """

    layers: Sequence[int] = ()
    vector: Any = ()
    site: Site = "resid_post"

    arrays: ClassVar[tuple[str, ...]] = ("vector",)
    stacked: ClassVar[bool] = False
    """Whether a vector may be several directions, ``[k, d_model]``."""

    def __post_init__(self) -> None:
        if self.site not in SITES + CACHE_SITES:
            raise ValueError(f"site={self.site!r}: expected one of {', '.join(SITES + CACHE_SITES)}")
        if self.site in CACHE_SITES and (self.phase == "decode" or role_names("to", self.to) == ("generated",)):
            raise ValueError(
                f"site={self.site!r} edits what a prompt leaves in the cache, once: name roles of a prompt in to, "
                "and drop phase='decode'"
            )
        super().__post_init__()
        object.__setattr__(self, "layers", layer_numbers(self.layers))
        object.__setattr__(self, "vector", FrozenArray("vector", self.vector))
        self._check_shape()

    def _check_shape(self) -> None:
        shape, axes = self.vector.shape, self._axes
        most = axes + 1 + self.stacked
        if not axes <= len(shape) <= most or (len(shape) == most and shape[0] != len(self.layers)):
            one = "d_model" if axes == 1 else "kv_heads, head_dim"
            forms = ["", "k, ", "layers, k, "] if self.stacked else ["", "layers, "]
            expected = " or ".join(f"[{form}{one}]" for form in forms)
            raise ValueError(f"vector has shape {shape} for {len(self.layers)} layers: expected {expected}")

    @property
    def _axes(self) -> int:
        """Axes of one vector."""
        return 2 if self.site in CACHE_SITES else 1

    def destinations(self) -> tuple[Role, ...]:
        """The roles whose rows this edit changes, after ``phase``; in a cache only those of a prompt."""
        roles = super().destinations()
        return tuple(r for r in roles if r != Role.GENERATED) if self.site in CACHE_SITES else roles

    def at(self, layer: int) -> np.ndarray:
        """What is given for one layer: one vector, or ``[k, ...]`` of them where directions may be several."""
        array = np.asarray(self.vector)
        if array.ndim == self._axes + 1 + self.stacked:
            array = array[self.layers.index(layer)]
        return array[None] if self.stacked and array.ndim == self._axes else array

    def layers_used(self) -> set[int]:
        """The layers named."""
        return set(self.layers)

    def place(self) -> str:
        """The site."""
        return self.site

    def check(self, geometry: Geometry) -> None:
        """ValueError when a layer is not there or the vector does not fit the site."""
        super().check(geometry)
        if self.site in CACHE_SITES:
            needed = (geometry.kv_heads, geometry.head_dim)
            if self.vector.shape[-2:] != needed:
                raise ValueError(
                    f"vector ends in {self.vector.shape[-2:]}; keys and values of this model need {needed}"
                )
        else:
            check_length("vector", self.vector, geometry.d_model)


@dc.dataclass(frozen=True)
class AddVector(VectorEdit):
    """Add ``by`` times a vector of length d_model (steering).

    Args:
        layers: a layer or several.
        vector: ``[d_model]``, or ``[n_layers, d_model]`` in the order of ``layers``.
        site: as in VectorEdit.
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
        site: as in VectorEdit.
    """

    stacked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_direction(self)


@dc.dataclass(frozen=True)
class ReplaceVector(VectorEdit):
    """Set what is at a site to a vector. Arguments as in VectorEdit."""


def _require_direction(edit: VectorEdit) -> None:
    if any(not np.asarray(edit.at(layer)).any() for layer in edit.layers):
        raise ValueError("vector is zero, which is no direction: leave out the layers where it is")

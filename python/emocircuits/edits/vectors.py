"""Edits of whole rows of d_model numbers: the residual stream, and what attention and MLP write to it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from emocircuits.edits.arrays import FrozenArray, number
from emocircuits.edits.base import Edit, check_length, layer_numbers

if TYPE_CHECKING:
    from emocircuits.families import Geometry

Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")


@dc.dataclass(frozen=True)
class VectorEdit(Edit):
    """Base of the edits of vectors.

    Args:
        layers: a layer or several.
        vector: ``[d_model]``, or ``[n_layers, d_model]`` in the order of ``layers``.
        site: ``resid_pre`` (enters the block), ``resid_post`` (leaves it), ``attn_out`` or ``mlp_out``.
    """

    layers: Sequence[int] = ()
    vector: Any = ()
    site: Site = "resid_post"

    arrays: ClassVar[tuple[str, ...]] = ("vector",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", layer_numbers(self.layers))
        object.__setattr__(self, "vector", FrozenArray("vector", self.vector))
        shape = self.vector.shape
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != len(self.layers)):
            raise ValueError(
                f"vector has shape {shape} for {len(self.layers)} layers: expected [d_model] or [layers, d_model]"
            )
        if self.site not in SITES:
            raise ValueError(f"site={self.site!r}: expected one of {', '.join(SITES)}")

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
    """

    by: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "by", number("by", self.by))


@dc.dataclass(frozen=True)
class ReplaceVector(VectorEdit):
    """Set rows of the residual stream, or of an attention or MLP output, to a vector. Arguments as in AddVector."""

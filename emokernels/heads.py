"""Head edits: what becomes of a head's output z before the output projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import message, require_tensor


@dataclass(frozen=True, eq=False)
class HeadEdits:
    """``z' = scale * z + shift``; where ``mask`` is set, ``z' = replace``.

    Fields, each ``None`` (identity) or a float tensor; a dimension of 1 is shared by all batch rows or all positions:

    * ``scale``   ``[B|1, N|1, H]``
    * ``shift``   ``[B|1, N|1, H, D]``, in units of z
    * ``replace`` ``[B|1, N|1, H, D]``, read only where ``mask`` is set (any value elsewhere, NaN too)
    * ``mask``    ``[B|1, N|1, H]`` bool; given exactly when ``replace`` is

    Scale and shift are applied in float32 (float64 for float64 z), then rounded to z's dtype. Values are read at every
    call and may be refilled in place.

    Raises:
        TypeError: a field is not a tensor, a value is not floating point, or the mask is not bool.
        ValueError: a rank does not fit, heads or devices disagree, or only one of replace and mask is given.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    replace: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.replace is None) != (self.mask is None):
            raise ValueError(
                message(
                    "HeadEdits.mask",
                    "replace and mask together",
                    "only one of them",
                    "mask [B|1, N|1, H] bool says where replace is used.",
                )
            )
        first: tuple[str, Tensor] | None = None
        for name, value in self.fields():
            rank = 3 if name in ("scale", "mask") else 4
            shape = "[B|1, N|1, H]" if rank == 3 else "[B|1, N|1, H, D]"
            require_tensor(f"HeadEdits.{name}", value, f"Give a tensor of shape {shape}.")
            if name == "mask" and value.dtype != torch.bool:
                raise TypeError(
                    message("HeadEdits.mask", "bool, True where z is replaced", value, "Convert with mask.bool().")
                )
            if name != "mask" and not value.is_floating_point():
                raise TypeError(
                    message(f"HeadEdits.{name}", "a floating-point tensor", value, "Convert with value.float().")
                )
            if value.dim() != rank:
                raise ValueError(
                    message(f"HeadEdits.{name}", f"shape {shape}", value, "Use size 1 for a shared dimension.")
                )
            if first is None:
                first = (name, value)
            if value.shape[2] != first[1].shape[2] or value.device != first[1].device:
                raise ValueError(
                    message(
                        f"HeadEdits.{name}",
                        f"{first[1].shape[2]} heads on {first[1].device} like HeadEdits.{first[0]}",
                        value,
                        "Dimension 2 counts all query heads; HeadEdits.to(device) moves all fields together.",
                    )
                )

    def fields(self) -> Iterator[tuple[str, Tensor]]:
        """The fields that are set, as (name, tensor)."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def is_identity(self) -> bool:
        """True when nothing is changed. Reads the values: on a GPU this waits for the device."""
        return (
            (self.scale is None or bool((self.scale == 1).all()))
            and (self.shift is None or bool((self.shift == 0).all()))
            and (self.mask is None or not bool(self.mask.any()))
        )

    def to(self, device: torch.device | str) -> HeadEdits:
        """The same edits with every field on `device`."""
        return HeadEdits(**{name: value.to(device) for name, value in self.fields()})

    def select_rows(self, index: Tensor) -> HeadEdits:
        """Edits of the batch rows `index` ([B'] int64), as beams expand a batch."""
        return HeadEdits(
            **{name: value if value.shape[0] == 1 else value.index_select(0, index) for name, value in self.fields()}
        )

    def check_against(self, batch: int, queries: int, heads: int, head_dim: int, device: torch.device) -> None:
        """ValueError unless the fields fit z ``[B, H, N, D]`` on `device`."""
        for name, value in self.fields():
            want = (batch, queries, heads, head_dim)[: value.dim()]
            shared = (1, 1, heads, head_dim)[: value.dim()]
            fits = all(size in (full, one) for size, full, one in zip(value.shape, want, shared, strict=True))
            if not fits or value.device != device:
                rank = "[B|1, N|1, H]" if value.dim() == 3 else "[B|1, N|1, H, D]"
                raise ValueError(
                    message(
                        f"heads.{name}",
                        f"{rank} with B={batch}, N={queries}, H={heads}, D={head_dim} on {device}",
                        value,
                        "Size the edits for this call, or use 1 for rows and positions they share.",
                    )
                )


def apply_head_edits(z: Tensor, heads: HeadEdits, *, inplace: bool = False) -> Tensor:
    """Edited z, differentiable in z and in every value of the edits.

    Args:
        z: ``[B, H, N, D]``.
        heads: edits that fit z (see `HeadEdits.check_against`).
        inplace: allow overwriting z, for a fresh z that needs no gradient.

    Returns:
        ``[B, H, N, D]`` in z's dtype, never an alias of a field of `heads`.
    """
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    edited = z
    if heads.scale is not None:
        factor = heads.scale.to(wide).transpose(1, 2).unsqueeze(-1)
        edited = edited.mul_(factor) if inplace and edited.dtype == wide else edited.to(wide) * factor
    if heads.shift is not None:
        shift = heads.shift.to(wide).transpose(1, 2)
        edited = edited.add_(shift) if inplace and edited.dtype == wide else edited.to(wide) + shift
    edited = edited.to(z.dtype)
    if heads.replace is not None and heads.mask is not None:
        where = heads.mask.transpose(1, 2).unsqueeze(-1)
        edited = torch.where(where, heads.replace.transpose(1, 2).to(z.dtype), edited)
    return edited

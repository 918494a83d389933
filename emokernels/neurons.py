"""Neuron edits: sparse changes of the activations that enter the down projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import message, require_tensor


@dataclass(frozen=True, eq=False)
class NeuronEdits:
    """``a'[i] = scale * a[i] + shift`` for the indexed neurons; where ``mask`` is set, ``a'[i] = replace``.

    * ``index``   ``[n]`` (shared) or ``[B, n]`` (per batch row) int64, without duplicates within a row
    * ``scale``, ``shift``, ``replace``  ``[B|1, N|1, n]`` float, aligned with the last dimension of ``index``
    * ``mask``    ``[B|1, N|1, n]`` bool; given exactly when ``replace`` is

    Neurons that are not indexed are not touched. Rows that edit fewer than n neurons pad ``index`` with any other
    neuron at scale 1. Scale and shift are applied in float32 (float64 for float64 activations), then rounded. Values
    are read at every call and may be refilled in place.

    Raises:
        TypeError: a field is not a tensor or has the wrong dtype.
        ValueError: a shape does not fit, fields disagree, only one of replace and mask is given, or (CPU tensors) an
            index is negative or appears twice. The upper bound is checked when the edits meet activations.
    """

    index: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    replace: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        index = self.index
        require_tensor("NeuronEdits.index", index, "Give neuron numbers as torch.tensor([...]).")
        if index.dtype != torch.int64:
            raise TypeError(message("NeuronEdits.index", "int64", index, "Convert with index.long()."))
        if index.dim() not in (1, 2) or index.shape[-1] == 0:
            raise ValueError(
                message("NeuronEdits.index", "shape [n] or [B, n] with n >= 1", index, "Use None for no edit.")
            )
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            if int(index.min()) < 0:
                raise ValueError(
                    message("NeuronEdits.index", "numbers >= 0", f"{int(index.min())}", "Count neurons from 0.")
                )
            ordered = index.sort(-1).values
            if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
                raise ValueError(
                    message(
                        "NeuronEdits.index",
                        "every neuron once per row",
                        "a neuron that appears twice",
                        "Merge its edits into one; pad a row with another neuron at scale 1.",
                    )
                )
        if (self.replace is None) != (self.mask is None):
            raise ValueError(
                message(
                    "NeuronEdits.mask",
                    "replace and mask together",
                    "only one of them",
                    "mask [B|1, N|1, n] bool says where replace is used.",
                )
            )
        for name, value in self.fields():
            require_tensor(f"NeuronEdits.{name}", value, "Give a tensor of shape [B|1, N|1, n].")
            if name == "mask" and value.dtype != torch.bool:
                raise TypeError(
                    message("NeuronEdits.mask", "bool, True where a is replaced", value, "Convert with mask.bool().")
                )
            if name != "mask" and not value.is_floating_point():
                raise TypeError(
                    message(f"NeuronEdits.{name}", "a floating-point tensor", value, "Convert with value.float().")
                )
            if value.dim() != 3 or value.shape[2] != index.shape[-1] or value.device != index.device:
                raise ValueError(
                    message(
                        f"NeuronEdits.{name}",
                        f"shape [B|1, N|1, n] with n={index.shape[-1]} on {index.device}",
                        value,
                        "Align the last dimension with index; NeuronEdits.to(device) moves all fields together.",
                    )
                )

    def fields(self) -> Iterator[tuple[str, Tensor]]:
        """The value fields that are set (without index), as (name, tensor)."""
        for field in dataclasses.fields(self)[1:]:
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

    def to(self, device: torch.device | str) -> NeuronEdits:
        """The same edits with every field on `device`."""
        return NeuronEdits(self.index.to(device), **{name: value.to(device) for name, value in self.fields()})

    def select_rows(self, rows: Tensor) -> NeuronEdits:
        """Edits of the batch rows `rows` ([B'] int64), as beams expand a batch."""
        index = self.index if self.index.dim() == 1 else self.index.index_select(0, rows)
        return NeuronEdits(
            index,
            **{name: value if value.shape[0] == 1 else value.index_select(0, rows) for name, value in self.fields()},
        )

    def check_against(self, batch: int, positions: int, width: int, device: torch.device) -> None:
        """ValueError unless the edits fit activations ``[B, N, width]`` on `device`."""
        index = self.index
        if index.device != device:
            raise ValueError(
                message("neurons.index", f"a tensor on {device}", index, "Move the edits with neurons.to(device).")
            )
        if index.dim() == 2 and index.shape[0] not in (1, batch):
            raise ValueError(
                message(
                    "neurons.index",
                    f"shape [n] or [{batch}, n]",
                    index,
                    "One row of index per batch row, or a shared [n].",
                )
            )
        if device.type == "cpu" and not torch.compiler.is_compiling() and int(index.max()) >= width:
            raise ValueError(
                message(
                    "neurons.index", f"numbers below the width {width}", f"{int(index.max())}", "Check layer and model."
                )
            )
        for name, value in self.fields():
            if value.shape[0] not in (1, batch) or value.shape[1] not in (1, positions):
                raise ValueError(
                    message(
                        f"neurons.{name}",
                        f"shape [{batch}|1, {positions}|1, {index.shape[-1]}]",
                        value,
                        "Size the edits for this call, or use 1 for rows and positions they share.",
                    )
                )

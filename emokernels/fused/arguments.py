"""How tensors of a problem become the arguments of a kernel: strides, tables and head edits by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..heads import HeadEdits
from ..problem import Problem


def shared_stride(tensor: Tensor | None, dimension: int) -> int:
    """The stride of a dimension, 0 where it is shared (size 1) or there is no tensor."""
    return 0 if tensor is None or tensor.shape[dimension] == 1 else tensor.stride(dimension)


def dense_last(value: Tensor | None, dimensions: int) -> Tensor | None:
    """`value` with its last dimensions dense, as the kernels index them; small, and copied only when they are not."""
    if value is None:
        return None
    wanted = 1
    for x in range(1, dimensions + 1):
        if value.shape[-x] > 1 and value.stride(-x) != wanted:
            return value.contiguous()
        wanted *= value.shape[-x]
    return value


def table_arguments(problem: Problem) -> tuple[dict[str, Any], dict[str, bool]]:
    """The tables of a problem with their strides over batch rows, and which there are."""
    tables = {
        name: dense_last(table, 3)
        for name, table in (
            ("bias", problem.bias),
            ("factor", problem.factor),
            ("magnitude", problem.magnitude),
            ("gain", problem.gain),
        )
    }
    strides = {f"stride_{name}_b": shared_stride(table, 0) for name, table in tables.items()}
    return {**tables, **strides}, {name.upper(): table is not None for name, table in tables.items()}


def edit_arguments(heads: HeadEdits | None) -> tuple[dict[str, Any], dict[str, bool]]:
    """Head edits with their strides over batch rows and positions, and which there are."""
    if heads is None:
        return _NO_EDITS
    return _edit_arguments(heads)


def _edit_arguments(edits: HeadEdits) -> tuple[dict[str, Any], dict[str, bool]]:
    scale, chosen = dense_last(edits.scale, 1), dense_last(edits.mask, 1)
    shift, replace = dense_last(edits.shift, 2), dense_last(edits.replace, 2)
    arguments: dict[str, Any] = {
        "head_scale": scale, "head_shift": shift, "head_replace": replace,
        "head_mask": None if chosen is None else chosen.view(torch.uint8),
    }  # fmt: skip
    for name, value in (("scale", scale), ("shift", shift), ("replace", replace), ("chosen", chosen)):
        arguments[f"stride_{name}_b"] = shared_stride(value, 0)
        arguments[f"stride_{name}_n"] = shared_stride(value, 1)
    given = {"HEAD_SCALE": scale is not None, "HEAD_SHIFT": shift is not None, "HEAD_REPLACE": replace is not None}
    return arguments, given


_NO_EDITS = _edit_arguments(HeadEdits())

"""The gated activation from stock kernels, with neuron edits applied to their columns only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..acts import ACTS


def activate(
    gate: Tensor,
    up: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    replace: Tensor | None,
    mask: Tensor | None,
    act: str,
) -> Tensor:
    """``a = act(gate) * up`` with edited columns, contiguous ``[..., F]``; rounds like ``act_fn(gate) * up`` does."""
    a = ACTS[act](gate)
    if up is not None:
        a = a.mul_(up) if a.dtype == up.dtype else a * up
    a = a.contiguous()
    if index is not None:
        edit_columns(a, index, scale, shift, replace, mask)
    return a


def edit_columns(
    a: Tensor, index: Tensor, scale: Tensor | None, shift: Tensor | None, replace: Tensor | None, mask: Tensor | None
) -> None:
    """Edit the indexed columns of `a` ``[B, N, F]`` in place; `a` must be fresh."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    shared = index.dim() == 1
    if shared:
        columns = a.index_select(-1, index)
    else:
        spread = index.unsqueeze(1).expand(a.shape[0], a.shape[1], index.shape[1])
        columns = a.gather(-1, spread)
    edited = columns.to(wide)
    if scale is not None:
        edited = edited * scale.to(wide)
    if shift is not None:
        edited = edited + shift.to(wide)
    if replace is not None and mask is not None:
        edited = torch.where(mask, replace.to(wide), edited)
    if shared:
        a.index_copy_(-1, index, edited.to(a.dtype))
    else:
        a.scatter_(-1, spread, edited.to(a.dtype))

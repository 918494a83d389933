"""The gated activation with neuron edits, written as the formula."""

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
    """``a = act(gate) * up`` with edited columns, ``[..., F]`` in gate's dtype, computed in float32 (or float64)."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    a = ACTS[act](gate.to(wide))
    if up is not None:
        a = a * up.to(wide)
    if index is not None:
        columns = (
            index.expand(a.shape[:-1] + index.shape[-1:])
            if index.dim() == 1
            else index[:, None, :].expand(a.shape[0], a.shape[1], -1)
        )
        edited = a.gather(-1, columns)
        if scale is not None:
            edited = scale.to(wide) * edited
        if shift is not None:
            edited = edited + shift.to(wide)
        if replace is not None and mask is not None:
            edited = torch.where(mask, replace.to(wide), edited)
        a = a.scatter(-1, columns, edited)
    return a.to(gate.dtype).contiguous()

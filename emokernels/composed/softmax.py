"""Masks as additions to scores, and what follows a softmax: rows without keys, and the log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from . import host


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What scores, weights and sums are kept in: float32, float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool or additive mask as values to add: -inf hides. Adding a small mask to large scores beats filling them."""
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, -torch.inf).to(dtype)
    return mask.to(dtype).masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)


def finish(p: Tensor, top: Tensor, may_be_empty: bool, need_lse: bool) -> Tensor | None:
    """Zero the weights ``p [..., K]`` of rows whose largest score ``top [...]`` is -inf, and return lse ``[...]``."""
    empty = None
    if may_be_empty:
        empty = top == -torch.inf
        # On a device looking would cost more than filling.
        if not host.owns(p) or bool(empty.any()):
            p.masked_fill_(empty.unsqueeze(-1), 0.0)
        else:
            empty = None
    if not need_lse:
        return None
    # The largest weight is exp(top - lse), at least 1 / K: no cancellation, and no second exp per score.
    lse = top - p.amax(-1).log_()
    return lse if empty is None else lse.masked_fill_(empty, -torch.inf)

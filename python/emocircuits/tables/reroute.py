"""Routes of single tokens: attention of the rows that edits name by position, computed again with their own tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emocircuits.tables.space import R
from emokernels import Routes
from emokernels.attention import run


@torch.compiler.disable
def reroute(
    z: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kinds: Tensor,
    selected: dict[str, Routes], *, causal: bool, **options: Any,
) -> Tensor:  # fmt: skip
    """``z`` with the outputs of rows of extra kinds in place of those that their roles gave them.

    A kernel tells R kinds of rows apart, so R extra kinds are computed at a time, on the few rows that are theirs.

    Args:
        z: ``[B, H, N, D]``, of the prompt, before head edits.
        query, key, value, mask, causal: of the same attention call.
        kinds: ``[B, N]`` of its rows.
        selected: routes of R kinds each by the number of the first.
        options: further arguments of :func:`emokernels.attention`.
    """
    n, keys = query.shape[2], key.shape[2]
    for start, routes in selected.items():
        slot = kinds.long() - int(start)
        inside = (slot >= 0) & (slot < R)
        columns = inside.any(0).nonzero().flatten()
        if columns.numel() == 0:
            continue
        seen = None
        if mask is not None:
            seen = mask.expand(-1, -1, n, -1).index_select(2, columns)
        elif causal:
            seen = (torch.arange(keys, device=z.device) <= (columns + keys - n)[:, None])[None, None]
        of_rows = slot[:, columns].clamp(0, R - 1).to(torch.uint8)
        new, _ = run(
            query.index_select(2, columns), key, value, mask=seen, query_roles=of_rows, routes=routes, causal=False,
            **options,
        )  # fmt: skip
        merged = torch.where(inside[:, columns][:, None, :, None], new, z.index_select(2, columns))
        z = z.index_copy(2, columns, merged)
    return z

"""Attention of variants to the keys that they share, the base run's before their columns, and then to their own.

On a GPU the shared keys are read where they are (``prefix`` of :func:`emokernels.attention`): variants take no memory
for them. Elsewhere, where the kernel would read a mask row by row for many queries, and where variants have more keys
of their own than they share, for which stock attention is made, they are put before each variant's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emocircuits.sweep import attend
from emocircuits.sweep.trace import LayerTrace
from emokernels.attention import run
from emokernels.backends import resolve

FEW = 8
"""Queries of a variant up to which masks may be read row by row."""


def after_shared(
    record: LayerTrace, start: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool = False
) -> Tensor:
    """Head outputs ``[B, H, n, D]``.

    Args:
        record: the base run's layer.
        start: so many of its keys come first.
        query: ``[B, H, n, D]``.
        key, value: ``[B, H_kv, K, D]``, of the columns from `start` on.
        mask: ``[1, 1 or H, n, start + K]``, additive.
        causal: whether the mask is only that of the last ``n`` columns not seeing what comes after them.
    """
    backend = without_copies(query, value)
    if backend is not None and (query.shape[2] <= FEW or (causal and start >= key.shape[2])):
        z, _ = run(
            query, key, value, mask=None if causal else mask, prefix=(record.k[:, :, :start], record.v[:, :, :start]),
            causal=causal, scale=record.scaling, softcap=record.softcap, backend=backend,
        )  # fmt: skip
        return z
    b = query.shape[0]
    whole = [
        torch.cat([old[:, :, :start].expand(b, -1, -1, -1), new], 2)
        for old, new in ((record.k, key), (record.v, value))
    ]
    return attend.heads(query, whole[0], whole[1], mask, record.scaling, record.softcap)


def without_copies(query: Tensor, value: Tensor) -> str | None:
    """The backend that reads shared keys in place, None where there is none for these tensors."""
    if not query.is_cuda or query.shape[-1] != value.shape[-1]:
        return None
    backend = resolve("auto", query)
    return backend if backend == "fused" else None


def plain(mask: Tensor) -> bool:
    """Whether a mask ``[1, 1 or H, T, T]`` is that of a causal prompt, no padding, no window, nothing else."""
    seen = mask > torch.finfo(mask.dtype).min / 2
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return bool((seen == causal).all()) and not bool(mask.masked_fill(~seen, 0).any())

"""Attention of a base run with one column replaced, and how far a replaced column gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emocircuits.sweep import attend
from emocircuits.sweep.prefix import after_shared
from emocircuits.sweep.trace import LayerTrace, Trace


def own(record: LayerTrace, p: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head outputs ``[B, 1, H * D]`` of column ``p``: earlier keys are the base run's, its own is new.

    Args:
        record: the base run's layer.
        p: the column.
        q: ``[H, B, D]``, of the variants there.
        k, v: ``[H_kv, B, D]``.
    """
    query, key, value = (x.transpose(0, 1)[:, :, None] for x in (q, k, v))
    z = after_shared(record, p, query, key, value, mask_rows(record, (p,), p + 1))
    return z.transpose(1, 2).flatten(2)


def others(record: LayerTrace, p: int, columns: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Attention of known queries to all keys but that of ``p``: head outputs ``[H, n, D]``, log-sum-exp ``[H, n]``."""
    q = record.q[:, :, span(columns)]
    s = attend.scores(q, record.k, mask_rows(record, columns), record.scaling, record.softcap)[0]
    s = s.index_fill(-1, torch.tensor([p], device=s.device), float("-inf"))
    v = record.v[0]
    v = v.repeat_interleave(s.shape[0] // v.shape[0], 0)
    return s.softmax(-1).nan_to_num(0.0).to(v.dtype) @ v, s.logsumexp(-1)


def later(
    record: LayerTrace, p: int, columns: tuple[int, ...], k: Tensor, v: Tensor, rest: tuple[Tensor, Tensor]
) -> Tensor:
    """Head outputs ``[B, n, H * D]`` of known queries that meet one replaced key and value, those of ``p``.

    What they gather from all other keys (``rest``, from :func:`others`) is the same for all variants and computed once,
    then merged with the new key by log-sum-exp: exact, and nothing cancels however much weight the old key had.
    """
    gathered, lse = rest
    query = record.q[0][:, span(columns)]
    repeat = query.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(repeat, 0) if repeat > 1 else x for x in (k, v))
    s = (k @ query.transpose(-1, -2)).to(lse.dtype) * record.scaling  # [H, B, n]
    if record.softcap is not None:
        s = record.softcap * torch.tanh(s / record.softcap)
    s = s + mask_rows(record, columns)[0, :, None, :, p]
    # A query that sees nothing keeps nothing.
    weight = torch.sigmoid((s - lse[:, None]).nan_to_num(float("-inf"), float("inf"), float("-inf")))
    z = gathered[:, None] + weight[..., None].to(v.dtype) * (v[:, :, None] - gathered[:, None])
    return z.permute(1, 2, 0, 3).flatten(2)


def reach(base: Trace) -> tuple[int, ...]:
    """Of every column, the first one that a change in it, or after it, can get to through attention.

    The column itself where attention is causal; the beginning of the image or of the prefix where these attend to all
    of themselves (Gemma 3, PaliGemma).
    """
    total, sees = base.columns, None
    for record in base.layers:
        assert record.mask is not None
        seen = (record.mask > torch.finfo(record.mask.dtype).min / 2).flatten(0, 1).any(0)
        sees = seen if sees is None else sees | seen
    assert sees is not None
    columns = torch.arange(total, device=sees.device)
    # The last column that each one sees, itself at least.
    furthest = torch.where(sees, columns, -1).amax(-1).maximum(columns).tolist()
    if furthest == list(range(total)):
        return tuple(furthest)
    found = []
    for p in range(total):
        start = p
        while True:
            earlier = next((i for i in range(start) if furthest[i] >= start), start)
            if earlier == start:
                break
            start = earlier
        found.append(start)
    return tuple(found)


def span(columns: tuple[int, ...]) -> Any:
    """Columns as a slice where they are one: no gather."""
    if columns and columns[-1] - columns[0] + 1 == len(columns):
        return slice(columns[0], columns[-1] + 1)
    return list(columns)


def mask_rows(record: LayerTrace, columns: tuple[int, ...], keys: int | None = None) -> Tensor:
    """The mask's rows of some columns, cut to ``keys``."""
    assert record.mask is not None
    return record.mask[:, :, span(columns), :keys]

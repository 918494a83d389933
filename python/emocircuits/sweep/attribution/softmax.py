"""The QK fix of AtP* (Kramár et al. 2024, section 3.1.1): attention of a patched query or key is not linearised.

A patched query or key changes attention weights through a softmax, which is flat where it is saturated: there a
gradient says "no effect". The weights are recomputed exactly, and only what head outputs do to the metric is linear.
Values enter attention linearly, so for them nothing is to be fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emocircuits.sweep import keys, qkv
from emocircuits.sweep.trace import LayerTrace


@torch.no_grad()
def fixed(record: LayerTrace, patched: Tensor, gradients: Tensor, each: bool) -> Tensor:
    """First-order effects of patched queries and keys, with the softmax exact.

    Args:
        record: the base run's layer.
        patched: ``[T, H + 2 H_kv, D]``, what queries, keys and values are set to.
        gradients: ``[R, T, H, D]``, of the metric with respect to head outputs, several at once.
        each: one column patched at a time, or all together.

    Returns:
        ``[R, T, H + H_kv]``, or ``[R, 1, H + H_kv]`` for all together; float64.
    """
    count, shared, total = record.q.shape[1], record.k.shape[1], record.q.shape[2]
    g = gradients.to(record.z.device, torch.float64)
    whole = slice(0, total)
    found = g.new_zeros(g.shape[0], total if each else 1, count + shared)
    for unit in range(count if each else count + shared):
        heads, change = qkv.change(record, patched, unit, whole, whole)
        # A query changes its own row alone, so patching all of them at once patches each.
        per = torch.einsum("hnd,rnhd->rn", change.double(), g[:, :, heads])
        found[:, :, unit] = per if each else per.sum(1, keepdim=True)
    if each:
        columns = tuple(range(total))
        base = record.z.transpose(0, 1)
        for p in columns:
            new = patched[p, count : count + shared][:, None], record.v[0][:, p : p + 1]
            z = keys.later(record, p, columns, *new, keys.others(record, p, columns))[0]
            change = (z.unflatten(-1, base.shape[::2]).transpose(0, 1) - base).double()
            per = torch.einsum("hnd,rnhd->rh", change, g)
            found[:, p, count:] = per.unflatten(1, (shared, -1)).sum(-1)
    return found.cpu()

"""Patches of one head's queries, or of one key-value head's keys or values, as attention gets them."""

from __future__ import annotations

import torch
from torch import Tensor

from emocircuits.sweep import attend
from emocircuits.sweep.trace import LayerTrace


def names(heads: int, kv_heads: int) -> list[str]:
    """Units in order: queries of every head, keys, then values of every key-value head."""
    return [f"q{h}" for h in range(heads)] + [f"{x}{h}" for x in "kv" for h in range(kv_heads)]


def site(record: LayerTrace) -> Tensor:
    """All units side by side, ``[T, H + 2 H_kv, D]``.

    Raises:
        NotImplementedError: values are not as wide as keys.
    """
    if record.v.shape[-1] != record.k.shape[-1]:
        raise NotImplementedError(
            f"keys of {record.k.shape[-1]} and values of {record.v.shape[-1]} entries a head; patch heads or attn_out"
        )
    return torch.cat([record.q[0], record.k[0], record.v[0]]).transpose(0, 1)


def change(
    record: LayerTrace, patched: Tensor, unit: int, columns: slice | list[int], out: slice | list[int]
) -> tuple[slice, Tensor]:
    """What a patch changes in the head outputs.

    Args:
        record: the base run's layer.
        patched: ``[T, H + 2 H_kv, D]``, from which the unit is set.
        unit: its number.
        columns: where it is set.
        out: columns whose head outputs are wanted.

    Returns:
        The heads that change, and by how much: ``[heads, n, D]``.
    """
    count, shared = record.q.shape[1], record.k.shape[1]
    each = count // shared
    if unit < count:
        heads, kv = slice(unit, unit + 1), unit // each
    else:
        kv = (unit - count) % shared
        heads = slice(kv * each, (kv + 1) * each)
    query, key, value = record.q[:, heads], record.k[:, kv : kv + 1], record.v[:, kv : kv + 1]
    new = patched[columns, unit]
    if unit < count:
        query = query.clone()
        query[0, 0, columns] = new
    elif unit < count + shared:
        key = key.clone()
        key[0, 0, columns] = new
    else:
        value = value.clone()
        value[0, 0, columns] = new
    mask = record.mask
    if mask is not None:
        mask = mask[:, heads if mask.shape[1] > 1 else slice(None), out]
    z = attend.heads(query[:, :, out], key, value, mask, record.scaling, record.softcap)[0]
    return heads, z - record.z[out, heads].transpose(0, 1)

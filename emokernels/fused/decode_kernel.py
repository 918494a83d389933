"""Attention of few rows over many keys: partial results of slices of the keys, and their merge.

The rows of a tile share their keys: all query heads of a key head at all positions of one batch row, or, where the
keys are the same memory for the whole batch, of all batch rows. So every key is read once for all of them.

A program goes through one slice of the keys of its tile. The slices are cut on the device, evenly from the first key
that any row of the tile sees to the last: a cache that is nearly empty, or a window, keeps all programs busy, and one
whose slice is empty ends at once. Partial results are the output of the slice and its log-sum-exp in units of log2,
-inf where no key was seen; there the output is not written, and not read.

Memory is what limits a decode step, so table values are chosen for every element among six registers a row; tiles of
many rows do that only where roles meet inside a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import LN2, LOG2E, choose, edited, shaped, six_of


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _open_roles(valid, t0, t1, t2, t3, t4, t5):
    """Bits of the source roles that a bias of -inf leaves open for some row."""
    shut = float("-inf")
    bits = tl.where(t0 > shut, 1, 0) | tl.where(t1 > shut, 2, 0) | tl.where(t2 > shut, 4, 0)
    bits = bits | tl.where(t3 > shut, 8, 0) | tl.where(t4 > shut, 16, 0) | tl.where(t5 > shut, 32, 0)
    return tl.reduce(tl.where(valid, bits, 0), 0, _either)


@triton.jit
def _unit_of(t0, t1, t2, t3, t4, t5):
    """What to divide the gains of a row by, so that weights times gains stay normal numbers of half precision."""
    top = tl.maximum(tl.maximum(tl.abs(t0), tl.abs(t1)), tl.maximum(tl.abs(t2), tl.abs(t3)))
    top = tl.maximum(top, tl.maximum(tl.abs(t4), tl.abs(t5)))
    return tl.where(top > 32768.0, top * (1 / 32768), tl.where((top < 1.0) & (top > 0.0), top, 1.0))


@triton.jit
def _towards(role, t0, t1, t2, t3, t4, t5):
    """The table value of every element: from the six of its row, by `role` ``[1|M, N]``."""
    return choose(role, t0[:, None], t1[:, None], t2[:, None], t3[:, None], t4[:, None], t5[:, None])


@triton.jit(
    do_not_specialize=["keys", "origin", "columns", "stride_role_b", "stride_mask_b", "stride_mask_h", "stride_mask_n"]
)
def partial_kernel(
    q, k, v, z, lse, roles, query_roles, bias, factor, magnitude, gain, mask, lengths,
    head_scale, head_shift, head_replace, head_mask,
    stride_q_b, stride_q_h, stride_q_n, stride_q_d, stride_k_b, stride_k_h, stride_k_n, stride_k_d,
    stride_v_b, stride_v_h, stride_v_n, stride_v_d, stride_z_s, stride_z_b, stride_z_h, stride_z_n,
    stride_role_b, stride_role_k, stride_query_b, stride_query_n,
    stride_bias_b, stride_factor_b, stride_magnitude_b, stride_gain_b,
    stride_mask_b, stride_mask_h, stride_mask_n, stride_mask_k, lowest, stride_length,
    stride_scale_b, stride_scale_n, stride_shift_b, stride_shift_n, stride_replace_b, stride_replace_n,
    stride_chosen_b, stride_chosen_n,
    n, keys, origin, columns, batches, key_heads, share, dim, tiles, window, scale, cap,
    ROUTED: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr, GAIN: tl.constexpr,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, LENGTHS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_SCALE: tl.constexpr, HEAD_SHIFT: tl.constexpr, HEAD_REPLACE: tl.constexpr,
    LSE: tl.constexpr, DIRECT: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, ROLE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One slice of the keys for one tile of rows; the grid is (key heads (times batch rows) * tiles, slices).

    Writes z ``[B, H, N, D]`` and lse themselves when `DIRECT` (one slice), else ``[S, B, H, N, D]`` float32 and
    ``[S, B, H, N]``. The keys are the columns `origin` ... `origin + keys` of `columns`.
    """
    group, tile, split = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    heads = key_heads * share
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM)
    offsets = tl.arange(0, BLOCK_N)
    if PACKED:
        key_head = group
        own = tl.zeros_like(group).to(tl.int64)
        valid = row < batches * share * n
        batch = row // (share * n)
        within = row % (share * n)
    else:
        key_head = group % key_heads
        own = (group // key_heads).to(tl.int64)
        valid = row < share * n
        batch = tl.zeros_like(row) + group // key_heads
        within = row
    i = within % n
    head = (key_head * share + within // n).to(tl.int64)
    batch = batch.to(tl.int64)
    inside = valid[:, None] if EVEN else valid[:, None] & (d < dim)[None, :]
    at_q = batch * stride_q_b + head * stride_q_h + i.to(tl.int64) * stride_q_n
    query = tl.load(q + at_q[:, None] + d[None, :] * stride_q_d, mask=inside, other=0.0)
    # `own` is the batch row of all rows of the tile; where they have one each (packed) it is 0, as are shared strides.
    k += own * stride_k_b + key_head.to(tl.int64) * stride_k_h
    v += own * stride_v_b + key_head.to(tl.int64) * stride_v_h

    # Keys start ... stop - 1 of this slice's source are within reach of a row.
    replaced = tl.zeros_like(row) != 0
    if HEAD_REPLACE:
        replaced = tl.load(head_mask + batch * stride_chosen_b + i * stride_chosen_n + head, mask=valid, other=0) != 0
    known = columns
    if LENGTHS:
        known = tl.load(lengths + batch * stride_length, mask=valid, other=0).to(tl.int32)
    position = i + (known - n - origin)
    start = tl.zeros_like(row)
    stop = tl.zeros_like(row) + tl.minimum(known - origin, keys)
    if CAUSAL:
        stop = tl.minimum(stop, position + 1)
    if WINDOW:
        start = tl.maximum(position - window + 1, 0)
    idle = ~valid
    if HEAD_REPLACE and not LSE:
        idle = idle | replaced
    stop = tl.where(idle, 0, stop)
    last = tl.maximum(tl.max(stop, 0), 0)
    first = tl.min(tl.where(start < stop, start, last), 0)
    slices = tl.num_programs(1)
    length = tl.cdiv(tl.cdiv(last - first, BLOCK_N), slices) * BLOCK_N
    begin = first + split * length
    end = tl.minimum(begin + length, last)

    none = tl.zeros([BLOCK_M], tl.float32)
    unit = none
    b0, b1, b2, b3, b4, b5 = none, none, none, none, none, none
    a0, a1, a2, a3, a4, a5 = none, none, none, none, none, none
    c0, c1, c2, c3, c4, c5 = none, none, none, none, none, none
    g0, g1, g2, g3, g4, g5 = none, none, none, none, none, none
    if ROUTED:
        dst = tl.load(query_roles + batch * stride_query_b + i * stride_query_n, mask=valid, other=6).to(tl.int64)
        named = dst < 6
        at_table = head * 36 + dst * 6
        if ROLE_ROWS:
            roles += batch[:, None] * stride_role_b + origin.to(tl.int64) * stride_role_k
        else:
            roles += own * stride_role_b + origin.to(tl.int64) * stride_role_k
    if BIAS:
        b0, b1, b2, b3, b4, b5 = six_of(bias, batch * stride_bias_b + at_table, 0.0, named)
        if not ROLE_ROWS:
            # Keys at the ends of the slice that a knockout hides from every row are not read.
            open_roles = _open_roles(valid, b0, b1, b2, b3, b4, b5)
            if open_roles != 63:
                low, high = end, begin
                for at in range(begin, end, 256):
                    j = at + tl.arange(0, 256)
                    role = tl.load(roles + j.to(tl.int64) * stride_role_k, mask=j < end, other=0).to(tl.int32)
                    seen = (j < end) & (((open_roles >> role) & 1) != 0)
                    low = tl.minimum(low, tl.min(tl.where(seen, j, end), 0))
                    high = tl.maximum(high, tl.max(tl.where(seen, j + 1, begin), 0))
                begin, end = low, high
        b0, b1, b2, b3, b4, b5 = b0 * LOG2E, b1 * LOG2E, b2 * LOG2E, b3 * LOG2E, b4 * LOG2E, b5 * LOG2E
    if FACTOR:
        a0, a1, a2, a3, a4, a5 = six_of(factor, batch * stride_factor_b + at_table, 1.0, named)
    if MAGNITUDE:
        c0, c1, c2, c3, c4, c5 = six_of(magnitude, batch * stride_magnitude_b + at_table, 0.0, named)
    if GAIN:
        g0, g1, g2, g3, g4, g5 = six_of(gain, batch * stride_gain_b + at_table, 1.0, named)
        if v.dtype.element_ty == tl.float16:
            unit = _unit_of(g0, g1, g2, g3, g4, g5)
            g0, g1, g2, g3, g4, g5 = g0 / unit, g1 / unit, g2 / unit, g3 / unit, g4 / unit, g5 / unit
    if MASK_ROWS:
        at_mask = batch * stride_mask_b + head * stride_mask_h + i.to(tl.int64) * stride_mask_n
        mask += at_mask[:, None] + origin.to(tl.int64) * stride_mask_k
    elif MASK != "none":
        mask += own * stride_mask_b + origin.to(tl.int64) * stride_mask_k

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for number in range(tl.cdiv(end - begin, BLOCK_N)):
        at = begin + number * BLOCK_N
        j = at + offsets
        here = j < end
        there = here[:, None] if EVEN else here[:, None] & (d < dim)[None, :]
        block = k + at.to(tl.int64) * stride_k_n
        key = tl.load(block + offsets[:, None] * stride_k_n + d[None, :] * stride_k_d, mask=there, other=0.0)
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        seen = here[None, :]
        if RAGGED:
            seen = seen & (j[None, :] < stop[:, None])
            if WINDOW:
                seen = seen & (j[None, :] >= start[:, None])
        added = 0.0
        if MASK != "none":
            if MASK_ROWS:
                of_rows = mask + j.to(tl.int64)[None, :] * stride_mask_k
                value = tl.load(of_rows, mask=here[None, :] & valid[:, None], other=0)
            else:
                value = tl.load(mask + j.to(tl.int64) * stride_mask_k, mask=here, other=0)[None, :]
            if MASK == "bool":
                added = tl.where(value != 0, 0.0, float("-inf"))
            else:
                value = value.to(tl.float32)
                added = tl.where(value > lowest, value, float("-inf")) * LOG2E
        a, c = 1.0, 0.0
        if ROUTED:
            if ROLE_ROWS:
                at_roles = roles + j.to(tl.int64)[None, :] * stride_role_k
                role = tl.load(at_roles, mask=here[None, :] & valid[:, None], other=0).to(tl.int32)
            else:
                role = tl.load(roles + j.to(tl.int64) * stride_role_k, mask=here, other=0).to(tl.int32)[None, :]
        if FACTOR:
            a = _towards(role, a0, a1, a2, a3, a4, a5)
        if MAGNITUDE:
            c = _towards(role, c0, c1, c2, c3, c4, c5)
        x = shaped(product, scale, cap, a, c, SOFTCAP, FACTOR, MAGNITUDE)
        if BIAS:
            x += _towards(role, b0, b1, b2, b3, b4, b5)
        x = tl.where(seen, x + added, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(x - top[:, None])
        shrink = tl.exp2(m - top)
        total = total * shrink + tl.sum(p, 1)
        m = m_new
        if GAIN:
            p = p * _towards(role, g0, g1, g2, g3, g4, g5)
        block = v + at.to(tl.int64) * stride_v_n
        value = tl.load(block + offsets[:, None] * stride_v_n + d[None, :] * stride_v_d, mask=there, other=0.0)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)

    if GAIN and v.dtype.element_ty == tl.float16:
        acc *= unit[:, None]
    seen_any = total > 0.0
    total = tl.where(seen_any, total, 1.0)
    out = acc * (1.0 / total)[:, None]
    at_row = i.to(tl.int64)
    at_z = batch * stride_z_b + head * stride_z_h + at_row * stride_z_n + split.to(tl.int64) * stride_z_s
    at_lse = ((split * batches + batch) * heads + head) * n + at_row
    if DIRECT:
        out = edited(
            out, d, inside, valid, replaced, head_scale, head_shift, head_replace,
            batch * stride_scale_b + at_row * stride_scale_n + head,
            batch * stride_shift_b + at_row * stride_shift_n + head * dim,
            batch * stride_replace_b + at_row * stride_replace_n + head * dim,
            HEAD_SCALE, HEAD_SHIFT, HEAD_REPLACE,
        )  # fmt: skip
        tl.store(z + at_z[:, None] + d[None, :], out.to(z.dtype.element_ty), mask=inside)
        if LSE:
            tl.store(lse + at_lse, (m + tl.log2(total)) * LN2, mask=valid)
    else:
        tl.store(z + at_z[:, None] + d[None, :], out, mask=inside & seen_any[:, None])
        tl.store(lse + at_lse, m + tl.log2(total), mask=valid)


@triton.jit
def _statistics(stat, s, splits, rows, row, skipped):
    """The log-sum-exps of the slices `s` of a row, ``[S, 1]``; -inf where there are none, or none is wanted."""
    wanted = (s < splits)[:, None] & ~skipped[None, :]
    return tl.load(stat + s.to(tl.int64)[:, None] * rows + row[None, :], mask=wanted, other=float("-inf"))


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    part, stat, z, lse, head_scale, head_shift, head_replace, head_mask,
    stride_z_b, stride_z_h, stride_z_n,
    stride_scale_b, stride_scale_n, stride_shift_b, stride_shift_n, stride_replace_b, stride_replace_n,
    stride_chosen_b, stride_chosen_n,
    n, heads, dim, splits,
    HEAD_SCALE: tl.constexpr, HEAD_SHIFT: tl.constexpr, HEAD_REPLACE: tl.constexpr, LSE: tl.constexpr,
    EVEN: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Z and lse of one row from its partial results ``part [S, B, H, N, D]`` and ``stat [S, B, H, N]``."""
    rows = tl.num_programs(0).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    batch, head, i = row // (heads * n), row // n % heads, row % n
    d = tl.arange(0, DIM)
    valid = i < n
    inside = valid[:, None] if EVEN else valid[:, None] & (d < dim)[None, :]
    replaced = i < 0
    if HEAD_REPLACE:
        replaced = tl.load(head_mask + batch * stride_chosen_b + i * stride_chosen_n + head) != 0
    skipped = replaced if HEAD_REPLACE and not LSE else valid & False
    every = _statistics(stat, tl.arange(0, SPLITS), splits, rows, row, skipped)
    m = tl.max(every, 0)
    top = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(tl.exp2(every - top[None, :]), 0)
    total = tl.where(total > 0.0, total, 1.0)
    out = tl.zeros([1, DIM], tl.float32)
    for first in range(0, splits, BLOCK):
        s = first + tl.arange(0, BLOCK)
        some = _statistics(stat, s, splits, rows, row, skipped)
        there = some > float("-inf")
        if not EVEN:
            there = there & (d < dim)[None, :]
        at = s.to(tl.int64)[:, None] * rows + row[None, :]
        value = tl.load(part + at * dim + d[None, :], mask=there, other=0.0)
        out += tl.sum(tl.exp2(some - top[None, :]) * value, 0)[None, :]
    out *= (1.0 / total)[:, None]
    out = edited(
        out, d, inside, valid, replaced, head_scale, head_shift, head_replace,
        batch * stride_scale_b + i * stride_scale_n + head,
        batch * stride_shift_b + i * stride_shift_n + head * dim,
        batch * stride_replace_b + i * stride_replace_n + head * dim,
        HEAD_SCALE, HEAD_SHIFT, HEAD_REPLACE,
    )  # fmt: skip
    at_z = batch * stride_z_b + head * stride_z_h + i * stride_z_n
    tl.store(z + at_z[:, None] + d[None, :], out.to(z.dtype.element_ty), mask=inside)
    if LSE:
        tl.store(lse + row, (m + tl.log2(total)) * LN2, mask=valid)

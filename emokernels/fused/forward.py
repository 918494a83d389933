"""Attention forward with routes: FlashAttention-2's online softmax, where a role costs what it must and no more.

A program computes one tile of query rows of one head. Its key blocks come sorted by class (`schedule.py`):

* A block that is wholly visible and of one role runs through the plain loop. Its bias only moves the running maximum
  (``m - b`` before the loop, ``+ b`` after it) and its gain only the unit in which the output is accumulated, once for
  all blocks of that role: the loop's body is the one of attention without routes.
* A route knocked out for the whole tile by a bias of -inf is skipped; one with gain 0 keeps its part of the softmax sum
  and never reads its values.
* The other blocks (diagonal, padding, mixed roles) look up masks and tables for every element.

A tile whose rows change nothing treats all roles as one. Head edits are applied before z is written, and a tile whose
rows are all replaced copies them instead of computing, unless lse is wanted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    LN2,
    LOG2E,
    key_range,
    load_tile,
    members_of,
    partition,
    per_row,
    products,
    representative,
    set_of,
    shaped,
    visible,
)


@triton.jit
def _anew(tile, count, BLOCK_M: tl.constexpr):
    """The rows of a tile, worked out again: `count` is not negative, which the compiler does not know.

    What is computed from row numbers (pointers into tables, addresses of outputs) would otherwise be kept in registers
    from its first use to its last, through loops that need every register.
    """
    return (tile + tl.minimum(count, 0)) * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def _scores(
    query, q, rows, rows_ok, stride_q_n, stride_q_d, k, first, offsets, d, j_ok, stride_k_n, stride_k_d, dim,
    CHECKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``q k`` of a tile of rows with the block of keys at `first`, ``[M, N]`` float32."""
    at = k + first.to(tl.int64) * stride_k_n
    keys = d
    if CHUNK == DIM:
        keys = load_tile(at, offsets, d, j_ok, stride_k_n, stride_k_d, dim, CHECKED, EVEN)
    product = products(
        query, keys, q, rows.to(tl.int64), rows_ok, stride_q_n, stride_q_d,
        at, offsets, j_ok, stride_k_n, stride_k_d, dim, CHECKED, EVEN, PRECISION, BLOCK_M, BLOCK_N, DIM, CHUNK,
    )  # fmt: skip
    if NEGATIVE and CHUNK != DIM:
        product = -product
    return product


@triton.jit
def _weighted(
    p, acc, v, first, offsets, d, j_ok, stride_v_n, stride_v_d, dim,
    CHECKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + p v`` of the block of keys at `first`."""
    at = v + first.to(tl.int64) * stride_v_n
    values = load_tile(at, offsets, d, j_ok, stride_v_n, stride_v_d, dim, CHECKED, EVEN)
    return tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)


@triton.jit
def _shaped(product, scale, cap, a, c, SOFTCAP: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr):
    """`shaped` with a factor and a magnitude for each row, or plain numbers where there are none."""
    if FACTOR:
        a = a[:, None]
    if MAGNITUDE:
        c = c[:, None]
    return shaped(product, scale, cap, a, c, SOFTCAP, FACTOR, MAGNITUDE)


@triton.jit
def _soften(
    product, m, total, scale, cap, a, c,
    SOFTCAP: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """One wholly visible block of one role in the online softmax: weights p, new maximum and sum, and the shrinkage."""
    if SOFTCAP or FACTOR or MAGNITUDE:
        x = _shaped(product, scale, cap, a, c, SOFTCAP, FACTOR, MAGNITUDE)
        m_new = tl.maximum(m, tl.max(x, 1))
        p = tl.exp2(x - m_new[:, None])
    else:
        m_new = tl.maximum(m, tl.max(product, 1) * (scale * LOG2E))
        p = tl.exp2(product * (scale * LOG2E) - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    return p, m_new, total * shrink + tl.sum(p, 1), shrink


@triton.jit
def _numbers(
    bias, factor, magnitude, gain, query_roles, at_bias, at_factor, at_magnitude, at_gain, i, number, valid,
    BIAS: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """Bias (in log2), factor, magnitude and gain of every row towards the roles of a set, ``[M]`` each."""
    b, a, c, g = 0.0, 1.0, 0.0, 1.0
    dst = tl.load(query_roles + i, mask=valid, other=0).to(tl.int32)
    source = representative(number)
    if BIAS:
        b = per_row(bias, at_bias, dst, source, 0.0, valid) * LOG2E
    if FACTOR:
        a = per_row(factor, at_factor, dst, source, 1.0, valid)
    if MAGNITUDE:
        c = per_row(magnitude, at_magnitude, dst, source, 0.0, valid)
    if GAIN:
        g = per_row(gain, at_gain, dst, source, 1.0, valid)
    return b, a, c, g


@triton.jit
def _fit(gain):
    """Where a gain can be a unit to sum in: not 0, nor so small or large that earlier sums would drown."""
    return (tl.abs(gain) > 1e-6) & (tl.abs(gain) < 1e6)


@triton.jit
def _lists(start, quick_stop, slow_stop, b, g, valid, BIAS: tl.constexpr, GAIN: tl.constexpr):
    """How to go through the lists of a set: ends of the quick blocks, of the mute ones, start and end of the slow."""
    slow_start, mute_stop = quick_stop, start
    if BIAS:
        # A route that is knocked out for every row is not there; one for some rows is a mask.
        open_rows = tl.sum((valid & (b > float("-inf"))).to(tl.int32), 0)
        closed = open_rows < tl.sum(valid.to(tl.int32), 0)
        slow_start = tl.where(closed, start, slow_start)
        quick_stop = tl.where(closed, start, quick_stop)
        slow_stop = tl.where(open_rows == 0, slow_start, slow_stop)
    if GAIN:
        silent = tl.max(tl.where(valid, tl.abs(g), 0.0), 0) == 0.0
        unfit = tl.min(_fit(g).to(tl.int32), 0) == 0
        mute_stop = tl.where(silent, quick_stop, start)
        slow_start = tl.where(unfit & (silent == 0), start, slow_start)
        quick_stop = tl.where(unfit, start, quick_stop)
    return quick_stop, mute_stop, slow_start, slow_stop


@triton.jit
def forward_kernel(
    q, k, v, z, lse, order, ends, roles, query_roles, bias, factor, magnitude, gain, mask,
    head_scale, head_shift, head_replace, head_mask,
    stride_q_b, stride_q_h, stride_q_n, stride_q_d, stride_k_b, stride_k_h, stride_k_n, stride_k_d,
    stride_v_b, stride_v_h, stride_v_n, stride_v_d, stride_z_b, stride_z_h, stride_z_n,
    stride_order_b, stride_order_h, stride_role_b, stride_query_b,
    stride_bias_b, stride_factor_b, stride_magnitude_b, stride_gain_b,
    stride_mask_b, stride_mask_h, stride_mask_n, stride_mask_k, lowest,
    stride_scale_b, stride_scale_n, stride_shift_b, stride_shift_n, stride_replace_b, stride_replace_n,
    stride_chosen_b, stride_chosen_n,
    n, keys, length, heads, share, dim, window, scale, cap,
    SCHEDULED: tl.constexpr, ROUTED: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr,
    GAIN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    HEAD_SCALE: tl.constexpr, HEAD_SHIFT: tl.constexpr, HEAD_REPLACE: tl.constexpr, LSE: tl.constexpr,
    PRECISION: tl.constexpr, NEGATIVE: tl.constexpr, EVEN: tl.constexpr, SLOW_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Z and lse of one tile of query rows of one head; the grid is (tiles, heads, batch rows)."""
    # The last tiles of a causal problem have the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM)
    offsets = tl.arange(0, BLOCK_N)
    valid = i < n
    position = i + (keys - n)
    q += batch * stride_q_b + head * stride_q_h
    query = d
    if CHUNK == DIM:
        query = load_tile(q, i.to(tl.int64), d, valid, stride_q_n, stride_q_d, dim, True, EVEN)
        if NEGATIVE:
            query = -query
    k += batch * stride_k_b + (head // share) * stride_k_h
    v += batch * stride_v_b + (head // share) * stride_v_h
    at_mask = batch * stride_mask_b + head * stride_mask_h

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    unit = tl.full([BLOCK_M], 1.0, tl.float32)

    # Without a schedule: a contiguous range of wholly visible blocks, and the blocks at its two ends.
    begin, end, full_begin, full_end = 0, 0, 0, 0
    segments = 1
    if SCHEDULED:
        at_list = batch * stride_order_b + head * stride_order_h + tile
        order += at_list * length
        ends += at_list * (26 if ROUTED else 2)
    else:
        begin, end, full_begin, full_end = key_range(tile, n, keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)

    at_bias, at_factor, at_magnitude, at_gain = batch, batch, batch, batch
    only = 0
    if ROUTED:
        query_roles += batch * stride_query_b
        roles += batch * stride_role_b
        at_bias = batch * stride_bias_b + head * 36
        at_factor = batch * stride_factor_b + head * 36
        at_magnitude = batch * stride_magnitude_b + head * 36
        at_gain = batch * stride_gain_b + head * 36
        dst = tl.load(query_roles + i, mask=valid, other=0).to(tl.int32)
        segments, only = partition(
            bias, factor, magnitude, gain, at_bias, at_factor, at_magnitude, at_gain, dst, valid,
            BIAS, FACTOR, MAGNITUDE, GAIN,
        )  # fmt: skip
    if HEAD_REPLACE and not LSE:
        chosen = head_mask + batch * stride_chosen_b + i.to(tl.int64) * stride_chosen_n + head
        replaced = tl.load(chosen, mask=valid, other=1)
        segments = tl.where(tl.min(tl.where(replaced != 0, 1, 0), 0) == 1, 0, segments)

    # All blocks of one role of every set, then the others: what the second loop needs is not there in the first.
    for segment in range(segments):
        b, a, c, g = 0.0, 1.0, 0.0, 1.0
        if SCHEDULED:
            number = 0
            if ROUTED:
                number = set_of(segment, segments, only)
            start = tl.where(number == 0, 0, tl.load(ends + tl.maximum(2 * number - 1, 0)))
            quick_stop = tl.load(ends + 2 * number)
            mute_stop = start
            if ROUTED:
                again = _anew(tile, quick_stop, BLOCK_M)
                b, a, c, g = _numbers(
                    bias, factor, magnitude, gain, query_roles, at_bias, at_factor, at_magnitude, at_gain,
                    again, number, again < n, BIAS, FACTOR, MAGNITUDE, GAIN,
                )  # fmt: skip
                quick_stop, mute_stop, _, _ = _lists(start, quick_stop, quick_stop, b, g, again < n, BIAS, GAIN)
        else:
            start, quick_stop, mute_stop = full_begin, full_end, full_begin
        if BIAS:
            # One bias on every logit of a row is a shift of its maximum.
            b = tl.where((tl.maximum(quick_stop, mute_stop) > start) & (b > float("-inf")), b, 0.0)
            m -= b
        if GAIN:
            # Blocks whose values count for nothing are not read.
            before = m
            for t in tl.range(start, mute_stop, num_stages=1, disable_licm=True):
                first = tl.load(order + t) * BLOCK_N
                product = _scores(
                    query, q, _anew(tile, first, BLOCK_M), valid, stride_q_n, stride_q_d,
                    k, first, offsets, d, valid, stride_k_n, stride_k_d, dim,
                    False, EVEN, PRECISION, NEGATIVE, BLOCK_M, BLOCK_N, DIM, CHUNK,
                )  # fmt: skip
                p, m, total, shrink = _soften(product, m, total, scale, cap, a, c, SOFTCAP, FACTOR, MAGNITUDE)
            # One gain on every weight of a row is the unit in which its output is summed.
            g = tl.where(quick_stop > start, g, unit)
            acc *= (unit / g * tl.where(before == m, 1.0, tl.exp2(before - m)))[:, None]
            unit = g
        for t in range(start, quick_stop):
            first = (tl.load(order + t) if SCHEDULED else t) * BLOCK_N
            product = _scores(
                query, q, _anew(tile, first, BLOCK_M), valid, stride_q_n, stride_q_d,
                k, first, offsets, d, valid, stride_k_n, stride_k_d, dim,
                False, EVEN, PRECISION, NEGATIVE, BLOCK_M, BLOCK_N, DIM, CHUNK,
            )  # fmt: skip
            p, m, total, shrink = _soften(product, m, total, scale, cap, a, c, SOFTCAP, FACTOR, MAGNITUDE)
            acc = _weighted(
                p, acc * shrink[:, None], v, first, offsets, d, valid, stride_v_n, stride_v_d, dim,
                False, EVEN, PRECISION,
            )  # fmt: skip
        if BIAS:
            m += b

    i = _anew(tile, length, BLOCK_M)
    valid = i < n
    position = i + (keys - n)
    for segment in range(segments):
        b, a, c, g = 0.0, 1.0, 0.0, 1.0
        members = 63
        rows = valid
        if SCHEDULED:
            number = 0
            if ROUTED:
                number = set_of(segment, segments, only)
                members = members_of(number)
            slow_start = tl.load(ends + 2 * number)
            slow_stop = tl.load(ends + 2 * number + 1)
            if ROUTED:
                start = tl.where(number == 0, 0, tl.load(ends + tl.maximum(2 * number - 1, 0)))
                again = _anew(tile, slow_stop, BLOCK_M)
                b, a, c, g = _numbers(
                    bias, factor, magnitude, gain, query_roles, at_bias, at_factor, at_magnitude, at_gain,
                    again, number, again < n, BIAS, FACTOR, MAGNITUDE, GAIN,
                )  # fmt: skip
                _, _, slow_start, slow_stop = _lists(start, slow_start, slow_stop, b, g, valid, BIAS, GAIN)
        else:
            slow_start, slow_stop = 0, full_begin - begin + tl.maximum(end - full_end, 0)
        if BIAS:
            rows = rows & (b > float("-inf"))
            b = tl.where((slow_stop > slow_start) & rows, b, 0.0)
            m -= b
        if GAIN:
            fit = _fit(g)
            kept = tl.where(fit, 1.0, g)
            g = tl.where(slow_stop > slow_start, tl.where(fit, g, 1.0), unit)
            acc *= (unit / g)[:, None]
            unit = g
        for t in tl.range(slow_start, slow_stop, num_stages=SLOW_STAGES, disable_licm=True):
            if SCHEDULED:
                first = tl.load(order + t) * BLOCK_N
            else:
                first = tl.where(t < full_begin - begin, begin + t, full_end + t - (full_begin - begin)) * BLOCK_N
            j = first + offsets
            columns = j < keys
            product = _scores(
                query, q, _anew(tile, first, BLOCK_M), valid, stride_q_n, stride_q_d,
                k, first, offsets, d, columns, stride_k_n, stride_k_d, dim,
                True, EVEN, PRECISION, NEGATIVE, BLOCK_M, BLOCK_N, DIM, CHUNK,
            )  # fmt: skip
            if ROUTED:
                role = tl.load(roles + j, mask=columns, other=0).to(tl.int32)
                columns = columns & ((members >> role) & 1 != 0)
            seen, added = visible(
                i, j, rows, columns, position, window, mask, at_mask, stride_mask_n, stride_mask_k, lowest,
                MASK, CAUSAL, WINDOW,
            )  # fmt: skip
            x = _shaped(product, scale, cap, a, c, SOFTCAP, FACTOR, MAGNITUDE)
            x = tl.where(seen, x + added, float("-inf"))
            m_new = tl.maximum(m, tl.max(x, 1))
            top = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(x - top[:, None])
            shrink = tl.exp2(m - top)
            total = total * shrink + tl.sum(p, 1)
            if GAIN:
                p *= kept[:, None]
            acc = _weighted(
                p, acc * shrink[:, None], v, first, offsets, d, j < keys, stride_v_n, stride_v_d, dim,
                True, EVEN, PRECISION,
            )  # fmt: skip
            m = m_new
        if BIAS:
            m += b

    i = _anew(tile, keys, BLOCK_M)
    valid = i < n
    inside = valid[:, None] if EVEN else valid[:, None] & (d < dim)[None, :]
    at_z = batch * stride_z_b + head * stride_z_h + i.to(tl.int64)[:, None] * stride_z_n + d[None, :]
    at_row = i.to(tl.int64)
    share_of_one = tl.where(total > 0.0, 1.0 / total, 0.0)
    if GAIN:
        share_of_one *= unit
    out = acc * share_of_one[:, None]
    if HEAD_SCALE:
        factor_of_head = head_scale + batch * stride_scale_b + at_row * stride_scale_n + head
        out *= tl.load(factor_of_head, mask=valid, other=1.0).to(tl.float32)[:, None]
    if HEAD_SHIFT:
        shift = head_shift + batch * stride_shift_b + head * dim + at_row[:, None] * stride_shift_n + d[None, :]
        out += tl.load(shift, mask=inside, other=0.0).to(tl.float32)
    if HEAD_REPLACE:
        chosen = head_mask + batch * stride_chosen_b + at_row * stride_chosen_n + head
        replaced = tl.load(chosen, mask=valid, other=0) != 0
        value = head_replace + batch * stride_replace_b + head * dim + at_row[:, None] * stride_replace_n + d[None, :]
        new = tl.load(value, mask=inside & replaced[:, None], other=0.0).to(tl.float32)
        out = tl.where(replaced[:, None], new, out)
    tl.store(z + at_z, out.to(z.dtype.element_ty), mask=inside)
    if LSE:
        logarithm = tl.where(total > 0.0, (m + tl.log2(total)) * LN2, float("-inf"))
        tl.store(lse + (batch * heads + head) * n + i, logarithm, mask=valid)

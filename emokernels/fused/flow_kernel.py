"""Attention flow: mass or saliency per route, in one pass over the keys.

A program takes one tile of query rows of one head and walks over its keys once, as FlashAttention does, but what it
accumulates is one number per row and source role instead of an output:

    total_ir = sum over j of role r of exp(s'_ij - m_i) (times |<grad_z_i, v_j>| for the saliency)

Everything is linear in exp(-m_i), so a new maximum rescales the sums, and 1 / sum of exp, the gain of the route (which
depends on row and role only) and the sum over rows by destination role wait until the end. Scores are computed once.
A block of keys of one role costs a row sum; only a block where roles meet looks at each key's role. Each program writes
its own [R, R] sums: no atomics, so the result is the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import LOG2E, tanh


@triton.jit
def _routed(
    s, role, dst, valid, bias, factor, magnitude, at_bias, at_factor, at_magnitude,
    BIAS: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """``a s + c |s| + b`` with the table values of one source role for every row, in units of log2."""
    entry = dst * 6 + tl.minimum(role, 5)  # roles on a GPU are not validated: stay inside the table
    x = s
    if FACTOR:
        x = s * tl.load(factor + at_factor + entry, mask=valid, other=1.0)[:, None]
    if MAGNITUDE:
        x += tl.abs(s) * tl.load(magnitude + at_magnitude + entry, mask=valid, other=0.0)[:, None]
    if BIAS:
        x += (tl.load(bias + at_bias + entry, mask=valid, other=0.0) * LOG2E)[:, None]
    return x


@triton.jit
def _times_gain(total, role: tl.constexpr, gain, dst, valid):
    return total * tl.load(gain + dst * 6 + role, mask=valid, other=1.0)


@triton.jit
def _roles_again(at, inside):
    """The roles of a block where they are needed one by one.

    The modifier keeps the compiler from merging this with the load that only asks whether they are equal, which would
    give every thread one load a column in every block.
    """
    return tl.load(at, mask=inside, other=255, cache_modifier=".ca").to(tl.int32)


@triton.jit
def _product(
    left, right, i, stride_left_n, stride_left_d, stride_right_n, stride_right_d, rows, columns, dim,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``left[i] @ right[:BLOCK_N].T``, a chunk of the head dimension at a time: for tiles too wide to hold."""
    d = tl.arange(0, CHUNK)
    left += i.to(tl.int64)[:, None] * stride_left_n + d.to(tl.int64)[None, :] * stride_left_d
    right += tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * stride_right_n + d.to(tl.int64)[None, :] * stride_right_d
    step_left, step_right = tl.cast(stride_left_d, tl.int64) * CHUNK, tl.cast(stride_right_d, tl.int64) * CHUNK
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, dim, CHUNK):
        here = (d + start < dim)[None, :]
        a = tl.load(left, mask=rows[:, None] & here, other=0.0)
        b = tl.load(right, mask=columns[:, None] & here, other=0.0)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
        left += step_left
        right += step_right
    return product


@triton.jit
def _add(value, role, t0, t1, t2, t3, t4, t5):
    """The sums per source role with `value` added to that of `role`."""
    return (
        t0 + tl.where(role == 0, value, 0.0),
        t1 + tl.where(role == 1, value, 0.0),
        t2 + tl.where(role == 2, value, 0.0),
        t3 + tl.where(role == 3, value, 0.0),
        t4 + tl.where(role == 4, value, 0.0),
        t5 + tl.where(role == 5, value, 0.0),
    )


@triton.jit
def _store(out, rows, t0, t1, t2, t3, t4, t5, SALIENCY: tl.constexpr):
    """Sum the rows of one destination role: six numbers, one per source role."""
    tl.store(out, tl.sum(tl.where(rows, tl.abs(t0) if SALIENCY else t0, 0.0), 0))
    tl.store(out + 1, tl.sum(tl.where(rows, tl.abs(t1) if SALIENCY else t1, 0.0), 0))
    tl.store(out + 2, tl.sum(tl.where(rows, tl.abs(t2) if SALIENCY else t2, 0.0), 0))
    tl.store(out + 3, tl.sum(tl.where(rows, tl.abs(t3) if SALIENCY else t3, 0.0), 0))
    tl.store(out + 4, tl.sum(tl.where(rows, tl.abs(t4) if SALIENCY else t4, 0.0), 0))
    tl.store(out + 5, tl.sum(tl.where(rows, tl.abs(t5) if SALIENCY else t5, 0.0), 0))


@triton.jit(do_not_specialize=["n", "keys", "window"])
def flow_kernel(
    q, k, v, grad, roles, query_roles, bias, factor, magnitude, gain, mask, out,
    stride_q_b, stride_q_h, stride_q_n, stride_q_d, stride_k_b, stride_k_h, stride_k_n, stride_k_d,
    stride_v_b, stride_v_h, stride_v_n, stride_v_d, stride_grad_b, stride_grad_h, stride_grad_n, stride_grad_d,
    stride_role_b, stride_role_k, stride_query_b, stride_query_n,
    stride_bias_b, stride_factor_b, stride_magnitude_b, stride_gain_b,
    stride_mask_b, stride_mask_h, stride_mask_n, stride_mask_k, lowest,
    n, keys, heads, share, dim, window, scale, cap,
    SALIENCY: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr, GAIN: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program for each tile of rows, head and batch row; see the module. `out` is 0 before."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see most keys: they start first
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM)
    offsets = tl.arange(0, BLOCK_N)
    valid = i < n
    position = i + (keys - n)
    columns = (d < dim)[None, :]
    at_rows = i.to(tl.int64)[:, None]
    inside_rows = valid[:, None] if EVEN else valid[:, None] & columns
    q += batch * stride_q_b + head * stride_q_h
    if CHUNK == DIM:
        query = tl.load(q + at_rows * stride_q_n + d[None, :] * stride_q_d, mask=inside_rows, other=0.0)
    at_key = offsets.to(tl.int64)[:, None] * stride_k_n + d.to(tl.int64)[None, :] * stride_k_d
    if SALIENCY:
        grad += batch * stride_grad_b + head * stride_grad_h
        if CHUNK == DIM:
            dz = tl.load(grad + at_rows * stride_grad_n + d[None, :] * stride_grad_d, mask=inside_rows, other=0.0)
        at_value = offsets.to(tl.int64)[:, None] * stride_v_n + d.to(tl.int64)[None, :] * stride_v_d
    roles += batch * stride_role_b
    dst = tl.load(query_roles + batch * stride_query_b + i * stride_query_n, mask=valid, other=6).to(tl.int32)
    known = dst < 6
    at_bias = batch * stride_bias_b + head * 36
    at_factor = batch * stride_factor_b + head * 36
    at_magnitude = batch * stride_magnitude_b + head * 36
    at_mask = batch * stride_mask_b + head * stride_mask_h

    first_position = tile * BLOCK_M + keys - n
    last_position = tl.minimum(tile * BLOCK_M + BLOCK_M, n) - 1 + keys - n
    begin, end = 0, keys
    if CAUSAL:
        end = tl.minimum(keys, last_position + 1)
    if WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    step_k, step_v = tl.cast(stride_k_n, tl.int64), tl.cast(stride_v_n, tl.int64)
    k += batch * stride_k_b + (head // share) * stride_k_h + begin * step_k
    if SALIENCY:
        v += batch * stride_v_b + (head // share) * stride_v_h + begin * step_v

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    t0, t1, t2, t3, t4, t5 = mass, mass, mass, mass, mass, mass
    for first in range(begin, end, BLOCK_N):
        j = first + offsets
        inside = j < keys
        inside_keys = inside[:, None] if EVEN else inside[:, None] & columns
        kinds = tl.load(roles + j * stride_role_k, mask=inside, other=255).to(tl.int32)
        role = tl.min(kinds, 0)
        last_role = tl.max(tl.where(inside, kinds, 0), 0)
        one_role = last_role == role
        if CHUNK == DIM:
            key = tl.load(k + at_key, mask=inside_keys, other=0.0)
            product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        else:
            product = _product(
                q, k, i, stride_q_n, stride_q_d, stride_k_n, stride_k_d, valid, inside, dim,
                BLOCK_M, BLOCK_N, CHUNK, PRECISION,
            )  # fmt: skip
        k += BLOCK_N * step_k
        if SOFTCAP:
            x = cap * tanh(product * (scale / cap)) * LOG2E
        else:
            x = product * (scale * LOG2E)
        if BIAS or FACTOR or MAGNITUDE:
            if one_role:
                x = _routed(
                    x, role, dst, known, bias, factor, magnitude, at_bias, at_factor, at_magnitude,
                    BIAS, FACTOR, MAGNITUDE,
                )  # fmt: skip
            else:
                src = _roles_again(roles + j * stride_role_k, inside)
                for r in range(role, last_role + 1):
                    changed = _routed(
                        x, r, dst, known, bias, factor, magnitude, at_bias, at_factor, at_magnitude,
                        BIAS, FACTOR, MAGNITUDE,
                    )  # fmt: skip
                    x = tl.where((src == r)[None, :], changed, x)
        edge = first + BLOCK_N > keys
        if CAUSAL:
            edge = edge | (first + BLOCK_N - 1 > first_position)
        if WINDOW:
            edge = edge | (first <= last_position - window)
        if MASK != "none":
            edge = True
        if edge:
            seen = inside[None, :]
            if CAUSAL:
                seen = seen & (j[None, :] <= position[:, None])
            if WINDOW:
                seen = seen & (j[None, :] > position[:, None] - window)
            if MASK != "none":
                seen = seen & valid[:, None]
                value = tl.load(
                    mask + at_mask + at_rows * stride_mask_n + j.to(tl.int64)[None, :] * stride_mask_k,
                    mask=seen, other=0,
                ).to(tl.float32)  # fmt: skip
                if MASK == "bool":
                    seen = seen & (value != 0)
                else:
                    seen = seen & (value > lowest)
                    x += tl.where(seen, value, 0.0) * LOG2E
            x = tl.where(seen, x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        pairs = tl.exp2(x - base[:, None])
        shrink = tl.exp2(top - base)
        of_row = tl.sum(pairs, 1)
        mass = mass * shrink + of_row
        top = new_top
        if SALIENCY:
            if CHUNK == DIM:
                values = tl.load(v + at_value, mask=inside_keys, other=0.0)
                slope = tl.dot(dz, tl.trans(values), input_precision=PRECISION)
            else:
                slope = _product(
                    grad, v, i, stride_grad_n, stride_grad_d, stride_v_n, stride_v_d, valid, inside, dim,
                    BLOCK_M, BLOCK_N, CHUNK, PRECISION,
                )  # fmt: skip
            v += BLOCK_N * step_v
            pairs *= tl.abs(slope)
            of_row = tl.sum(pairs, 1)
        t0, t1, t2, t3, t4, t5 = t0 * shrink, t1 * shrink, t2 * shrink, t3 * shrink, t4 * shrink, t5 * shrink
        if one_role:
            t0, t1, t2, t3, t4, t5 = _add(of_row, role, t0, t1, t2, t3, t4, t5)
        else:
            src = _roles_again(roles + j * stride_role_k, inside)
            for r in range(role, last_role + 1):
                of_role = tl.sum(tl.where((src == r)[None, :], pairs, 0.0), 1)
                t0, t1, t2, t3, t4, t5 = _add(of_role, r, t0, t1, t2, t3, t4, t5)

    share_of = tl.where(mass > 0.0, 1.0 / tl.where(mass > 0.0, mass, 1.0), 0.0)
    t0, t1, t2, t3, t4, t5 = t0 * share_of, t1 * share_of, t2 * share_of, t3 * share_of, t4 * share_of, t5 * share_of
    if GAIN:
        gain += batch * stride_gain_b + head * 36
        t0, t1 = _times_gain(t0, 0, gain, dst, known), _times_gain(t1, 1, gain, dst, known)
        t2, t3 = _times_gain(t2, 2, gain, dst, known), _times_gain(t3, 3, gain, dst, known)
        t4, t5 = _times_gain(t4, 4, gain, dst, known), _times_gain(t5, 5, gain, dst, known)
    out += ((batch * heads + head) * tl.num_programs(0) + tile) * 36
    # Routes of destination roles that no row of the tile has are 0 already.
    for r in range(tl.min(dst, 0), tl.minimum(tl.max(tl.where(valid, dst, 0), 0), 5) + 1):
        _store(out + r * 6, dst == r, t0, t1, t2, t3, t4, t5, SALIENCY)

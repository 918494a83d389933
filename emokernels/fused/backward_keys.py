"""The attention backward's pass over keys: gradients of k and v.

A program owns a block of keys of one key head and goes through the query rows of all heads that share it, so that
their gradients are summed where they arise and nothing is added to memory by two programs. Per head it takes the source
roles set by set, as the rows' tables tell them apart for that head: a head that nothing changes is one set. For a block
whose keys are all of one set, tiles of rows that see it wholly run through the loop of attention without routes:
`backward_rows` has put bias, gain and factor into the numbers that each row has anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .backward_pairs import capped, logits, pulled, seen_pairs, through_logit, unscaled
from .backward_rows import Rows, arguments_of, ordinary, stages_of
from .blocks import LOG2E, load_tile, members_of, partition, per_row, products, representative, set_of
from .launch import Config, Launch
from .schedule import Schedule

SLOW_STAGES = 1


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _tile(
    key, value, query, slope, acc_k, acc_v, seen, added, shift, pull, turn, kept, steep, kink, scale, cap,
    k, v, stride_k_n, stride_k_d, stride_v_n, stride_v_d, j, columns,
    q, grad_z, stride_q_n, stride_q_d, stride_dz_n, stride_dz_d, i, rows, dim,
    CHECKED: tl.constexpr, ADDED: tl.constexpr, TURN: tl.constexpr, KEPT: tl.constexpr, FOLD: tl.constexpr,
    FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr, SOFTCAP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of rows: its part of dk and dv of the block of keys. Tiles of pairs are ``[N, M]``, keys first."""
    product = products(
        key, query, k, j, columns, stride_k_n, stride_k_d, q, i, rows, stride_q_n, stride_q_d, dim,
        CHECKED, EVEN, PRECISION, BLOCK_N, BLOCK_M, DIM, CHUNK,
    )  # fmt: skip
    s = capped(product, scale, cap, SOFTCAP)
    x = logits(s, steep[None, :] if FACTOR else steep, kink[None, :], shift[None, :], MAGNITUDE)
    if ADDED:
        x += added
    p = tl.exp2(x)
    if CHECKED and not ADDED:
        p = tl.where(seen, p, 0.0)
    if DV:
        weight = p * kept[None, :] if KEPT else p
        acc_v = tl.dot(weight.to(slope.dtype), slope, acc_v, input_precision=PRECISION)
    if DK:
        dot = products(
            value, slope, v, j, columns, stride_v_n, stride_v_d, grad_z, i, rows, stride_dz_n, stride_dz_d, dim,
            CHECKED, EVEN, PRECISION, BLOCK_N, BLOCK_M, DIM, CHUNK,
        )  # fmt: skip
        ds = pulled(p, dot, turn[None, :], pull[None, :], TURN)
        ds = through_logit(
            ds, s, cap, steep[None, :] if FACTOR else steep, kink[None, :], SOFTCAP, FACTOR and not FOLD, MAGNITUDE
        )  # fmt: skip
        acc_k = tl.dot(ds.to(query.dtype), query, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit(do_not_specialize=["n", "keys", "length", "window"])
def keys_kernel(
    q, k, v, grad_z, lse2, delta, shift, pull, kept, steep, kink, dk, dv, order, ends, roles,
    bias, factor, magnitude, gain, mask,
    stride_q_b, stride_q_h, stride_q_n, stride_q_d, stride_k_b, stride_k_h, stride_k_n, stride_k_d,
    stride_v_b, stride_v_h, stride_v_n, stride_v_d, stride_dz_b, stride_dz_h, stride_dz_n, stride_dz_d,
    stride_order_b, stride_order_h, stride_role_b,
    stride_bias_b, stride_factor_b, stride_magnitude_b, stride_gain_b,
    stride_mask_b, stride_mask_h, stride_mask_n, stride_mask_k, lowest,
    n, keys, padded, length, heads, share, dim, window, scale, cap,
    SCHEDULED: tl.constexpr, ROUTED: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr,
    GAIN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, SLOW_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key head; the grid is (blocks, key heads, batch rows)."""
    FOLD: tl.constexpr = FACTOR and not MAGNITUDE
    lift = LOG2E if SOFTCAP else scale * LOG2E
    # The first keys of a causal problem have the most rows: they start first, as blocks are numbered.
    block = tl.program_id(0)
    key_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, DIM)
    offsets = tl.arange(0, BLOCK_M)
    columns = j < keys
    k += batch * stride_k_b + key_head * stride_k_h
    v += batch * stride_v_b + key_head * stride_v_h
    own = tl.arange(0, BLOCK_N)
    exists = own < keys - block * BLOCK_N
    key, value = d, d
    if CHUNK == DIM:
        key = load_tile(k, j.to(tl.int64), d, exists, stride_k_n, stride_k_d, dim, True, EVEN)
        if DK:
            value = load_tile(v, j.to(tl.int64), d, exists, stride_v_n, stride_v_d, dim, True, EVEN)
    acc_k = tl.zeros([BLOCK_N, DIM], tl.float32)
    acc_v = tl.zeros([BLOCK_N, DIM], tl.float32)
    ones = tl.full([BLOCK_M], 1.0, tl.float32)
    zeros = tl.zeros([BLOCK_M], tl.float32)

    # Without a schedule: a contiguous range of tiles that see the block wholly, and the tiles at its two ends.
    begin, end, full_begin, full_end = 0, tl.cdiv(n, BLOCK_M), 0, n // BLOCK_M
    if not SCHEDULED:
        # The rows that stand at the first and at the last key of the block.
        at_first = block * BLOCK_N - (keys - n)
        at_last = tl.minimum(block * BLOCK_N + BLOCK_N, keys) - 1 - (keys - n)
        if CAUSAL:
            begin = tl.maximum(at_first, 0) // BLOCK_M
            full_begin = tl.cdiv(tl.maximum(at_last, 0), BLOCK_M)
        if WINDOW:
            end = tl.minimum(end, tl.cdiv(tl.maximum(at_last + window, 0), BLOCK_M))
            full_end = tl.minimum(full_end, tl.maximum(at_first + window, 0) // BLOCK_M)
        full_begin = tl.minimum(full_begin, end)
        full_end = tl.maximum(full_end, full_begin)

    role = tl.zeros([BLOCK_N], tl.int32)
    present = 63
    if ROUTED:
        role = tl.load(roles + batch * stride_role_b + j, mask=columns, other=0).to(tl.int32)
        present = tl.reduce(tl.where(columns, 1 << role, 0), 0, _either)
    dst = tl.arange(0, 8)
    passed = 0

    for member in tl.range(share, disable_licm=True):
        head = key_head * share + member
        query_head = q + batch * stride_q_b + head * stride_q_h
        slope_head = grad_z + batch * stride_dz_b + head * stride_dz_h
        at_mask = batch * stride_mask_b + head * stride_mask_h
        at_list = batch * stride_order_b + head * stride_order_h + block
        at_bias = batch * stride_bias_b + head * 36
        at_factor = batch * stride_factor_b + head * 36
        at_magnitude = batch * stride_magnitude_b + head * 36
        at_gain = batch * stride_gain_b + head * 36
        segments, only = 1, 0
        if ROUTED:
            segments, only = partition(
                bias, factor, magnitude, gain, at_bias, at_factor, at_magnitude, at_gain, dst, dst < 6,
                BIAS, FACTOR, MAGNITUDE, GAIN,
            )  # fmt: skip
        for segment in tl.range(segments, disable_licm=True):
            at_head = (batch * heads + head) * padded
            at_role = at_head
            members = 63
            quick, there = True, True
            if ROUTED:
                number = set_of(segment, segments, only)
                members = members_of(number)
                source = representative(number)
                at_role = ((batch * heads + head) * 6 + source) * padded
                there = present & members != 0
                quick = present & ~members == 0
                if BIAS:
                    b = per_row(bias, at_bias, dst, source, float("-inf"), dst < 6)
                    there = there & (tl.sum((b > float("-inf")).to(tl.int32), 0) > 0)
                if GAIN:
                    g = per_row(gain, at_gain, dst, source, 1.0, dst < 6)
                    quick = quick & (tl.sum(ordinary(g).to(tl.int32), 0) == 8)
            if SCHEDULED:
                start, quick_stop = 0, tl.load(ends + at_list * 2)
                slow_start, slow_stop = quick_stop, tl.load(ends + at_list * 2 + 1)
                before, after = 0, 0
                if ROUTED:
                    quick_stop = tl.where(quick & there, quick_stop, 0)
                    slow_start = tl.where(quick, slow_start, 0)
            else:
                start, quick_stop = full_begin, full_end
                if ROUTED:
                    start = tl.where(quick & there, start, begin)
                    quick_stop = tl.where(quick & there, quick_stop, begin)
                # The tiles before the wholly visible ones, and those behind.
                before, after = start - begin, quick_stop
                slow_start, slow_stop = 0, before + tl.maximum(end - after, 0)
            if ROUTED:
                slow_stop = tl.where(there, slow_stop, slow_start)
            passed += slow_stop
            at_shift = (shift + at_role) if BIAS or GAIN else (lse2 + at_head)
            at_pull = (pull + at_role) if GAIN or FOLD else (delta + at_head)

            for t in tl.range(start, quick_stop, disable_licm=True):
                first = (tl.load(order + at_list * length + t) if SCHEDULED else t) * BLOCK_M
                i = first + offsets
                # 0, which the compiler does not know: keys that are read again for every tile stay out of registers.
                row, near = i.to(tl.int64), j.to(tl.int64) + tl.minimum(first, 0)
                query, slope = d, d
                if CHUNK == DIM or DK:
                    query = load_tile(query_head, row, d, ones, stride_q_n, stride_q_d, dim, False, EVEN)
                if CHUNK == DIM or DV:
                    slope = load_tile(slope_head, row, d, ones, stride_dz_n, stride_dz_d, dim, False, EVEN)
                rise = tl.load(steep + at_role + i) if FACTOR else lift
                bend = tl.load(kink + at_role + i) if MAGNITUDE else zeros
                acc_k, acc_v = _tile(
                    key, value, query, slope, acc_k, acc_v, True, 0.0,
                    tl.load(at_shift + i), tl.load(at_pull + i), rise if FOLD else ones, ones, rise, bend, scale, cap,
                    k, v, stride_k_n, stride_k_d, stride_v_n, stride_v_d, near, columns,
                    query_head, slope_head, stride_q_n, stride_q_d, stride_dz_n, stride_dz_d, row, ones, dim,
                    False, False, FOLD, False, FOLD, FACTOR, MAGNITUDE, SOFTCAP, DK, DV, EVEN, PRECISION,
                    BLOCK_M, BLOCK_N, DIM, CHUNK,
                )  # fmt: skip
            for t in tl.range(slow_start, slow_stop, num_stages=SLOW_STAGES, disable_licm=True):
                if SCHEDULED:
                    first = tl.load(order + at_list * length + t) * BLOCK_M
                else:
                    first = tl.where(t < before, begin + t, after + t - before) * BLOCK_M
                i = first + offsets
                rows = i < n
                mine = columns
                if ROUTED:
                    own_role = tl.load(roles + batch * stride_role_b + j, mask=columns, other=0).to(tl.int32)
                    mine = columns & ((members >> own_role) & 1 != 0)
                row, near = i.to(tl.int64), j.to(tl.int64) + tl.minimum(first, 0)
                query, slope = d, d
                if CHUNK == DIM or DK:
                    query = load_tile(query_head, row, d, rows, stride_q_n, stride_q_d, dim, True, EVEN)
                if CHUNK == DIM or DV:
                    slope = load_tile(slope_head, row, d, rows, stride_dz_n, stride_dz_d, dim, True, EVEN)
                rise = tl.load(steep + at_role + i) if FACTOR else lift
                bend = tl.load(kink + at_role + i) if MAGNITUDE else zeros
                weight = tl.load(kept + at_role + i) if GAIN else ones
                seen, added = seen_pairs(
                    i[None, :], j[:, None], rows[None, :], mine[:, None], keys - n, window, mask, at_mask,
                    stride_mask_n, stride_mask_k, lowest, MASK, CAUSAL, WINDOW,
                )  # fmt: skip
                acc_k, acc_v = _tile(
                    key, value, query, slope, acc_k, acc_v, seen, added,
                    tl.load(at_shift + i), tl.load(at_pull + i), weight * rise if FOLD else weight, weight,
                    rise, bend, scale, cap,
                    k, v, stride_k_n, stride_k_d, stride_v_n, stride_v_d, near, columns,
                    query_head, slope_head, stride_q_n, stride_q_d, stride_dz_n, stride_dz_d, row, rows, dim,
                    True, MASK == "add", GAIN or FOLD, GAIN, FOLD, FACTOR, MAGNITUDE, SOFTCAP, DK, DV,
                    EVEN, PRECISION, BLOCK_M, BLOCK_N, DIM, CHUNK,
                )  # fmt: skip

    # The compiler would keep addresses and masks of the loads above in registers through the loops. It does not know
    # that this is 0, so it works them out anew.
    own += tl.minimum(passed, 0)
    base = ((batch * tl.num_programs(1) + key_head) * keys + block * BLOCK_N) * dim
    at = own[:, None] * dim + d[None, :]
    inside = (own < keys - block * BLOCK_N)[:, None]
    if not EVEN:
        inside = inside & (d < dim)[None, :]
    if DK:
        acc_k *= unscaled(scale, SOFTCAP, FACTOR or MAGNITUDE)
        tl.store(dk + base + at, acc_k.to(dk.dtype.element_ty), mask=inside)
    if DV:
        tl.store(dv + base + at, acc_v.to(dv.dtype.element_ty), mask=inside)


def keys_launch(
    problem: Problem,
    grad_z: Tensor,
    rows: Rows,
    schedule: Schedule | None,
    config: Config,
    dk: Tensor | None,
    dv: Tensor | None,
) -> Launch:
    """The launch that fills dk and dv ``[B, Hkv, K, D]``, contiguous, unless None; masked problems need a schedule."""
    args, meta = arguments_of(problem, grad_z, rows, schedule, config)
    args |= {**rows._asdict(), "dk": dk, "dv": dv}
    meta |= {"DK": dk is not None, "DV": dv is not None, "SLOW_STAGES": SLOW_STAGES}
    batch, key_heads, keys, _ = problem.k.shape
    grid = (triton.cdiv(keys, config.block_n), key_heads, batch)
    return Launch(keys_kernel, grid, args, meta, config.num_warps, stages_of(config, schedule))

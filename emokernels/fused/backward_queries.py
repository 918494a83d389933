"""The attention backward's pass over queries: gradients of q and of the route tables.

A program owns a tile of query rows of one head and goes through its keys set by set of source roles, by the forward's
schedule. As there, a bias moves what is subtracted from the logits of a row; gain and factor are numbers that a row's
``<dz, v>`` and pull are multiplied by. So blocks that are wholly visible and of one role run through the loop of
attention without routes.

Gradients of tables are sums over the keys of a role: a row keeps one number per table, which is added up by destination
role when the role's keys are through, into partial sums ``[B, H, tiles, R, R]``. Roles that act alike still have
different gradients, so then each role is a set of its own, and a block where roles meet is visited once for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from ..routes import ROLES
from .arguments import dense_last, shared_stride
from .backward_pairs import capped, logits, pulled, seen_pairs, through_logit, unscaled
from .backward_rows import Rows, arguments_of, stages_of
from .blocks import LOG2E, key_range, load_tile, members_of, partition, per_row, products, representative, set_of
from .launch import Config, Launch
from .schedule import Schedule

SLOW_STAGES = 1


@triton.jit
def _block(
    product, dot, key, acc, sum_bias, sum_factor, sum_magnitude, sum_gain,
    seen, added, shift, pull, turn, steep, kink, scale, cap,
    CHECKED: tl.constexpr, ADDED: tl.constexpr, TURN: tl.constexpr, FOLD: tl.constexpr,
    FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr, SOFTCAP: tl.constexpr,
    DQ: tl.constexpr, DBIAS: tl.constexpr, DFACTOR: tl.constexpr, DMAGNITUDE: tl.constexpr, DGAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of one set: its part of the rows' dq and of their sums for the tables."""
    s = capped(product, scale, cap, SOFTCAP)
    x = logits(s, steep[:, None] if FACTOR else steep, kink[:, None], shift[:, None], MAGNITUDE)
    if ADDED:
        x += added
    p = tl.exp2(x)
    if CHECKED and not ADDED:
        p = tl.where(seen, p, 0.0)
    ds = pulled(p, dot, turn[:, None], pull[:, None], TURN)
    if DBIAS:
        sum_bias += tl.sum(ds, 1)
    if DFACTOR:
        sum_factor += tl.sum(ds * s, 1)
    if DMAGNITUDE:
        sum_magnitude += tl.sum(ds * tl.abs(s), 1)
    if DGAIN:
        sum_gain += tl.sum(p * dot, 1)
    if DQ:
        ds = through_logit(
            ds, s, cap, steep[:, None] if FACTOR else steep, kink[:, None], SOFTCAP, FACTOR and not FOLD, MAGNITUDE
        )  # fmt: skip
        acc = tl.dot(ds.to(key.dtype), key, acc, input_precision=PRECISION)
    return acc, sum_bias, sum_factor, sum_magnitude, sum_gain


@triton.jit
def _store_by_role(partial, at, source, dst, sums, factor):
    """Add the rows' numbers up by destination role and store them in the source role's column."""
    target = tl.arange(0, 8)
    total = tl.sum(tl.where(target[:, None] == dst[None, :], sums[None, :], 0.0), 1) * factor
    tl.store(partial + at + target * 6 + source, total, mask=target < 6)


@triton.jit(do_not_specialize=["n", "keys", "length", "window"])
def queries_kernel(
    q, k, v, grad_z, lse2, delta, dq, dbias, dfactor, dmagnitude, dgain, order, ends, roles, query_roles,
    bias, factor, magnitude, gain, mask,
    stride_q_b, stride_q_h, stride_q_n, stride_q_d, stride_k_b, stride_k_h, stride_k_n, stride_k_d,
    stride_v_b, stride_v_h, stride_v_n, stride_v_d, stride_dz_b, stride_dz_h, stride_dz_n, stride_dz_d,
    stride_order_b, stride_order_h, stride_role_b, stride_query_b,
    stride_bias_b, stride_factor_b, stride_magnitude_b, stride_gain_b,
    stride_mask_b, stride_mask_h, stride_mask_n, stride_mask_k, lowest,
    n, keys, padded, length, heads, share, dim, window, scale, cap,
    SCHEDULED: tl.constexpr, ROUTED: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr,
    GAIN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DQ: tl.constexpr, DBIAS: tl.constexpr, DFACTOR: tl.constexpr, DMAGNITUDE: tl.constexpr, DGAIN: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, SLOW_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head; the grid is (tiles, heads, batch rows)."""
    TABLES: tl.constexpr = DBIAS or DFACTOR or DMAGNITUDE or DGAIN
    # Where the factor is all that stands between ds' and ds, it goes into the numbers of the row.
    FOLD: tl.constexpr = FACTOR and not MAGNITUDE and not TABLES
    TURN: tl.constexpr = GAIN or FOLD
    lift = LOG2E if SOFTCAP else scale * LOG2E
    # The last tiles of a causal problem have the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    own = tl.arange(0, BLOCK_M)
    i = tile * BLOCK_M + own
    d = tl.arange(0, DIM)
    offsets = tl.arange(0, BLOCK_N)
    valid = i < n
    exists = own < n - tile * BLOCK_M
    q += batch * stride_q_b + head * stride_q_h
    grad_z += batch * stride_dz_b + head * stride_dz_h
    query, slope = d, d
    if CHUNK == DIM:
        query = load_tile(q, i.to(tl.int64), d, exists, stride_q_n, stride_q_d, dim, True, EVEN)
        slope = load_tile(grad_z, i.to(tl.int64), d, exists, stride_dz_n, stride_dz_d, dim, True, EVEN)
    k += batch * stride_k_b + (head // share) * stride_k_h
    v += batch * stride_v_b + (head // share) * stride_v_h
    at_mask = batch * stride_mask_b + head * stride_mask_h
    at_row = (batch * heads + head) * padded + i
    top = tl.load(lse2 + at_row)
    down = tl.load(delta + at_row)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    zeros = tl.zeros([BLOCK_M], tl.float32)
    ones = tl.full([BLOCK_M], 1.0, tl.float32)

    # Without a schedule: a contiguous range of wholly visible blocks, and the blocks at its two ends.
    begin, end, full_begin, full_end = 0, 0, 0, 0
    segments = 1
    if SCHEDULED:
        at_list = batch * stride_order_b + head * stride_order_h + tile
        order += at_list * length
        ends += at_list * (26 if ROUTED else 2)
    else:
        begin, end, full_begin, full_end = key_range(tile, n, keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)

    dst = tl.zeros([BLOCK_M], tl.int32)
    at_bias, at_factor, at_magnitude, at_gain = batch, batch, batch, batch
    only = 0
    if ROUTED:
        dst = tl.load(query_roles + batch * stride_query_b + i, mask=valid, other=0).to(tl.int32)
        roles += batch * stride_role_b
        at_bias = batch * stride_bias_b + head * 36
        at_factor = batch * stride_factor_b + head * 36
        at_magnitude = batch * stride_magnitude_b + head * 36
        at_gain = batch * stride_gain_b + head * 36
        if TABLES:
            segments = 6
        else:
            segments, only = partition(
                bias, factor, magnitude, gain, at_bias, at_factor, at_magnitude, at_gain, dst, valid,
                BIAS, FACTOR, MAGNITUDE, GAIN,
            )  # fmt: skip

    for segment in tl.range(segments, disable_licm=True):
        shift, pull, turn, kink = top, down, ones, zeros
        steep = ones if FACTOR else lift
        sum_bias, sum_factor, sum_magnitude, sum_gain = zeros, zeros, zeros, zeros
        members = 63
        if SCHEDULED:
            number = 0
            if ROUTED:
                number = set_of(segment, segments, only)
                members = members_of(number)
                source = representative(number)
                if BIAS:
                    # +inf where the route is knocked out: no weight.
                    shift = top - per_row(bias, at_bias, dst, source, 0.0, valid) * LOG2E
                if FACTOR:
                    steep = per_row(factor, at_factor, dst, source, 1.0, valid) * lift
                if MAGNITUDE:
                    kink = per_row(magnitude, at_magnitude, dst, source, 0.0, valid) * tl.abs(lift)
                if GAIN:
                    turn = per_row(gain, at_gain, dst, source, 1.0, valid)
                if FOLD:
                    turn *= steep
                    pull = down * steep
            start = tl.where(number == 0, 0, tl.load(ends + tl.maximum(2 * number - 1, 0)))
            quick_stop = tl.load(ends + 2 * number)
            slow_start, slow_stop = quick_stop, tl.load(ends + 2 * number + 1)
            if BIAS:
                open_rows = tl.sum((shift < float("inf")).to(tl.int32), 0) > 0
                quick_stop = tl.where(open_rows, quick_stop, start)
                slow_stop = tl.where(open_rows, slow_stop, slow_start)
        else:
            start, quick_stop = full_begin, full_end
            slow_start, slow_stop = 0, full_begin - begin + tl.maximum(end - full_end, 0)

        for t in tl.range(start, quick_stop, disable_licm=PRECISION != "ieee"):
            first = (tl.load(order + t) if SCHEDULED else t) * BLOCK_N
            skip = first.to(tl.int64)
            key, value = d, d
            if CHUNK == DIM or DQ:
                key = load_tile(k + skip * stride_k_n, offsets, d, valid, stride_k_n, stride_k_d, dim, False, EVEN)
            if CHUNK == DIM:
                value = load_tile(v + skip * stride_v_n, offsets, d, valid, stride_v_n, stride_v_d, dim, False, EVEN)
            # 0, which the compiler does not know: rows that are read again in every pass stay out of registers.
            rows = i.to(tl.int64) + tl.minimum(first, 0)
            product = products(
                query, key, q, rows, valid, stride_q_n, stride_q_d,
                k + skip * stride_k_n, offsets, valid, stride_k_n, stride_k_d, dim,
                False, EVEN, PRECISION, BLOCK_M, BLOCK_N, DIM, CHUNK,
            )  # fmt: skip
            dot = products(
                slope, value, grad_z, rows, valid, stride_dz_n, stride_dz_d,
                v + skip * stride_v_n, offsets, valid, stride_v_n, stride_v_d, dim,
                False, EVEN, PRECISION, BLOCK_M, BLOCK_N, DIM, CHUNK,
            )  # fmt: skip
            acc, sum_bias, sum_factor, sum_magnitude, sum_gain = _block(
                product, dot, key, acc, sum_bias, sum_factor, sum_magnitude, sum_gain,
                True, 0.0, shift, pull, turn, steep, kink, scale, cap,
                False, False, TURN, FOLD, FACTOR, MAGNITUDE, SOFTCAP,
                DQ, DBIAS, DFACTOR, DMAGNITUDE, DGAIN, PRECISION,
            )  # fmt: skip
        for t in tl.range(slow_start, slow_stop, num_stages=SLOW_STAGES, disable_licm=True):
            if SCHEDULED:
                first = tl.load(order + t) * BLOCK_N
            else:
                first = tl.where(t < full_begin - begin, begin + t, full_end + t - (full_begin - begin)) * BLOCK_N
            j = first + offsets
            columns = j < keys
            skip = first.to(tl.int64)
            key, value = d, d
            if CHUNK == DIM or DQ:
                key = load_tile(k + skip * stride_k_n, offsets, d, columns, stride_k_n, stride_k_d, dim, True, EVEN)
            if CHUNK == DIM:
                value = load_tile(v + skip * stride_v_n, offsets, d, columns, stride_v_n, stride_v_d, dim, True, EVEN)
            rows = i.to(tl.int64) + tl.minimum(first, 0)
            product = products(
                query, key, q, rows, valid, stride_q_n, stride_q_d,
                k + skip * stride_k_n, offsets, columns, stride_k_n, stride_k_d, dim,
                True, EVEN, PRECISION, BLOCK_M, BLOCK_N, DIM, CHUNK,
            )  # fmt: skip
            dot = products(
                slope, value, grad_z, rows, valid, stride_dz_n, stride_dz_d,
                v + skip * stride_v_n, offsets, columns, stride_v_n, stride_v_d, dim,
                True, EVEN, PRECISION, BLOCK_M, BLOCK_N, DIM, CHUNK,
            )  # fmt: skip
            if ROUTED:
                role = tl.load(roles + j, mask=columns, other=0).to(tl.int32)
                columns = columns & ((members >> role) & 1 != 0)
            seen, added = seen_pairs(
                i[:, None], j[None, :], valid[:, None], columns[None, :], keys - n, window, mask, at_mask,
                stride_mask_n, stride_mask_k, lowest, MASK, CAUSAL, WINDOW,
            )  # fmt: skip
            acc, sum_bias, sum_factor, sum_magnitude, sum_gain = _block(
                product, dot, key, acc, sum_bias, sum_factor, sum_magnitude, sum_gain,
                seen, added, shift, pull, turn, steep, kink, scale, cap,
                True, MASK == "add", TURN, FOLD, FACTOR, MAGNITUDE, SOFTCAP,
                DQ, DBIAS, DFACTOR, DMAGNITUDE, DGAIN, PRECISION,
            )  # fmt: skip

        if TABLES:
            at_partial = ((batch * heads + head) * tl.num_programs(0) + tile) * 36
            # Logits that are not capped were kept without their scale.
            unit = 1.0 if SOFTCAP else scale
            size = 1.0 if SOFTCAP else tl.abs(scale)
            if DBIAS:
                _store_by_role(dbias, at_partial, segment, dst, sum_bias, 1.0)
            if DFACTOR:
                _store_by_role(dfactor, at_partial, segment, dst, sum_factor, unit)
            if DMAGNITUDE:
                _store_by_role(dmagnitude, at_partial, segment, dst, sum_magnitude, size)
            if DGAIN:
                _store_by_role(dgain, at_partial, segment, dst, sum_gain, 1.0)

    if DQ:
        dq += ((batch * heads + head) * n + tile * BLOCK_M) * dim
        acc *= unscaled(scale, SOFTCAP, FACTOR or MAGNITUDE)
        inside = (own < n - tile * BLOCK_M)[:, None]
        if not EVEN:
            inside = inside & (d < dim)[None, :]
        tl.store(dq + own[:, None] * dim + d[None, :], acc.to(dq.dtype.element_ty), mask=inside)


def queries_launch(
    problem: Problem,
    grad_z: Tensor,
    rows: Rows,
    schedule: Schedule | None,
    config: Config,
    dq: Tensor | None,
    partials: dict[str, Tensor | None],
) -> Launch:
    """The launch that fills dq ``[B, H, N, D]``, contiguous, and the partial sums of tables by name, unless None."""
    args, meta = arguments_of(problem, grad_z, rows, schedule, config)
    # Triton chooses the layout of a product by the narrowest numbers that go into it: bytes would cost ds 16-bit loads.
    given = problem.query_roles if problem.routed else None
    query_roles = None if given is None else dense_last(given.to(torch.int32), 1)
    args |= {
        "lse2": rows.lse2, "delta": rows.delta, "dq": dq, **{f"d{name}": t for name, t in partials.items()},
        "query_roles": query_roles, "stride_query_b": shared_stride(query_roles, 0),
    }  # fmt: skip
    meta |= {"DQ": dq is not None, **{f"D{name.upper()}": t is not None for name, t in partials.items()}}
    meta["SLOW_STAGES"] = SLOW_STAGES
    batch, heads, n, _ = problem.q.shape
    grid = (triton.cdiv(n, config.block_m), heads, batch)
    return Launch(queries_kernel, grid, args, meta, config.num_warps, stages_of(config, schedule))


def partials_of(problem: Problem, config: Config, wanted: dict[str, bool]) -> dict[str, Tensor | None]:
    """Empty partial sums ``[B, H, tiles, R, R]`` float32 of the tables whose gradient is wanted."""
    batch, heads, n, _ = problem.q.shape
    shape = (batch, heads, triton.cdiv(n, config.block_m), ROLES, ROLES)
    return {
        name: torch.empty(shape, dtype=torch.float32, device=problem.q.device) if want else None
        for name, want in wanted.items()
    }

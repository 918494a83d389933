"""The arithmetic that all attention kernels share: logits in units of log2, and one block of online softmax.

Exponentials are ``exp2``: with ``L = log2(e)`` a logit ``x`` is kept as ``L x`` and its bias as ``L b``, which costs
nothing because the scale of the logits takes L in.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """Hyperbolic tangent from exp, without overflow, to float32 accuracy also near 0."""
    small = x * x
    series = x * (1.0 + small * (-0.3333333333 + small * (0.1333333333 + small * (-0.0539682540))))
    t = tl.exp2(-2.8853900817779268 * tl.abs(x))
    large = (1.0 - t) / (1.0 + t)
    return tl.where(small < 0.0225, series, tl.where(x < 0, -large, large))


@triton.jit
def shaped(
    product, scale, cap, factor, magnitude, SOFTCAP: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr
):
    """``L (a s + c |s|)`` of ``product = q k``; `factor` a and `magnitude` c broadcast against it."""
    if SOFTCAP:
        s = cap * tanh(product * (scale / cap)) * LOG2E
    else:
        s = product * (scale * LOG2E)
    x = s
    if FACTOR:
        x = s * factor
    if MAGNITUDE:
        x += tl.abs(s) * magnitude
    return x


@triton.jit
def visible(
    i, j, rows, columns, position, window, mask, at_mask, stride_mask_n, stride_mask_k, lowest,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Which keys `j` the rows `i` see, ``[M, N]`` bool, and the additive mask in units of log2 (0.0 without one).

    `rows` and `columns` say which rows and keys count at all; `position` are the rows' columns among the keys,
    `at_mask` is the offset of the mask of this batch row and head.
    """
    seen = rows[:, None] & columns[None, :]
    added = 0.0
    if CAUSAL:
        seen = seen & (j[None, :] <= position[:, None])
    if WINDOW:
        seen = seen & (j[None, :] > position[:, None] - window)
    if MASK != "none":
        at = at_mask + i.to(tl.int64)[:, None] * stride_mask_n + j.to(tl.int64)[None, :] * stride_mask_k
        if MASK == "bool":
            seen = seen & (tl.load(mask + at, mask=seen, other=0) != 0)
        else:
            value = tl.load(mask + at, mask=seen, other=0.0).to(tl.float32)
            seen = seen & (value > lowest)
            added = tl.where(seen, value, 0.0) * LOG2E
    return seen, added


@triton.jit
def per_row(table, at_row, dst, src, neutral, valid):
    """``table[row, head, dst, src]`` of one source role for each row, ``[M]``; `neutral` where it is not `valid`."""
    return tl.load(table + at_row + dst * 6 + src, mask=valid, other=neutral).to(tl.float32)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _unlike(table, at_row, dst, valid):
    """Bits per row: source role r differs from role 0 (bit r), and from role 1 (bit r + 8)."""
    zero, one = per_row(table, at_row, dst, 0, 0.0, valid), per_row(table, at_row, dst, 1, 0.0, valid)
    bits = tl.where(one != zero, 2, 0)
    for role in tl.static_range(2, 6):
        value = per_row(table, at_row, dst, role, 0.0, valid)
        bits = bits | tl.where(value != zero, 1 << role, 0) | tl.where(value != one, 256 << role, 0)
    return bits


@triton.jit
def partition(
    bias, factor, magnitude, gain, at_bias, at_factor, at_magnitude, at_gain, dst, valid,
    BIAS: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """How a tile of rows has to tell source roles apart: the number of sets, and the role that stands out of two.

    1 set when all roles act alike for every row (a tile that nothing changes), 2 when one role differs from the others
    (an image that is boosted), else 6.
    """
    bits = tl.zeros_like(dst)
    if BIAS:
        bits = bits | _unlike(bias, at_bias, dst, valid)
    if FACTOR:
        bits = bits | _unlike(factor, at_factor, dst, valid)
    if MAGNITUDE:
        bits = bits | _unlike(magnitude, at_magnitude, dst, valid)
    if GAIN:
        bits = bits | _unlike(gain, at_gain, dst, valid)
    found = tl.reduce(bits, 0, _either)
    low = found & 63
    sets = tl.where(low == 0, 1, 6)
    only = 0
    for role in tl.static_range(1, 6):
        alone = low == (1 << role)
        sets = tl.where(alone, 2, sets)
        only = tl.where(alone, role, only)
    # Role 0 stands out when the others equal role 1.
    sets = tl.where((low != 0) & (found >> 8 == 0), 2, sets)
    return sets, only


@triton.jit
def set_of(segment, segments, only):
    """The number of a tile's set in the schedule's numbering: all roles; one and the rest; or each alone."""
    return tl.where(segments == 1, 12, tl.where(segments == 2, tl.where(segment == 0, only, 6 + only), segment))


@triton.jit
def members_of(number):
    """The roles of a set as bits."""
    return tl.where(number < 6, 1 << (number % 6), tl.where(number < 12, 63 ^ (1 << (number % 6)), 63))


@triton.jit
def representative(number):
    """A role whose table values hold for the whole set."""
    return tl.where(number < 6, number, tl.where(number == 6, 1, 0))


@triton.jit
def six_of(table, at, neutral, valid):
    """The table values of every row towards each of the six source roles; `at` is where a row's six begin."""
    return (
        tl.load(table + at, mask=valid, other=neutral).to(tl.float32),
        tl.load(table + at + 1, mask=valid, other=neutral).to(tl.float32),
        tl.load(table + at + 2, mask=valid, other=neutral).to(tl.float32),
        tl.load(table + at + 3, mask=valid, other=neutral).to(tl.float32),
        tl.load(table + at + 4, mask=valid, other=neutral).to(tl.float32),
        tl.load(table + at + 5, mask=valid, other=neutral).to(tl.float32),
    )


@triton.jit
def choose(role, t0, t1, t2, t3, t4, t5):
    """The value of a role among six: a choice between registers instead of a load."""
    low = tl.where(role == 0, t0, tl.where(role == 1, t1, t2))
    return tl.where(role < 3, low, tl.where(role == 3, t3, tl.where(role == 4, t4, t5)))


@triton.jit
def edited(
    out, d, inside, rows, replaced, head_scale, head_shift, head_replace, at_scale, at_shift, at_replace,
    HEAD_SCALE: tl.constexpr, HEAD_SHIFT: tl.constexpr, HEAD_REPLACE: tl.constexpr,
):  # fmt: skip
    """Head edits of ``out [M, D]``; the offsets ``[M]`` say where the values of a row begin."""
    if HEAD_SCALE:
        out *= tl.load(head_scale + at_scale, mask=rows, other=1.0).to(tl.float32)[:, None]
    if HEAD_SHIFT:
        out += tl.load(head_shift + at_shift[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if HEAD_REPLACE:
        value = head_replace + at_replace[:, None] + d[None, :]
        new = tl.load(value, mask=inside & replaced[:, None], other=0.0).to(tl.float32)
        out = tl.where(replaced[:, None], new, out)
    return out


@triton.jit
def load_tile(start, rows, d, inside, stride, stride_d, dim, CHECKED: tl.constexpr, EVEN: tl.constexpr):
    """Rows ``[M]`` of a matrix ``[?, dim]``, padded to the tile's width; `inside` says which exist."""
    at = start + rows[:, None] * stride + d[None, :] * stride_d
    if CHECKED:
        tile = tl.load(at, mask=inside[:, None] if EVEN else inside[:, None] & (d < dim)[None, :], other=0.0)
    elif EVEN:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(d < dim)[None, :], other=0.0)
    return tile


@triton.jit
def products(
    a, b, start_a, rows_a, inside_a, stride_a, stride_a_d, start_b, rows_b, inside_b, stride_b, stride_b_d, dim,
    CHECKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``a b^T`` of tiles ``[M, DIM]`` and ``[N, DIM]``, float32.

    Whole tiles of float32 do not fit into registers in the form in which matrix instructions take them: there they are
    read CHUNK columns at a time, from memory that is near after the first time, and `a` and `b` are not used.
    """
    if CHUNK == DIM:
        total = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        total = tl.zeros([M, N], tl.float32)
        for begin in tl.range(0, DIM, CHUNK, num_stages=1, disable_licm=True):
            d = begin + tl.arange(0, CHUNK)
            left = load_tile(start_a, rows_a, d, inside_a, stride_a, stride_a_d, dim, True, EVEN)
            right = load_tile(start_b, rows_b, d, inside_b, stride_b, stride_b_d, dim, CHECKED, EVEN)
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def key_range(
    tile, n, keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """The key blocks of a tile of rows without routes and masks: begin and end, and those of the wholly visible ones.

    The latter are a contiguous part of the former.
    """
    begin, end, full_begin, full_end = 0, tl.cdiv(keys, BLOCK_N), 0, keys // BLOCK_N
    first_position = tile * BLOCK_M + keys - n
    last_position = tl.minimum(tile * BLOCK_M + BLOCK_M, n) - 1 + keys - n
    if CAUSAL:
        full_end = tl.minimum(full_end, (first_position + 1) // BLOCK_N)
        end = tl.minimum(end, tl.cdiv(last_position + 1, BLOCK_N))
    if WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_N)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_end, full_begin)
    return begin, end, full_begin, full_end

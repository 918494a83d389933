"""What the kernels of the attention backward compute for a pair of a query and a key.

Both orientations occur, rows along the first dimension of a tile or along the second, so everything that is kept per
row or per key comes with the shape ``[M, 1]`` or ``[1, M]``. As in the forward, logits and what is subtracted from them
are in units of log2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import LN2, LOG2E, tanh


@triton.jit
def seen_pairs(
    i, j, rows, columns, offset, window, mask, at_mask, stride_mask_n, stride_mask_k, lowest,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Which rows `i` see which keys `j`, bool, and the additive mask in units of log2, -inf where they do not see them.

    Without an additive mask the latter is 0.0. `rows` and `columns` say which rows and keys count at all; `offset` is
    the column of row 0 among the keys.
    """
    seen = rows & columns
    added = 0.0
    if CAUSAL:
        seen = seen & (j <= i + offset)
    if WINDOW:
        seen = seen & (j > i + (offset - window))
    if MASK != "none":
        at = at_mask + i.to(tl.int64) * stride_mask_n + j.to(tl.int64) * stride_mask_k
        if MASK == "bool":
            seen = seen & (tl.load(mask + at, mask=seen, other=0) != 0)
        else:
            value = tl.load(mask + at, mask=seen, other=0.0).to(tl.float32)
            added = tl.where(seen & (value > lowest), value * LOG2E, float("-inf"))
    return seen, added


@triton.jit
def capped(product, scale, cap, SOFTCAP: tl.constexpr):
    """The logit before routes; one that is not capped is left without its scale."""
    s = product
    if SOFTCAP:
        s = cap * tanh(product * (scale / cap))
    return s


@triton.jit
def logits(s, steep, kink, shift, MAGNITUDE: tl.constexpr):
    """``steep s + kink |s| - shift``: the exponent of the weights.

    `steep` is the factor a and `kink` the magnitude c, in units of log2 and of the scale that `s` may lack.
    """
    x = s * steep - shift
    if MAGNITUDE:
        x += tl.abs(s) * kink
    return x


@triton.jit
def pulled(p, dot, turn, pull, TURN: tl.constexpr):
    """``p (turn <dz, v> - pull)``: the gradient of a routed logit."""
    if TURN:
        dot *= turn
    return p * (dot - pull)


@triton.jit
def through_logit(
    ds, s, cap, steep, kink, SOFTCAP: tl.constexpr, FACTOR: tl.constexpr, MAGNITUDE: tl.constexpr
):  # fmt: skip
    """From the gradient of the routed logit to that of ``scale <q, k>``, up to `unscaled`; |s| has no slope at 0."""
    if MAGNITUDE:
        ds *= tl.where(s > 0.0, steep + kink, tl.where(s < 0.0, steep - kink, steep))
    elif FACTOR:
        ds *= steep
    if SOFTCAP:
        bent = s * (1.0 / cap)
        ds *= 1.0 - bent * bent
    return ds


@triton.jit
def unscaled(scale, SOFTCAP: tl.constexpr, ROUTED: tl.constexpr):
    """What is left between the sums of `through_logit` and gradients of ``<q, k>``; `ROUTED`: by `steep` or `kink`."""
    left = scale
    if ROUTED:
        left = scale * LN2 if SOFTCAP else LN2
    return left

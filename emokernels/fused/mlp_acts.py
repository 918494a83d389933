"""The activations and their slopes inside Triton kernels, on float32 values.

Everything that is a sigmoid is computed as ``x / (1 + exp(-k x))``: it saturates without overflow at both ends. The
tanh form of GELU is one too, since ``(1 + tanh(y)) / 2 = sigmoid(2 y)``. `EXACT` takes the correctly rounded division,
which float32 tensors can see; half-precision results are rounded away from the last bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}
"""Names of `emokernels.acts.ACTS` to names in these kernels; every key there is a key here."""

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TANH_LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_TANH_CUBIC = tl.constexpr(0.07135481627260025)  # 2 sqrt(2 / pi) 0.044715
_QUICK = tl.constexpr(1.702)


@triton.jit
def _sigmoid_argument(x, ACT: tl.constexpr):
    if ACT == "gelu_tanh":
        y = x * (_TANH_LINEAR + _TANH_CUBIC * x * x)
    elif ACT == "quick_gelu":
        y = _QUICK * x
    else:
        y = x
    return y


@triton.jit
def _divide(a, b, EXACT: tl.constexpr):
    if EXACT:
        c = tl.div_rn(a, b)
    else:
        c = a / b
    return c


@triton.jit
def activation(x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """``act(x)``; NaN stays NaN."""
    tl.static_assert(ACT == "silu" or ACT == "gelu" or ACT == "gelu_tanh" or ACT == "relu" or ACT == "quick_gelu")
    if ACT == "relu":
        h = tl.where(x < 0.0, 0.0, x)
    elif ACT == "gelu":
        h = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    else:
        h = _divide(x, 1.0 + tl.exp(-_sigmoid_argument(x, ACT)), EXACT)
    return h


@triton.jit
def activation_and_slope(x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """``(act(x), act'(x))``; the slope of relu at 0 is 0."""
    tl.static_assert(ACT == "silu" or ACT == "gelu" or ACT == "gelu_tanh" or ACT == "relu" or ACT == "quick_gelu")
    if ACT == "relu":
        h = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        h = x * below
        slope = below + x * (_INV_SQRT_2PI * tl.exp(-0.5 * x * x))
    else:
        e = tl.exp(-_sigmoid_argument(x, ACT))
        s = _divide(tl.full(x.shape, 1.0, tl.float32), 1.0 + e, EXACT)
        rest = 1.0 - s
        if EXACT:
            rest = tl.where(e < 1.0, e * s, rest)  # 1 - s cancels where s is near 1, and x may be large there
        h = x * s
        if ACT == "gelu_tanh":
            slope = s + h * rest * (_TANH_LINEAR + 3.0 * _TANH_CUBIC * x * x)
        elif ACT == "quick_gelu":
            slope = s + _QUICK * h * rest
        else:
            slope = s + h * rest
    return h, slope

"""Kernels to try the audit on."""

import torch
import triton
import triton.language as tl

from emokernels.fused.launch import Launch


@triton.jit
def product_kernel(a, b, out, table, n, LOOKUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out = sum over blocks of exp2(a b'), each score times a number of a table if LOOKUP."""
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, 64)
    left = tl.load(a + i[:, None] * 64 + d[None, :])
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in range(n):
        right = tl.load(b + (t * BLOCK_N + j)[:, None] * 64 + d[None, :])
        score = tl.dot(left, tl.trans(right))
        if LOOKUP:
            score = score * tl.load(table + t * BLOCK_N + i[:, None] * 7 + j[None, :])
        total += tl.exp2(score)
    tl.store(out + i[:, None] * BLOCK_N + j[None, :], total)


@triton.jit
def sum_kernel(a, out, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of rows, in a tile that has more numbers than a thread has registers where BLOCK_N is large."""
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in range(n):
        total = total * 0.5 + tl.load(a + (t * BLOCK_M + i)[:, None] * BLOCK_N + j[None, :])
    tl.store(out + i[:, None] * BLOCK_N + j[None, :], total)


def _empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def product(dtype=torch.bfloat16, lookup=False, stages=2, n=100):
    args = {
        "a": _empty(64, 64, dtype=dtype), "b": _empty(6400, 64, dtype=dtype), "out": _empty(64, 64),
        "table": _empty(8192), "n": n,
    }  # fmt: skip
    return Launch(product_kernel, (1,), args, {"LOOKUP": lookup, "BLOCK_M": 64, "BLOCK_N": 64}, 4, stages)


def rows(block=64, n=100):
    args = {"a": _empty(n, block), "out": _empty(64, block), "n": n}
    return Launch(sum_kernel, (1,), args, {"BLOCK_M": 64, "BLOCK_N": block}, 1, 1)

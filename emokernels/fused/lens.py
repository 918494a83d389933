"""The logit lens: a matrix product whose result never leaves the registers.

A program takes one tile of rows and one part of the vocabulary, computes the logits block by block, and keeps of them,
per row, the maximum m, ``l = sum exp(x - m)``, ``t = sum exp(x - m) (m - x)`` and, when asked, the likeliest tokens.
The parts are merged afterwards; every term of l and t is non-negative, so nothing cancels.

Candidates for the likeliest tokens are taken out of a block one at a time, only as long as some row finds one that
beats the worst it has kept: k times in the first block, hardly ever later.

The probability of a token set is the same kernel over the set's rows of the unembedding, one set a part, divided by the
mass of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import LOG2E, tanh
from .launch import Config, Launch, arch_of

BLOCK_K = {2: 64, 4: 32}
"""Elements of d in one step of the product, by bytes per element: one 128-byte line."""
FEW_ROWS = 64
"""Up to this many rows the pass is bound by reading the unembedding, and one low tile is enough."""
PROGRAMS = {"sm_80": 2 * 108, "sm_90": 2 * 132, "sm_100": 2 * 148}
"""Programs to aim for: two for every multiprocessor."""

CONFIGS: dict[tuple[int, bool, bool], dict[str, Config]] = {
    (2, True, False): dict.fromkeys(PROGRAMS, Config(64, 128, 8, 3)),
    (2, True, True): dict.fromkeys(PROGRAMS, Config(64, 128, 8, 3)),
    (2, False, False): {
        "sm_80": Config(128, 128, 8, 3), "sm_90": Config(128, 128, 8, 3), "sm_100": Config(128, 64, 8, 4)
    },
    (2, False, True): dict.fromkeys(PROGRAMS, Config(128, 64, 8, 4)),
    (4, True, False): {
        "sm_80": Config(64, 32, 4, 3), "sm_90": Config(64, 128, 8, 3), "sm_100": Config(64, 128, 8, 3)
    },
    (4, True, True): {
        "sm_80": Config(64, 32, 4, 3), "sm_90": Config(64, 128, 8, 3), "sm_100": Config(64, 64, 8, 3)
    },
    (4, False, False): {
        "sm_80": Config(64, 32, 4, 3), "sm_90": Config(128, 64, 8, 3), "sm_100": Config(128, 64, 8, 3)
    },
    (4, False, True): {
        "sm_80": Config(64, 32, 4, 3), "sm_90": Config(128, 64, 8, 3), "sm_100": Config(64, 64, 8, 3)
    },
}  # fmt: skip
"""By bytes per element, whether the rows are few, and whether the likeliest tokens are kept (in registers); by arch."""


@triton.jit(do_not_specialize=["n", "stop_at", "part"])
def _lens_kernel(
    hidden, unembed, bias, tokens, top, mass, spread, value, index,
    stride_hidden_n, stride_hidden_d, stride_unembed_v, stride_unembed_d, stride_bias,
    n, stop_at, part, dim, cap,
    GATHER: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, TOP: tl.constexpr, SLOTS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BLOCK_M)  # tiles that share a part run side by side: it is read once
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_K)
    offsets = tl.arange(0, BLOCK_N)
    valid = i < n
    # Rows and tokens past the end repeat the last one, so that the loop over d loads without a mask.
    at_hidden = tl.minimum(i, n - 1).to(tl.int64)[:, None] * stride_hidden_n + d.to(tl.int64)[None, :] * stride_hidden_d
    step_hidden, step_unembed = tl.cast(stride_hidden_d, tl.int64), tl.cast(stride_unembed_d, tl.int64)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    below = tl.zeros([BLOCK_M], tl.float32)
    if TOP > 0:
        slots = tl.arange(0, SLOTS)[None, :]
        # Slots beyond k hold what nothing beats.
        kept = tl.where(slots < TOP, float("-inf"), float("inf")) + tl.zeros([BLOCK_M, SLOTS], tl.float32)
        names = tl.zeros([BLOCK_M, SLOTS], tl.int32)

    start = split * part
    stop = tl.minimum(start + part, stop_at)
    for first in range(start, stop, BLOCK_N):
        j = first + offsets
        inside = j < stop
        word = tl.minimum(j, stop - 1)
        end = dim
        if GATHER:
            word = tl.load(tokens + j, mask=inside, other=-1).to(tl.int32)
            inside = word >= 0
            end = tl.where(tl.max(word, 0) >= 0, dim, 0)  # short sets leave whole blocks empty
            word = tl.maximum(word, 0)
        at_unembed = word.to(tl.int64)[:, None] * stride_unembed_v + d.to(tl.int64)[None, :] * stride_unembed_d
        x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        from_hidden, from_unembed = hidden, unembed
        for k in range(0, end, BLOCK_K):
            if EVEN:
                left, right = tl.load(from_hidden + at_hidden), tl.load(from_unembed + at_unembed)
            else:
                here = (d + k < dim)[None, :]
                left = tl.load(from_hidden + at_hidden, mask=here, other=0.0)
                right = tl.load(from_unembed + at_unembed, mask=here, other=0.0)
            x = tl.dot(left, tl.trans(right), x, input_precision=PRECISION)
            from_hidden += BLOCK_K * step_hidden
            from_unembed += BLOCK_K * step_unembed
        if BIAS:
            x += tl.load(bias + word.to(tl.int64) * stride_bias, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            x = cap * tanh(x / cap)
        x = tl.where(inside[None, :], x, float("-inf"))

        new = tl.maximum(m, tl.max(x, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        away = x - base[:, None]
        weight = tl.exp2(away * LOG2E)
        fade = tl.exp2((m - base) * LOG2E)
        moved = tl.where(m == float("-inf"), 0.0, base - m)
        # A token that is excluded or past the end is -inf away with weight 0.
        lack = tl.sum(tl.where(away == float("-inf"), 0.0, away) * weight, 1)
        below = fade * (below + moved * total) - lack
        total = fade * total + tl.sum(weight, 1)
        m = new
        if TOP > 0:
            best, worst = tl.max(x, 1), tl.min(kept, 1)
            better = best > worst
            while tl.max(better.to(tl.int32), 0) > 0:
                # The first of equal ones, in two plain reductions: one that carries indices needs twice the registers.
                where = tl.min(tl.where(x == best[:, None], offsets[None, :], BLOCK_N), 1)
                slot = tl.min(tl.where(kept == worst[:, None], slots, SLOTS), 1)
                place = better[:, None] & (slots == slot[:, None])
                kept = tl.where(place, best[:, None], kept)
                names = tl.where(place, (first + where)[:, None], names)
                x = tl.where(offsets[None, :] == where[:, None], float("-inf"), x)
                best, worst = tl.max(x, 1), tl.min(kept, 1)
                better = best > worst

    at = split.to(tl.int64) * n + i
    tl.store(top + at, m, mask=valid)
    tl.store(mass + at, total, mask=valid)
    tl.store(spread + at, below, mask=valid)
    if TOP > 0:
        at_top = at[:, None] * TOP + slots
        real = valid[:, None] & (slots < TOP)
        tl.store(value + at_top, kept, mask=real)
        tl.store(index + at_top, names, mask=real)


def lens_launch(
    hidden: Tensor, unembed: Tensor, bias: Tensor | None, tokens: Tensor | None, top_k: int, softcap: float,
    arch: str | None = None, config: Config | None = None,
) -> tuple[Launch, dict[str, Tensor]]:  # fmt: skip
    """The launch, and what it fills: top, mass, spread ``[parts, N]``, value and index ``[parts, N, k]``.

    Without `tokens` the parts share out the vocabulary; ``tokens [S, L]`` makes S parts of the rows they name.
    """
    n, dim = hidden.shape
    arch = arch_of(hidden, arch)
    size = hidden.element_size()
    config = config or CONFIGS[(size, n <= FEW_ROWS, top_k > 0)][arch]
    tiles = triton.cdiv(n, config.block_m)
    if tokens is None:
        stop_at = unembed.shape[0]
        blocks = triton.cdiv(stop_at, config.block_n)
        # Whole blocks for every part, and no part without one.
        part = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS[arch] // tiles))) * config.block_n
        parts = triton.cdiv(stop_at, part)
    else:
        parts, part = tokens.shape
        stop_at = parts * part
        tokens = tokens.contiguous()
    filled = {
        "top": hidden.new_empty(parts, n, dtype=torch.float32),
        "mass": hidden.new_empty(parts, n, dtype=torch.float32),
        "spread": hidden.new_empty(parts, n, dtype=torch.float32),
        "value": hidden.new_empty(parts, n, top_k, dtype=torch.float32),
        "index": hidden.new_empty(parts, n, top_k, dtype=torch.int32),
    }
    args = {
        "hidden": hidden, "unembed": unembed, "bias": bias, "tokens": tokens, **filled,
        "stride_hidden_n": hidden.stride(0), "stride_hidden_d": hidden.stride(1),
        "stride_unembed_v": unembed.stride(0), "stride_unembed_d": unembed.stride(1),
        "stride_bias": 0 if bias is None else bias.stride(0),
        "n": n, "stop_at": stop_at, "part": part, "dim": dim, "cap": softcap,
    }  # fmt: skip
    meta = {
        "GATHER": tokens is not None, "BIAS": bias is not None, "SOFTCAP": softcap > 0, "TOP": top_k,
        "SLOTS": triton.next_power_of_2(max(top_k, 2)), "EVEN": dim % BLOCK_K[size] == 0,
        "PRECISION": "tf32x3" if size == 4 else "ieee",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": BLOCK_K[size],
    }  # fmt: skip
    return Launch(_lens_kernel, (tiles * parts,), args, meta, config.num_warps, config.num_stages), filled


def measure_lens(
    hidden: Tensor, unembed: Tensor, bias: Tensor | None, sets: Tensor | None, top_k: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy ``[N]``, set probabilities ``[N, S]``, ids and log probabilities ``[N, k]`` of the likeliest tokens.

    hidden ``[N, d]``, unembed ``[V, d]``, bias ``[V]``, sets ``[S, L]`` with -1 for no token, each id once.
    """
    launch, found = lens_launch(hidden, unembed, bias, None, top_k, softcap)
    launch.run()
    top = found["top"].amax(0)
    away = top - found["top"]
    moved = torch.where(found["mass"] > 0, away, 0.0)
    fade = torch.exp(-away)
    mass = (fade * found["mass"]).sum(0)
    spread = (fade * (found["spread"] + moved * found["mass"])).sum(0)
    logarithm = mass.log()
    entropy = logarithm + spread / mass

    set_prob = hidden.new_empty(hidden.shape[0], 0, dtype=torch.float32)
    if sets is not None:
        launch, part = lens_launch(hidden, unembed, bias, sets, 0, softcap)
        launch.run()
        # Relative to the maximum: lse itself is rounded to the precision of a logit, not of a probability.
        set_prob = (torch.exp(part["top"] - top) * part["mass"] / mass).T.contiguous()

    value = found["value"].transpose(0, 1).flatten(1)
    index = found["index"].transpose(0, 1).flatten(1)
    value, order = value.topk(top_k, -1)
    return entropy, set_prob, index.gather(-1, order).long(), value - top[:, None] - logarithm[:, None]


def audit_launches(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every launch worth compiling for `arch`, on meta tensors of a large vocabulary, with what must be true of it."""
    vocabulary, dim = 152_064, 4096
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        unembed = torch.empty(vocabulary, dim, dtype=dtype, device="meta")
        bias = torch.empty(vocabulary, dtype=dtype, device="meta")
        sets = torch.empty(8, 256, dtype=torch.int64, device="meta")
        # float16 is the code of bfloat16 with other names of instructions: one tile shows that.
        for n in (576,) if dtype == torch.float16 else (FEW_ROWS, 576):
            hidden = torch.empty(n, dim, dtype=dtype, device="meta")
            for name, top_k, tokens, softcap, offset in (
                ("entropy", 0, None, 0.0, None),
                ("entropy, softcap, bias", 0, None, 30.0, bias),
                ("top 32", 32, None, 0.0, None),
                ("top 32, softcap, bias", 32, None, 30.0, bias),
                ("token sets, softcap, bias", 0, sets, 30.0, bias),
            ):
                launch, _ = lens_launch(hidden, unembed, offset, tokens, top_k, softcap, arch)
                where = f"lens {str(dtype).removeprefix('torch.')} rows={n}"
                # One pass of the main loop is one step along d: what an element is here is a product's operand.
                yield f"{where} {name}", launch, {"matrix": "native", "wide": True}

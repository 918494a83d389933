"""What the attention backward needs to know of every query row, worked out once before its two passes.

* ``lse2 [B, H, P]``: the row's log-sum-exp in units of log2, +inf for a row without keys, so that its weights vanish;
* ``delta [B, H, P]``: ``<dz, z> - dlse``, what softmax pulls every logit of the row down by; 0 for a row without keys.

The pass over keys has rows in its inner loop, so it also gets what a row's table values make of these for each source
role, ``[B, H, R, P]``: its loop then reads two numbers a row, with routes as without. A gain g that is a positive
number of ordinary size is a factor of the weights: ``w = g p`` is the weight in the gradient of v, and with
``ds' = w (<dz, v> - delta / g)`` also all that the gradient of the logit needs. Other gains stay apart (`kept`).

* ``shift = lse2 - bias - log2 g``, +inf where the bias is -inf;
* ``steep`` and ``kink``: factor and magnitude, in units of log2 and of the scale that logits may lack in the loop;
* ``pull = delta / g``, times `steep` where there is no magnitude: then that is all there is between ds' and ds;
* ``kept``: the gain where it could not be taken in, else 1.

Rows are padded to P, a multiple of every tile, with the numbers of a row without keys: loops read them unchecked.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from ..routes import ROLES
from .arguments import dense_last, shared_stride, table_arguments
from .blocks import LOG2E, per_row
from .launch import Config, Launch, padded_dim
from .schedule import Schedule, mask_arguments, mask_kind

PADDING = 128
"""What every tile of rows divides."""
_BLOCK = 32
_CHUNK = 32
"""Columns that float32 tiles are multiplied in at a time."""


class Rows(NamedTuple):
    """Numbers per row, float32; ``lse2`` and ``delta`` ``[B, H, P]``, the rest ``[B, H, R, P]`` or None."""

    lse2: Tensor
    delta: Tensor
    shift: Tensor | None
    pull: Tensor | None
    kept: Tensor | None
    steep: Tensor | None
    kink: Tensor | None

    @property
    def padded(self) -> int:
        """P."""
        return self.lse2.shape[2]


@triton.jit
def ordinary(gain):
    """Gains that can be taken into the weights: positive, and neither so small nor so large that halves lose them."""
    return (gain > 1e-4) & (gain < 1e4)


@triton.jit(do_not_specialize=["n"])
def rows_kernel(
    z, grad_z, lse, grad_lse, lse2, delta, shift, pull, kept, steep, kink,
    query_roles, bias, factor, magnitude, gain,
    stride_z_b, stride_z_h, stride_z_n, stride_z_d, stride_dz_b, stride_dz_h, stride_dz_n, stride_dz_d,
    stride_lse_b, stride_lse_h, stride_lse_n, stride_dlse_b, stride_dlse_h, stride_dlse_n,
    stride_query_b, stride_bias_b, stride_factor_b, stride_magnitude_b, stride_gain_b,
    n, padded, heads, dim, lift,
    ROLES: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head; the grid is (tiles, heads, batch rows)."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = i.to(tl.int64)
    d = tl.arange(0, DIM)
    valid = i < n
    inside = valid[:, None] & (d < dim)[None, :]
    at_z = batch * stride_z_b + head * stride_z_h + row[:, None] * stride_z_n + d[None, :] * stride_z_d
    at_dz = batch * stride_dz_b + head * stride_dz_h + row[:, None] * stride_dz_n + d[None, :] * stride_dz_d
    output = tl.load(z + at_z, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad_z + at_dz, mask=inside, other=0.0).to(tl.float32)
    at_lse = batch * stride_lse_b + head * stride_lse_h + row * stride_lse_n
    at_dlse = batch * stride_dlse_b + head * stride_dlse_h + row * stride_dlse_n
    top = tl.load(lse + at_lse, mask=valid, other=float("-inf"))
    empty = top == float("-inf")
    top = tl.where(empty, float("inf"), top * LOG2E)
    down = tl.sum(output * slope, 1) - tl.load(grad_lse + at_dlse, mask=valid, other=0.0).to(tl.float32)
    down = tl.where(empty, 0.0, down)
    at = (batch * heads + head) * padded + i
    tl.store(lse2 + at, top)
    tl.store(delta + at, down)

    if ROLES > 0:
        dst = tl.load(query_roles + batch * stride_query_b + i, mask=valid, other=0).to(tl.int32)
        at_bias = batch * stride_bias_b + head * 36
        at_factor = batch * stride_factor_b + head * 36
        at_magnitude = batch * stride_magnitude_b + head * 36
        at_gain = batch * stride_gain_b + head * 36
        for source in tl.static_range(0, ROLES):
            at_role = ((batch * heads + head) * ROLES + source) * padded + i
            raised, lowered = top, down
            if bias is not None:
                raised -= per_row(bias, at_bias, dst, source, 0.0, valid) * LOG2E
            if gain is not None:
                g = per_row(gain, at_gain, dst, source, 1.0, valid)
                unit = tl.where(ordinary(g), g, 1.0)
                raised -= tl.log2(unit)
                lowered = lowered / unit
                tl.store(kept + at_role, tl.where(ordinary(g), 1.0, g))
            if factor is not None:
                a = per_row(factor, at_factor, dst, source, 1.0, valid) * lift
                tl.store(steep + at_role, a)
                if FOLD:
                    lowered *= a
            if magnitude is not None:
                c = per_row(magnitude, at_magnitude, dst, source, 0.0, valid) * tl.abs(lift)
                tl.store(kink + at_role, c)
            if shift is not None:
                tl.store(shift + at_role, raised)
            if pull is not None:
                tl.store(pull + at_role, lowered)


def rows_launch(
    problem: Problem, grad_z: Tensor, grad_lse: Tensor, z: Tensor, lse: Tensor, by_role: bool
) -> tuple[Launch, Rows]:
    """The launch that fills the Rows of a problem; those per source role when `by_role`, for the pass over keys."""
    batch, heads, n, dim = problem.q.shape
    padded = triton.cdiv(n, PADDING) * PADDING
    by_role = by_role and problem.routed

    def numbers(given: bool) -> Tensor | None:
        if not (by_role and given):
            return None
        return torch.empty(batch, heads, ROLES, padded, dtype=torch.float32, device=z.device)

    bias, factor, magnitude, gain = (
        t is not None for t in (problem.bias, problem.factor, problem.magnitude, problem.gain)
    )
    fold = factor and not magnitude
    lse2, delta = (torch.empty(batch, heads, padded, dtype=torch.float32, device=z.device) for _ in range(2))
    rows = Rows(
        lse2, delta, numbers(bias or gain), numbers(gain or fold), numbers(gain), numbers(factor), numbers(magnitude)
    )
    tables, _ = table_arguments(
        problem if by_role else problem._replace(bias=None, factor=None, magnitude=None, gain=None)
    )
    query_roles = dense_last(problem.query_roles, 1) if by_role else None
    args = {
        "z": z, "grad_z": grad_z, "lse": lse, "grad_lse": grad_lse, **rows._asdict(),
        "query_roles": query_roles, "stride_query_b": shared_stride(query_roles, 0), **tables,
        **_strides("bhnd", z=z, dz=grad_z), **_strides("bhn", lse=lse, dlse=grad_lse),
        "n": n, "padded": padded, "heads": heads, "dim": dim,
        "lift": (1.0 if problem.softcap else problem.scale) * math.log2(math.e),
    }  # fmt: skip
    meta = {"ROLES": ROLES if by_role else 0, "FOLD": fold, "BLOCK": _BLOCK, "DIM": padded_dim(dim)}
    return Launch(rows_kernel, (padded // _BLOCK, heads, batch), args, meta), rows


def arguments_of(
    problem: Problem, grad_z: Tensor, rows: Rows, schedule: Schedule | None, config: Config
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments and constants that the passes over queries and over keys have in common."""
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    heads, dim = q.shape[1], q.shape[3]
    values, lowest, at_mask = mask_arguments(mask, q.shape[0], heads)
    tables, given = table_arguments(problem)
    order, ends = schedule if schedule is not None else (None, None)
    roles = dense_last(problem.roles, 1) if problem.routed else None
    args: dict[str, Any] = {
        "q": q, "k": k, "v": v, "grad_z": grad_z, "order": order, "ends": ends, "roles": roles, "mask": values,
        **tables,
        **_strides("bhnd", q=q, k=k, v=v, dz=grad_z), "stride_role_b": shared_stride(roles, 0),
        "stride_order_b": 0 if order is None or order.shape[0] == 1 else order.shape[1] * order.shape[2],
        "stride_order_h": 0 if order is None or order.shape[1] == 1 else order.shape[2],
        **{f"stride_mask_{axis}": stride for axis, stride in zip("bhnk", at_mask, strict=True)}, "lowest": lowest,
        "n": q.shape[2], "keys": k.shape[2], "padded": rows.padded,
        "length": 0 if order is None else order.shape[3], "heads": heads, "share": heads // k.shape[1], "dim": dim,
        "window": problem.window, "scale": problem.scale, "cap": problem.softcap,
    }  # fmt: skip
    meta = {
        "SCHEDULED": schedule is not None, "ROUTED": problem.routed, **given, "MASK": mask_kind(mask),
        "CAUSAL": problem.causal, "WINDOW": problem.window > 0, "SOFTCAP": problem.softcap > 0,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee",
        "EVEN": padded_dim(dim) == dim, "CHUNK": min(padded_dim(dim), _CHUNK if q.dtype == torch.float32 else 256),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "DIM": padded_dim(dim),
    }  # fmt: skip
    return args, meta


def stages_of(config: Config, schedule: Schedule | None) -> int:
    """Pipeline stages of a pass: where tiles are read ahead, the list of them is read one stage before."""
    return config.num_stages + (schedule is not None and config.num_stages > 1)


def _strides(axes: str, **tensors: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{axis}": t.stride(x) for name, t in tensors.items() for x, axis in enumerate(axes)}

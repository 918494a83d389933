"""``act(gate) * up`` with neuron edits in one pass over memory, and what its gradient shares with it.

One program takes a tile of one row: it reads gate and up, computes in float32, rounds once and writes. The edits ride
along: each program looks through the (short) list of edited neurons, and only where one of them lies in its tile do a
few lanes compute that entry again, from the very lines this program has just read, and store it over the plain one
behind a barrier. So

- without edits the kernel has no trace of them (`index` is None at compile time), and with edits no element of a tile
  is compared with anything: a tile without edited neurons pays one load of the list, one vote and a jump;
- there is no second launch, no lookup table over F to build, and nothing to remember between calls: `index` and the
  values are read by the kernel itself, so refills are seen, also by a CUDA graph that replays;
- the price grows with the number of edits (32 or 128 of them a step), never with F. Editing a large share of all
  neurons works and is slow; a dense factor is a product with a row.

A second small kernel over the edited columns would cost a launch (in decode as much as the main kernel) and read
scattered lines of memory again; a map over F would cost two launches to build, or a memory of what index held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, Launch
from .mlp_acts import NAMES, activation
from .mlp_rows import addresses, same_rows

_CONFIGS = {2: Config(1, 2048, num_warps=4), 4: Config(1, 1024, num_warps=4)}
"""By bytes of an element. Bound by memory on every architecture: what counts is bytes in flight, 64 a thread here."""
_ROWS = 65535
"""Rows that fit one axis of a grid."""
_EDITS = (32, 128)
"""Edited neurons looked at per step: the smaller one that holds them all, else the larger."""


@triton.jit
def tile_of(outer_size, inner_size, width, BLOCK_F: tl.constexpr):
    """The tile of this program: its row, also as ``[outer, inner]``, the first column, and the width of the row.

    Rows are spread over two axes of the grid, which fit only so many each; past the last row the width is 0.
    """
    row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    there = row < outer_size * inner_size
    width = tl.where(there, width, 0)
    row = tl.where(there, row, 0)
    outer = row // inner_size
    inner = row - outer * inner_size
    return row.to(tl.int64), outer.to(tl.int64), inner.to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK_F, width


@triton.jit
def edit_lanes(index, index_b, index_f, outer, first, edits, BLOCK_E: tl.constexpr):
    """Neurons of edits ``first ...`` of one batch row; -1 past the end."""
    slots = first + tl.arange(0, BLOCK_E).to(tl.int64)
    return tl.load(index + outer * index_b + slots * index_f, mask=slots < edits, other=-1)


@triton.jit(
    do_not_specialize=[
        "outer_size", "inner_size", "edits", "index_b", "index_f",
        "scale_b", "scale_n", "scale_f", "shift_b", "shift_n", "shift_f",
        "replace_b", "replace_n", "replace_f", "mask_b", "mask_n", "mask_f",
    ]
)  # fmt: skip
def gated_activation_kernel(
    gate, gate_b, gate_n, gate_f,
    up, up_b, up_n, up_f,
    out, out_b, out_n, out_f,
    index, index_b, index_f,
    scale, scale_b, scale_n, scale_f,
    shift, shift_b, shift_n, shift_f,
    replace, replace_b, replace_n, replace_f,
    mask, mask_b, mask_n, mask_f,
    width, outer_size, inner_size, edits,
    ACT: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F columns of row ``[outer, inner]``."""
    EXACT: tl.constexpr = gate.dtype.element_ty == tl.float32
    _, outer, inner, start, width = tile_of(outer_size, inner_size, width, BLOCK_F)
    gate += outer * gate_b + inner * gate_n
    out += outer * out_b + inner * out_n
    if up is not None:
        up += outer * up_b + inner * up_n
    if index is not None:
        column = edit_lanes(index, index_b, index_f, outer, 0, edits, BLOCK_E)  # early: it is waited for

    lanes = tl.arange(0, BLOCK_F)
    inside = lanes < width - start
    at = start + lanes
    x = tl.load(gate + at * gate_f, mask=inside)
    if up is not None:
        u = tl.load(up + at * up_f, mask=inside)
        a = activation(x.to(tl.float32), ACT, EXACT) * u.to(tl.float32)
    else:
        a = activation(x.to(tl.float32), ACT, EXACT)
    tl.store(out + at * out_f, a.to(out.dtype.element_ty), mask=inside)

    if index is not None:
        tl.debug_barrier()  # the edited entries are stored after the plain ones of other threads
        end = tl.minimum(start + BLOCK_F, width)
        for first in range(0, edits, BLOCK_E):
            mine = (column >= start) & (column < end)
            if tl.max(mine.to(tl.int32), 0) > 0:  # most tiles have no edited neuron
                edit = first + tl.arange(0, BLOCK_E).to(tl.int64)
                e = activation(tl.load(gate + column * gate_f, mask=mine).to(tl.float32), ACT, EXACT)
                if up is not None:
                    e *= tl.load(up + column * up_f, mask=mine).to(tl.float32)
                if scale is not None:
                    by = scale + outer * scale_b + inner * scale_n
                    e *= tl.load(by + edit * scale_f, mask=mine).to(tl.float32)
                if shift is not None:
                    by = shift + outer * shift_b + inner * shift_n
                    e += tl.load(by + edit * shift_f, mask=mine).to(tl.float32)
                if mask is not None:
                    chosen = tl.load(mask + outer * mask_b + inner * mask_n + edit * mask_f, mask=mine, other=0) != 0
                    value = replace + outer * replace_b + inner * replace_n + edit * replace_f
                    e = tl.where(chosen, tl.load(value, mask=mine & chosen).to(tl.float32), e)
                tl.store(out + column * out_f, e.to(out.dtype.element_ty), mask=mine)
            column = edit_lanes(index, index_b, index_f, outer, first + BLOCK_E, edits, BLOCK_E)


def index_addresses(index: Tensor | None) -> tuple[dict[str, Any], int]:
    """Kernel arguments of ``index [n]`` or ``[B|1, n]``, and the number of edits a step looks at."""
    if index is None:
        return {"index": None, "index_b": 0, "index_f": 0, "edits": 0}, _EDITS[0]
    n = index.shape[-1]
    outer = index.stride(0) if index.dim() == 2 and index.shape[0] > 1 else 0
    arguments = {"index": index, "index_b": outer, "index_f": index.stride(-1), "edits": n}
    return arguments, next((block for block in _EDITS if n <= block), _EDITS[-1])


def tiles_of(tensor: Tensor, configs: dict[int, Config]) -> tuple[Config, tuple[int, int, int], dict[str, int]]:
    """For a tensor ``[outer, inner, width]``: configuration, narrowed to its width, grid, and sizes as arguments."""
    config = configs[tensor.element_size()]
    outer, inner, width = tensor.shape
    block = min(config.block_n, max(128, triton.next_power_of_2(width)))
    planes = triton.cdiv(outer * inner, _ROWS)
    grid = (triton.cdiv(width, block), triton.cdiv(outer * inner, planes), planes)
    return config._replace(block_n=block), grid, {"width": width, "outer_size": outer, "inner_size": inner}


def gated_activation_launch(
    gate: Tensor,
    up: Tensor | None,
    out: Tensor,
    index: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    replace: Tensor | None = None,
    mask: Tensor | None = None,
    act: str = "silu",
    arch: str | None = None,
) -> Launch:
    """The launch that writes `out` ``[B, N, F]`` from gate and up of that shape, alike on every architecture."""
    config, grid, sizes = tiles_of(gate, _CONFIGS)
    indexed, block_e = index_addresses(index)
    if replace is None or mask is None:
        replace = mask = None
    return Launch(
        gated_activation_kernel,
        grid,
        {
            **addresses("gate", gate), **addresses("up", up), **addresses("out", out), **indexed,
            **addresses("scale", scale), **addresses("shift", shift),
            **addresses("replace", replace), **addresses("mask", mask),
            **sizes,
        },
        {"ACT": NAMES[act], "BLOCK_F": config.block_n, "BLOCK_E": block_e},
        num_warps=config.num_warps,
    )  # fmt: skip


def activate(
    gate: Tensor,
    up: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    replace: Tensor | None,
    mask: Tensor | None,
    act: str,
) -> Tensor:
    """``a = act(gate) * up`` with edited columns, contiguous, in gate's shape and dtype; rounded once."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    for x, u, o in same_rows([gate, up, out], edited=index is not None):
        gated_activation_launch(x, u, o, index, scale, shift, replace, mask, act).run()  # type: ignore[arg-type]
    return out


@dataclasses.dataclass(frozen=True)
class AuditProblem:
    """A problem to compile, on the meta device; the fields are the arguments of `gated_activation_launch`."""

    name: str
    gate: Tensor
    up: Tensor | None
    index: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    replace: Tensor | None = None
    mask: Tensor | None = None
    act: str = "silu"

    @property
    def expects(self) -> dict[str, bool]:
        """Loads of 16 bytes; the few narrow ones of edited entries would outnumber them in a count."""
        return {"wide": self.index is None}


def _audit_problem(dtype: torch.dtype, width: int, gated: bool, edits: str, act: str, n: int = 32) -> AuditProblem:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    gate = empty(4, 512, width, dtype=dtype)
    kind, many = "gated" if gated else "ungated", "" if n == 32 else f" of {n}"
    name = f"{str(dtype).removeprefix('torch.')} F={width} {kind} {act}, {edits}{many}"
    problem = AuditProblem(name, gate, torch.empty_like(gate) if gated else None, act=act)
    if edits != "no edits":
        problem = dataclasses.replace(problem, index=empty(n, dtype=torch.int64), scale=empty(4, 1, n))
    if edits == "all edits":
        mask = empty(4, 1, n, dtype=torch.bool)
        problem = dataclasses.replace(problem, shift=empty(4, 1, n), replace=empty(4, 1, n), mask=mask)
    return problem


def audit_problems() -> Iterator[AuditProblem]:
    """Shapes of Llama 3 (F = 14336), and of Llama 2 at 7B (11008, no multiple of a tile) for every activation."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for gated in (True, False):
            for edits in ("no edits", "scale", "all edits"):
                yield _audit_problem(dtype, 14336, gated, edits, "silu" if gated else "gelu")
    for act in {inside: name for name, inside in NAMES.items()}.values():
        yield _audit_problem(torch.bfloat16, 11008, True, "scale", act)
    yield _audit_problem(torch.bfloat16, 14336, True, "all edits", "silu", n=200)


def audit_launches(arch: str) -> Iterator[tuple[str, Launch, dict[str, bool]]]:
    """Every launch worth compiling for an architecture, on meta tensors."""
    for p in audit_problems():
        out = torch.empty_like(p.gate)
        launch = gated_activation_launch(
            p.gate, p.up, out, p.index, p.scale, p.shift, p.replace, p.mask, p.act, arch
        )  # fmt: skip
        yield f"gated_activation {p.name}", launch, p.expects

"""Gradients of the fused gated activation: of gate and up in one pass, of the edits' values on the way.

The pass is built like the forward one (`emokernels.fused.mlp`): a plain tile, then the edited entries of the tile over
it. An edited entry belongs to exactly one program, which also writes what this row contributes to the gradients of
scale, shift and replace into ``[B, N, n]`` float32; n is small, so that costs n / F of the pass. Where a value was
shared by rows or positions, a sum over them follows. Nothing is accumulated with atomics: the result is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, Launch
from .mlp import audit_problems, edit_lanes, index_addresses, tile_of, tiles_of
from .mlp_acts import NAMES, activation, activation_and_slope
from .mlp_rows import addresses, same_rows

_CONFIGS = {2: Config(1, 1024, num_warps=4), 4: Config(1, 512, num_warps=4)}
"""By bytes of an element: one load of 16 bytes a thread of each tensor. Twice that in float32 spills on sm_80."""


@triton.jit(
    do_not_specialize=[
        "outer_size", "inner_size", "edits", "index_b", "index_f",
        "scale_b", "scale_n", "scale_f", "mask_b", "mask_n", "mask_f",
    ]
)  # fmt: skip
def gated_activation_backward_kernel(
    grad, grad_b, grad_n, grad_f,
    gate, gate_b, gate_n, gate_f,
    up, up_b, up_n, up_f,
    dgate, dgate_b, dgate_n, dgate_f,
    dup, dup_b, dup_n, dup_f,
    index, index_b, index_f,
    scale, scale_b, scale_n, scale_f,
    mask, mask_b, mask_n, mask_f,
    dscale, dshift, dreplace,
    width, outer_size, inner_size, edits,
    ACT: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F columns of row ``[outer, inner]``; absent outputs are not computed."""
    EXACT: tl.constexpr = gate.dtype.element_ty == tl.float32
    row, outer, inner, start, width = tile_of(outer_size, inner_size, width, BLOCK_F)
    grad += outer * grad_b + inner * grad_n
    gate += outer * gate_b + inner * gate_n
    if up is not None:
        up += outer * up_b + inner * up_n
    if dgate is not None:
        dgate += outer * dgate_b + inner * dgate_n
    if dup is not None:
        dup += outer * dup_b + inner * dup_n
    if index is not None:
        column = edit_lanes(index, index_b, index_f, outer, 0, edits, BLOCK_E)

    if dgate is not None or dup is not None:
        lanes = tl.arange(0, BLOCK_F)
        inside = lanes < width - start
        at = start + lanes
        g = tl.load(grad + at * grad_f, mask=inside)
        x = tl.load(gate + at * gate_f, mask=inside)
        if dgate is not None:
            h, slope = activation_and_slope(x.to(tl.float32), ACT, EXACT)
            if up is not None:
                slope *= tl.load(up + at * up_f, mask=inside).to(tl.float32)
            tl.store(dgate + at * dgate_f, (g.to(tl.float32) * slope).to(dgate.dtype.element_ty), mask=inside)
        else:
            h = activation(x.to(tl.float32), ACT, EXACT)
        if dup is not None:
            tl.store(dup + at * dup_f, (g.to(tl.float32) * h).to(dup.dtype.element_ty), mask=inside)

    if index is not None:
        tl.debug_barrier()  # the edited entries are stored after the plain ones of other threads
        end = tl.minimum(start + BLOCK_F, width)
        for first in range(0, edits, BLOCK_E):
            mine = (column >= start) & (column < end)
            if tl.max(mine.to(tl.int32), 0) > 0:  # most tiles have no edited neuron
                edit = first + tl.arange(0, BLOCK_E).to(tl.int64)
                part = row * edits + edit
                kept = tl.load(grad + column * grad_f, mask=mine).to(tl.float32)
                xe = tl.load(gate + column * gate_f, mask=mine).to(tl.float32)
                plain, rise = activation_and_slope(xe, ACT, EXACT)  # act(gate) before up, and the slope of the entry
                entry = plain
                if up is not None:
                    ue = tl.load(up + column * up_f, mask=mine).to(tl.float32)
                    entry = plain * ue
                    rise *= ue
                if mask is not None:
                    chosen = tl.load(mask + outer * mask_b + inner * mask_n + edit * mask_f, mask=mine, other=0) != 0
                    if dreplace is not None:
                        tl.store(dreplace + part, tl.where(chosen, kept, 0.0), mask=mine)
                    kept = tl.where(chosen, 0.0, kept)
                if dshift is not None:
                    tl.store(dshift + part, kept, mask=mine)
                if dscale is not None:
                    tl.store(dscale + part, kept * entry, mask=mine)
                if scale is not None:
                    by = scale + outer * scale_b + inner * scale_n
                    kept *= tl.load(by + edit * scale_f, mask=mine).to(tl.float32)
                if dgate is not None:
                    tl.store(dgate + column * dgate_f, (kept * rise).to(dgate.dtype.element_ty), mask=mine)
                if dup is not None:
                    tl.store(dup + column * dup_f, (kept * plain).to(dup.dtype.element_ty), mask=mine)
            column = edit_lanes(index, index_b, index_f, outer, first + BLOCK_E, edits, BLOCK_E)


def gated_activation_backward_launch(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    dgate: Tensor | None,
    dup: Tensor | None,
    index: Tensor | None = None,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    dscale: Tensor | None = None,
    dshift: Tensor | None = None,
    dreplace: Tensor | None = None,
    act: str = "silu",
    arch: str | None = None,
) -> Launch:
    """The launch that writes those of dgate and dup ``[B, N, F]``, dscale, dshift and dreplace that are given.

    The last three are ``[B, N, n]`` float32, contiguous: one part per row, to be summed where the value was shared.
    """
    config, grid, sizes = tiles_of(gate, _CONFIGS)
    indexed, block_e = index_addresses(index)
    return Launch(
        gated_activation_backward_kernel,
        grid,
        {
            **addresses("grad", grad), **addresses("gate", gate), **addresses("up", up),
            **addresses("dgate", dgate), **addresses("dup", dup), **indexed,
            **addresses("scale", scale), **addresses("mask", mask),
            "dscale": dscale, "dshift": dshift, "dreplace": dreplace,
            **sizes,
        },
        {"ACT": NAMES[act], "BLOCK_F": config.block_n, "BLOCK_E": block_e},
        num_warps=config.num_warps,
    )  # fmt: skip


def gradients(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    replace: Tensor | None,
    mask: Tensor | None,
    act: str,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Those gradients of gate, up, scale, shift and replace that are wanted; float32 inside, rounded once."""
    if replace is None or mask is None:
        replace = mask = None
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format) if wanted[0] else None
    dup = None
    if up is not None and wanted[1]:
        dup = torch.empty_like(up, memory_format=torch.contiguous_format)
    sums: list[Tensor | None] = []
    for value, want in zip((scale, shift, replace), wanted[2:], strict=True):
        part = None
        if index is not None and value is not None and want:
            part = gate.new_empty(gate.shape[0], gate.shape[1], index.shape[-1], dtype=torch.float32)
        sums.append(part)
    if any(t is not None for t in (dgate, dup, *sums)):
        for g, x, u, dx, du in same_rows([grad, gate, up, dgate, dup], edited=index is not None):
            gated_activation_backward_launch(
                g, x, u, dx, du, index, scale, mask, sums[0], sums[1], sums[2], act  # type: ignore[arg-type]
            ).run()  # fmt: skip
    for i, value in enumerate((scale, shift, replace)):
        part = sums[i]
        if part is not None and value is not None:
            sums[i] = part.sum_to_size(value.shape).to(value.dtype)
    return (dgate, dup, *sums)


def audit_launches(arch: str) -> Iterator[tuple[str, Launch, dict[str, bool]]]:
    """Every launch worth compiling for an architecture, on meta tensors."""
    for p in audit_problems():
        part = None
        if p.index is not None and p.mask is not None:
            part = p.gate.new_empty(*p.gate.shape[:2], p.index.shape[0], dtype=torch.float32)
        dgate, dup = torch.empty_like(p.gate), None if p.up is None else torch.empty_like(p.up)
        launch = gated_activation_backward_launch(
            p.gate, p.gate, p.up, dgate, dup, p.index, p.scale, p.mask, part, part, part, p.act, arch
        )
        name = f"gated_activation_backward {p.name}{'' if part is None else ' and gradients of their values'}"
        yield name, launch, p.expects

"""What the audit compiles of the attention forward: every configuration, with what users combine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..heads import HeadEdits
from ..problem import Problem
from ..routes import ROLES
from .attention import Tiles, forward_launch, needs_schedule, tiles_for
from .launch import Launch
from .schedule import schedule_launches

_TABLES = ("bias", "factor", "magnitude", "gain")


class _Feature(NamedTuple):
    """A way to call attention: tables, mask, the rest; `free` when it must cost nothing per element."""

    name: str
    tables: tuple[str, ...] = ()
    mask: torch.dtype | None = None
    softcap: float = 0.0
    window: int = 0
    edits: bool = False
    free: bool = False


_PLAIN = _Feature("plain")
_ALWAYS = (
    _PLAIN,
    _Feature("bias+gain", ("bias", "gain"), free=True),
    _Feature("all tables, softcap, bool mask", _TABLES, torch.bool, softcap=30.0),
    _Feature("bias+gain, additive mask, head edits", ("bias", "gain"), torch.float32, edits=True, free=True),
)
_AT_128 = (
    _Feature("bias", ("bias",), free=True),
    _Feature("gain", ("gain",), free=True),
    _Feature("bool mask", (), torch.bool, free=True),
    _Feature("bias+gain, bool mask", ("bias", "gain"), torch.bool, free=True),
    _Feature("softcap, window", (), softcap=30.0, window=1024),
)


def _problem(dtype: torch.dtype, dim: int, feature: _Feature) -> tuple[Problem, HeadEdits | None]:
    """32 heads on 8, two long prompts, q in the layout of a projection."""
    batch, heads, key_heads, n = 2, 32, 8, 4096

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q = empty(batch, n, heads, dim, dtype=dtype).transpose(1, 2)
    k, v = (empty(batch, key_heads, n, dim, dtype=dtype) for _ in range(2))
    table, roles = empty(1, heads, ROLES, ROLES), empty(batch, n, dtype=torch.uint8)
    given: dict[str, Any] = {name: table if name in feature.tables else None for name in _TABLES}
    problem = Problem(
        q=q, k=k, v=v, roles=roles, query_roles=roles, **given,
        mask=None if feature.mask is None else empty(batch, 1, n, n, dtype=feature.mask), lengths=None,
        causal=True, scale=dim**-0.5, window=feature.window, softcap=feature.softcap,
    )  # fmt: skip
    if not feature.edits:
        return problem, None
    values, replaced = empty(batch, n, heads, dim, dtype=dtype), empty(batch, n, heads, dtype=torch.bool)
    return problem, HeadEdits(scale=empty(batch, 1, heads), shift=values, replace=values, mask=replaced)


def _launches(
    dtype: torch.dtype, dim: int, feature: _Feature, tiles_of: Callable[[Problem, HeadEdits | None], Tiles]
) -> tuple[Tiles, list[Launch], Launch]:
    """The tiles, the launches that make the schedule, and that of the kernel."""
    problem, edits = _problem(dtype, dim, feature)
    tiles = tiles_of(problem, edits)
    before: list[Launch] = []
    schedule = None
    if needs_schedule(problem):
        before, schedule = schedule_launches(problem, tiles.block_m, tiles.block_n)
    z = torch.empty_like(problem.q)
    lse = z.new_empty(z.shape[:3], dtype=torch.float32)
    return tiles, before, forward_launch(problem, z, lse, schedule, tiles, edits)


def audit_launches(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every launch worth compiling for an architecture, on meta tensors; see `emokernels.audit.kernels.Expects`."""
    schedules: dict[str, Launch] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # float16 is the code of bfloat16 with other names of instructions: one dimension shows that.
        for dim in (128,) if dtype == torch.float16 else (64, 128, 256):
            where = f"forward {str(dtype).removeprefix('torch.')} d={dim}"
            plain: dict[tuple[int, ...], str] = {}
            for feature in (*_ALWAYS, *(_AT_128 if dim == 128 and dtype == torch.bfloat16 else ())):
                tiles, before, launch = _launches(
                    dtype, dim, feature, lambda problem, heads: tiles_for(problem, heads, arch)
                )
                expects: dict[str, Any] = {"matrix": "native" if dtype != torch.float32 else True, "wide": True}
                if feature == _PLAIN:
                    plain[tiles[:3]] = f"{where} plain"
                if feature.free:
                    if tiles[:3] not in plain:
                        plain[tiles[:3]] = f"{where} plain, in tiles of {tiles.block_m}x{tiles.block_n}"
                        _, _, bare = _launches(dtype, dim, _PLAIN, lambda problem, heads, tiles=tiles: tiles)  # type: ignore[misc]
                        yield plain[tiles[:3]], bare, expects
                    expects = expects | {"plain": plain[tiles[:3]], "free": True}
                yield f"{where} {feature.name}", launch, expects
                for step in before:
                    schedules.setdefault(_schedule_name(step), step)
    yield from ((name, launch, {}) for name, launch in schedules.items())


def _schedule_name(launch: Launch) -> str:
    """What tells the small launches before the kernel apart: most configurations share them."""
    meta = launch.meta
    if "SETS" in meta:
        return f"schedule: sort {meta['BLOCKS']} blocks into {meta['SETS']} sets"
    given = ["roles"] * meta["ROUTED"] + [f"{meta['MASK']} mask"] * (meta["MASK"] != "none")
    return f"schedule: classify {meta['BLOCK_M']}x{meta['BLOCK_N']} {', '.join(given)}"

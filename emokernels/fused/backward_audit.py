"""What the audit compiles of the attention backward: every configuration, with what users combine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..problem import Problem
from ..routes import ROLES
from .backward import TABLES, over_keys, over_queries
from .backward_rows import rows_launch
from .launch import Launch


class _Feature(NamedTuple):
    """A way to call attention, the tables whose gradient is wanted, `free` when it must cost nothing per element."""

    name: str
    tables: tuple[str, ...] = ()
    learnt: tuple[str, ...] = ()
    mask: torch.dtype | None = None
    softcap: float = 0.0
    window: int = 0
    free: bool = False


_ALWAYS = (
    _Feature("plain"),
    _Feature("bias+gain", ("bias", "gain"), free=True),
    _Feature("bias+gain learnt", ("bias", "gain"), ("bias", "gain")),
    _Feature("all tables learnt, softcap, bool mask", TABLES, TABLES, torch.bool, softcap=30.0),
)
_AT_128 = (
    _Feature("bias", ("bias",), free=True),
    _Feature("scale", ("factor",), free=True),
    _Feature("bool mask", (), mask=torch.bool, free=True),
    _Feature("bias+gain, additive mask", ("bias", "gain"), mask=torch.float32, free=True),
    _Feature("softcap, window", (), softcap=30.0, window=1024),
)


def _problem(dtype: torch.dtype, dim: int, feature: _Feature) -> tuple[Problem, torch.Tensor]:
    """A problem and a gradient of z on the "meta" device: 32 heads on 8, one long prompt, in HF's layout."""
    batch, heads, key_heads, n = 2, 32, 8, 4096

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, grad_z = (empty(batch, n, heads, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = (empty(batch, key_heads, n, dim, dtype=dtype) for _ in range(2))
    table, roles = empty(1, heads, ROLES, ROLES), empty(batch, n, dtype=torch.uint8)
    given: dict[str, Any] = {name: table if name in feature.tables else None for name in TABLES}
    problem = Problem(
        q=q, k=k, v=v, roles=roles, query_roles=roles, **given,
        mask=None if feature.mask is None else empty(batch, 1, n, n, dtype=feature.mask), lengths=None,
        causal=True, scale=dim**-0.5, window=feature.window, softcap=feature.softcap,
    )  # fmt: skip
    return problem, grad_z


def audit_launches(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every launch worth compiling for an architecture, on meta tensors; see `emokernels.audit.kernels.Expects`."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # float16 is the code of bfloat16 with other names of instructions: one dimension shows that.
        for dim in (128,) if dtype == torch.float16 else (64, 128, 256):
            where = f"{str(dtype).removeprefix('torch.')} d={dim}"
            expects: dict[str, Any] = {"matrix": "native" if dtype != torch.float32 else True}
            for feature in (*_ALWAYS, *(_AT_128 if dim == 128 and dtype == torch.bfloat16 else ())):
                yield from _launches(arch, dtype, dim, feature, where, expects)


def _launches(
    arch: str, dtype: torch.dtype, dim: int, feature: _Feature, where: str, expects: dict[str, Any]
) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    problem, grad_z = _problem(dtype, dim, feature)
    prepare, rows = rows_launch(problem, grad_z, grad_z[..., 0], grad_z, grad_z[..., 0].float(), by_role=True)
    yield f"backward rows {where} {feature.name}", prepare, {}
    # At 256 tiles are so small that the list of blocks itself shows.
    free = {"free": True} if feature.free and dim < 256 else {}
    learnt = [name in feature.learnt for name in TABLES]
    queries, _ = over_queries(problem, grad_z, rows, problem.q, learnt, arch)
    plain = {"plain": f"backward queries {where} plain"} if free else {}
    yield f"backward queries {where} {feature.name}", queries[-1], {**expects, **plain, **free}
    if feature.learnt:
        alone, _ = over_queries(problem, grad_z, rows, None, learnt, arch)
        yield f"backward queries {where} {feature.name}, only tables", alone[-1], expects
        if not feature.softcap:
            return  # the pass over keys does not know what is learnt
    for launch in over_keys(problem, grad_z, rows, problem.k, problem.v, arch):
        meta = launch.meta
        if "DK" not in meta:
            continue
        of = "keys" if meta["DK"] and meta["DV"] else "keys dk" if meta["DK"] else "keys dv"
        plain = {"plain": f"backward {of} {where} plain"} if free else {}
        yield f"backward {of} {where} {feature.name}", launch, {**expects, **plain, **free}
    if problem.mask is not None and dtype == torch.bfloat16 and dim == 128:
        sort = list(over_keys(problem, grad_z, rows, problem.k, problem.v, arch))[1]
        yield f"backward schedule sort {feature.name}", sort, {}

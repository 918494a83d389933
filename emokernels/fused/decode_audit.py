"""What the audit compiles of decode steps and shared prefixes: every tile, plain and with what users combine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..heads import HeadEdits
from ..problem import Problem
from ..routes import ROLES
from .decode import Keys, launches_of
from .launch import Launch
from .prefix import runs_of

_KEY_HEADS = 8
_TABLES = ("bias", "factor", "magnitude", "gain")


class _Feature(NamedTuple):
    """A way to call attention. `mask` is the dtype of a mask, with a row for every head when `per_row` is set."""

    name: str
    tables: tuple[str, ...] = ()
    mask: torch.dtype | None = None
    edits: bool = False
    per_row: bool = False
    n: int = 1
    window: int = 0
    softcap: float = 0.0


_PLAIN = _Feature("plain")
_ROUTED = _Feature("bias+gain", ("bias", "gain"))
_EVERYTHING = _Feature("all tables, bool mask, head edits", _TABLES, torch.bool, edits=True)
_PER_ROW = _Feature("all tables, masks and roles per row", _TABLES, torch.float32, edits=True, per_row=True)
_FOUR = _Feature("4 queries, window, softcap", ("gain",), n=4, window=1024, softcap=30.0)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _problem(
    dtype: torch.dtype, dim: int, share: int, feature: _Feature, batch: int, keys: int, columns: int
) -> Problem:
    """A step over a static cache of `keys` keys, which end at column `columns`."""
    heads, n = _KEY_HEADS * share, feature.n
    q = _empty(batch, n, heads, dim, dtype=dtype).transpose(1, 2)
    k, v = (_empty(batch, _KEY_HEADS, keys, dim, dtype=dtype) for _ in range(2))
    rows = batch if feature.per_row else 1
    roles, query_roles = (_empty(rows, x, dtype=torch.uint8) for x in (columns, n))
    table = _empty(batch, heads, ROLES, ROLES)
    mask = None
    if feature.mask is not None:
        mask = _empty(rows, heads if feature.per_row else 1, n, columns, dtype=feature.mask)
    given: dict[str, Any] = {name: table if name in feature.tables else None for name in _TABLES}
    return Problem(
        q=q, k=k, v=v, roles=roles, query_roles=query_roles, **given, mask=mask,
        lengths=_empty(batch, dtype=torch.int32), causal=True, scale=dim**-0.5, window=feature.window,
        softcap=feature.softcap,
    )  # fmt: skip


def _edits(problem: Problem, feature: _Feature) -> HeadEdits | None:
    if not feature.edits:
        return None
    batch, heads, n, dim = problem.q.shape
    values = _empty(batch, n, heads, dim)
    return HeadEdits(
        scale=_empty(batch, n, heads), shift=values, replace=values, mask=_empty(batch, n, heads, dtype=torch.bool)
    )


def _decode(arch: str, dtype: torch.dtype, dim: int, share: int, feature: _Feature) -> list[Launch]:
    problem = _problem(dtype, dim, share, feature, 1, 8192, 8192)
    keys = Keys(problem.k, problem.v, 0, 8192, False)
    return launches_of(problem, [keys], _edits(problem, feature), feature.edits, arch)[0]


def _prefix(arch: str, dtype: torch.dtype, dim: int, share: int, batch: int, feature: _Feature) -> list[Launch]:
    problem = _problem(dtype, dim, share, feature, batch, 64, 2112)
    shared = _empty(1, _KEY_HEADS, 2048, dim, dtype=dtype)
    runs = runs_of(problem, shared, shared)
    return launches_of(problem, runs, _edits(problem, feature), feature.edits, arch)[0]


def _expects(launch: Launch, feature: _Feature) -> dict[str, Any]:
    """Products of float32 in 256 dimensions go without tensor cores; loads are wide where only keys and values are."""
    emulated = launch.meta["DIM"] == 256 and launch.args["q"].dtype == torch.float32
    if emulated:
        return {"matrix": False, "note": "float32 without tensor cores"}
    return {"matrix": True, "wide": feature == _PLAIN}


_ROWS = {
    torch.bfloat16: ((8, 1), (16, 2), (8, 8), (256, 4)),
    torch.float16: ((256, 4),),
    torch.float32: ((8, 1), (256, 4)),
}
"""Batch rows and heads of a key head that share a prefix: every tile that there is."""


def audit_launches(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every launch worth compiling for an architecture, on meta tensors; see `emokernels.audit.kernels.Expects`."""
    for dtype, rows in _ROWS.items():
        # float16 is nearly the code of bfloat16: one dimension shows that.
        for dim in (128,) if dtype == torch.float16 else (64, 128, 256):
            where = f"{str(dtype).removeprefix('torch.')} d={dim}"
            special = (_ROUTED, _PER_ROW, _FOUR) if dim == 128 and dtype == torch.bfloat16 else (_PER_ROW,)
            for share in (1, 4, 8):
                plain = f"decode {where} {share} heads {_PLAIN.name}"
                for feature in (_PLAIN, _EVERYTHING, *(special if share == 8 else ())):
                    step, *merge = _decode(arch, dtype, dim, share, feature)
                    expects = _expects(step, feature) | ({} if feature == _PLAIN else {"plain": plain})
                    yield f"decode {where} {share} heads {feature.name}", step, expects
                    if share == 1 and dtype == torch.bfloat16:
                        yield from ((f"merge {where} {feature.name}", launch, {}) for launch in merge)
            for batch, share in rows:
                for feature in (_PLAIN, _EVERYTHING):
                    launch = _prefix(arch, dtype, dim, share, batch, feature)[0]
                    yield f"prefix {where} {batch * share} rows {feature.name}", launch, _expects(launch, feature)

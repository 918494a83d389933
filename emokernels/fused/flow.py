"""Attention flow in Triton: which tile serves which problem, the launch, and what the audit compiles of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..errors import message
from ..problem import Problem
from ..routes import ROLES
from .arguments import shared_stride
from .flow_kernel import flow_kernel
from .launch import ARCHITECTURES, Config, Launch, arch_of, padded_dim
from .schedule import mask_arguments, mask_kind

_FLOAT32 = {
    "sm_80": (Config(64, 32, 8, 3), 32),
    "sm_90": (Config(64, 64, 8, 2), 32),
    "sm_100": (Config(64, 64, 8, 2), 32),
}
_NARROW = dict.fromkeys(ARCHITECTURES, (Config(128, 64, 8, 3), 0))

CONFIGS: dict[tuple[int, int, bool], dict[str, tuple[Config, int]]] = {
    (2, 64, False): _NARROW,
    (2, 64, True): {**_NARROW, "sm_80": (Config(128, 32, 8, 3), 0)},
    (2, 128, False): _NARROW,
    (2, 128, True): {
        "sm_80": (Config(128, 32, 8, 3), 0),
        "sm_90": (Config(128, 64, 8, 3), 0),
        "sm_100": (Config(128, 32, 8, 3), 0),
    },
    (2, 256, False): {
        "sm_80": (Config(128, 32, 8, 2), 0),
        "sm_90": (Config(128, 64, 8, 2), 0),
        "sm_100": (Config(128, 64, 8, 2), 0),
    },
    (2, 256, True): {
        "sm_80": (Config(64, 64, 8, 2), 0),
        "sm_90": (Config(128, 64, 8, 2), 64),
        "sm_100": (Config(128, 64, 8, 2), 64),
    },
    **{(4, dim, saliency): _FLOAT32 for dim in (64, 128, 256) for saliency in (False, True)},
}
"""By bytes per element, padded head dimension (those below 64 count as 64) and whether the saliency is asked for; then
by architecture. The number is how much of the head dimension is multiplied at a time where a row does not fit into the
registers, 0 for all of it. The largest tiles without spills when every feature is on."""


def flow_launch(
    problem: Problem, grad_z: Tensor | None, arch: str | None = None, chosen: tuple[Config, int] | None = None
) -> tuple[Launch, Tensor]:
    """The launch, and the partial sums ``[B, H, tiles, R, R]`` float32 that it fills."""
    q, k, roles, query_roles = problem.q, problem.k, problem.roles, problem.query_roles
    if roles is None or query_roles is None:
        raise ValueError(message("roles", "role tensors", None, "Pass roles=[B|1, K] uint8."))
    batch, heads, n, dim = q.shape
    width = padded_dim(dim)
    tile = (q.element_size(), max(width, 64), grad_z is not None)
    config, chunk = chosen or CONFIGS[tile][arch_of(q, arch)]
    tiles = triton.cdiv(n, config.block_m)
    out = torch.zeros(batch, heads, tiles, ROLES, ROLES, dtype=torch.float32, device=q.device)
    values, lowest, at_mask = mask_arguments(problem.mask, batch, heads)
    tables = {
        name: None if table is None else table.to(torch.float32).contiguous()
        for name, table in (
            ("bias", problem.bias),
            ("factor", problem.factor),
            ("magnitude", problem.magnitude),
            ("gain", problem.gain),
        )
    }
    v = None if grad_z is None else problem.v
    args = {
        "q": q, "k": k, "v": v, "grad": grad_z, "roles": roles, "query_roles": query_roles, **tables, "mask": values,
        "out": out,
        **{
            f"stride_{name}_{axis}": 0 if t is None else t.stride(x)
            for name, t in (("q", q), ("k", k), ("v", v), ("grad", grad_z))
            for x, axis in enumerate("bhnd")
        },
        "stride_role_b": shared_stride(roles, 0), "stride_role_k": roles.stride(1),
        "stride_query_b": shared_stride(query_roles, 0), "stride_query_n": query_roles.stride(1),
        **{f"stride_{name}_b": shared_stride(table, 0) for name, table in tables.items()},
        **{f"stride_mask_{axis}": stride for axis, stride in zip("bhnk", at_mask, strict=True)},
        "lowest": lowest, "n": n, "keys": k.shape[2], "heads": heads, "share": heads // k.shape[1], "dim": dim,
        "window": problem.window, "scale": problem.scale, "cap": problem.softcap,
    }  # fmt: skip
    meta = {
        "SALIENCY": grad_z is not None,
        **{name.upper(): table is not None for name, table in tables.items()},
        "MASK": mask_kind(problem.mask), "CAUSAL": problem.causal, "WINDOW": problem.window > 0,
        "SOFTCAP": problem.softcap > 0, "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee",
        "EVEN": width == dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "DIM": width,
        "CHUNK": min(chunk or width, width),
    }  # fmt: skip
    return Launch(flow_kernel, (tiles, heads, batch), args, meta, config.num_warps, config.num_stages), out


def measure_flow(problem: Problem, grad_z: Tensor | None) -> Tensor:
    """Mass, or with `grad_z` saliency, per (destination role, source role): ``[B, H, R, R]`` float32."""
    launch, partial = flow_launch(problem, grad_z)
    launch.run()
    return partial.sum(2)


def audit_launches(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every launch worth compiling for `arch`, on meta tensors, with what must be true of it."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # float16 is the code of bfloat16 with other names of instructions, and float32 goes through the head dimension
        # in chunks, so one dimension shows both.
        for dim in (64, 128, 256) if dtype == torch.bfloat16 else (128,):
            for saliency in (False, True):
                for name, fields, extra in _FEATURES:
                    problem, grad_z = _meta_problem(dtype, dim, fields, **extra)
                    launch, _ = flow_launch(problem, grad_z if saliency else None, arch)
                    what = "saliency" if saliency else "mass"
                    where = f"flow {what} {str(dtype).removeprefix('torch.')} d={dim}"
                    yield f"{where} {name}", launch, {"matrix": "native"}


_FEATURES: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    ("plain", (), {}),
    ("bias+gain", ("bias", "gain"), {}),
    ("bias+gain, bool mask", ("bias", "gain"), {"mask": torch.bool}),
    (
        "everything",
        ("bias", "factor", "magnitude", "gain"),
        {"mask": torch.float32, "window": 1024, "softcap": 30.0},
    ),
)


def _meta_problem(
    dtype: torch.dtype, dim: int, fields: tuple[str, ...], mask: torch.dtype | None = None, window: int = 0,
    softcap: float = 0.0,
) -> tuple[Problem, Tensor]:  # fmt: skip
    batch, heads, key_heads, n = 2, 32, 8, 4096
    q, grad_z = (torch.empty(batch, n, heads, dim, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
    k, v = (torch.empty(batch, key_heads, n, dim, dtype=dtype, device="meta") for _ in range(2))
    roles = torch.empty(batch, n, dtype=torch.uint8, device="meta")
    table = torch.empty(1, heads, ROLES, ROLES, device="meta")
    given = {
        "q": q, "k": k, "v": v, "roles": roles, "query_roles": roles, **dict.fromkeys(fields, table),
        "mask": None if mask is None else torch.empty(batch, 1, n, n, dtype=mask, device="meta"),
        "causal": True, "scale": dim**-0.5, "window": window, "softcap": softcap,
    }  # fmt: skip
    problem = Problem(**{name: given.get(name) for name in Problem._fields})  # type: ignore[arg-type]
    return problem, grad_z

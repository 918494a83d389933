"""Validation of the public functions' arguments. Reads shapes and flags only, except role values on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .errors import message, require_tensor
from .heads import HeadEdits
from .routes import ROLES, Routes

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    roles: Tensor | None,
    query_roles: Tensor | None,
    routes: Routes | None,
    heads: HeadEdits | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """TypeError, ValueError or NotImplementedError unless the arguments of `attention` fit together."""
    _check_qkv(q, k, v)
    batch, query_heads, n, dim = q.shape
    keys = k.shape[2]
    if prefix is not None:
        keys += _check_prefix(prefix, k)
    if lengths is not None:
        _check_lengths(lengths, batch, keys, q.device)
        if routes is not None and query_roles is None:
            way_out = "Say what every query is: the last columns may hold no key yet."
            raise ValueError(message("query_roles", f"[B|1, N={n}] with routes and lengths", None, way_out))
    if causal and n > keys:
        raise ValueError(
            message("causal", f"at most K={keys} queries", f"N={n}", "Pass causal=False, or all keys of the sequence.")
        )
    _check_number("scale", scale, positive=False)
    _check_number("softcap", softcap, positive=True)
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(message("window", "an int or None", window, "Give the number of keys a query sees."))
        if window < 1:
            raise ValueError(message("window", "at least 1", window, "Use None for no window."))
        if not causal:
            raise NotImplementedError(
                message("window", "causal=True", "causal=False", "Pass a two-sided window as a bool mask.")
            )
    if roles is not None:
        _check_roles("roles", roles, batch, keys, "K", q.device)
    if query_roles is not None:
        _check_roles("query_roles", query_roles, batch, n, "N", q.device)
    if routes is not None:
        _check_routes(routes, roles, query_roles, batch, query_heads, n, keys, q.device)
    if heads is not None:
        if not isinstance(heads, HeadEdits):
            raise TypeError(message("heads", "HeadEdits or None", heads, "Build emokernels.HeadEdits(...)."))
        heads.check_against(batch, n, query_heads, dim, q.device)
    if mask is not None:
        _check_mask(mask, batch, query_heads, n, keys, q.device)


def _check_lengths(lengths: Tensor, batch: int, keys: int, device: torch.device) -> None:
    require_tensor("lengths", lengths, "Pass an int32 tensor of shape [B|1].")
    if lengths.dtype != torch.int32:
        raise TypeError(message("lengths", "int32", lengths, "Convert with lengths.int()."))
    if lengths.dim() != 1 or lengths.shape[0] not in (1, batch) or lengths.device != device:
        raise ValueError(
            message("lengths", f"shape [{batch}|1] on {device}", lengths, "Give one length per batch row.")
        )
    if device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > keys:
            raise ValueError(
                message("lengths", f"values from 0 to K={keys}", f"{low} to {high}", "Count existing keys.")
            )


def _check_prefix(prefix: tuple[Tensor, Tensor], k: Tensor) -> int:
    """The length of the prefix."""
    if not isinstance(prefix, (tuple, list)) or len(prefix) != 2:
        raise TypeError(message("prefix", "a pair (k, v)", repr(type(prefix).__name__), "Pass prefix=(k, v)."))
    for name, tensor in zip(("prefix[0]", "prefix[1]"), prefix, strict=True):
        require_tensor(name, tensor, "Pass a tensor of shape [1, Hkv, P, D].")
        if tensor.dtype != k.dtype:
            raise TypeError(message(name, f"the dtype of k ({k.dtype})", tensor, "Convert it to that dtype."))
        fits = tensor.dim() == 4 and tensor.shape[:2] == (1, k.shape[1]) and tensor.shape[3] == k.shape[3]
        if not fits or tensor.shape[2] == 0 or tensor.device != k.device or tensor.shape != prefix[0].shape:
            shape = f"shape [1, Hkv={k.shape[1]}, P, D={k.shape[3]}] on {k.device}, alike for k and v"
            raise ValueError(message(name, shape, tensor, "All rows share the prefix: its batch dimension is 1."))
    return prefix[0].shape[2]


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        layout = "[B, H, N, D]" if name == "q" else "[B, Hkv, K, D]"
        require_tensor(name, tensor, f"Pass a tensor of shape {layout}.")
        if tensor.dim() != 4 or 0 in tensor.shape:
            raise ValueError(
                message(name, f"4 non-empty dimensions {layout}", tensor, "Split heads with view and transpose.")
            )
        if tensor.dtype not in FLOATS:
            raise TypeError(message(name, "float32, bfloat16, float16 or float64", tensor, "Convert with .float()."))
        if tensor.dtype != q.dtype:
            raise TypeError(message(name, f"the dtype of q ({q.dtype})", tensor, "Convert all three to one dtype."))
        if tensor.device != q.device:
            raise ValueError(message(name, f"the device of q ({q.device})", tensor, "Move all three to one device."))
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            message(
                "k", f"[B={q.shape[0]}, Hkv, K, D={q.shape[3]}] like q", k, "q and k share batch and head dimension."
            )
        )
    if v.shape != k.shape:
        raise ValueError(message("v", f"the shape of k {tuple(k.shape)}", v, "Pad v if its head dimension is smaller."))
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            message(
                "q",
                f"a number of heads divisible by the {k.shape[1]} key heads",
                q,
                "H must be a multiple of Hkv (grouped-query attention).",
            )
        )


def _check_roles(name: str, roles: Tensor, batch: int, length: int, letter: str, device: torch.device) -> None:
    require_tensor(name, roles, f"Pass a uint8 tensor of shape [B|1, {letter}].")
    if roles.dtype != torch.uint8:
        raise TypeError(message(name, "uint8", roles, "Convert with .to(torch.uint8)."))
    if roles.dim() != 2 or roles.shape[0] not in (1, batch) or roles.shape[1] != length:
        raise ValueError(
            message(
                name, f"shape [{batch}|1, {letter}={length}]", roles, "Give one Role per token, cached tokens included."
            )
        )
    if roles.device != device:
        raise ValueError(message(name, f"the device of q ({device})", roles, "Move it with .to(q.device)."))
    if device.type == "cpu" and not torch.compiler.is_compiling() and int(roles.max()) >= ROLES:
        raise ValueError(
            message(name, f"values below {ROLES}", f"{int(roles.max())}", "Use the numbers of emokernels.Role.")
        )


def _check_routes(
    routes: Routes,
    roles: Tensor | None,
    query_roles: Tensor | None,
    batch: int,
    heads: int,
    n: int,
    keys: int,
    device: torch.device,
) -> None:
    if not isinstance(routes, Routes):
        raise TypeError(message("routes", "Routes or None", routes, "Build emokernels.Routes(bias=..., gain=...)."))
    if roles is None:
        raise ValueError(
            message("roles", "[B|1, K] uint8 with routes", None, "Say what every key is with emokernels.Role.")
        )
    if query_roles is None and n > keys:
        raise ValueError(
            message(
                "query_roles", f"[B|1, N={n}] when N > K={keys}", None, "Say what every query is with emokernels.Role."
            )
        )
    for name, table in routes.tables():
        if table.shape[0] not in (1, batch) or table.shape[1] != heads or table.device != device:
            raise ValueError(
                message(
                    f"routes.{name}",
                    f"shape [{batch}|1, H={heads}, {ROLES}, {ROLES}] on {device}",
                    table,
                    "Build the tables for this model's heads; routes.to(device) moves them.",
                )
            )


def _check_mask(mask: Tensor, batch: int, heads: int, n: int, keys: int, device: torch.device) -> None:
    require_tensor("mask", mask, "Pass a bool or additive float tensor.")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(message("mask", "bool (True = attend) or additive float", mask, "Convert with mask.bool()."))
    shape = mask.shape
    if mask.dim() != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or tuple(shape[2:]) != (n, keys):
        raise ValueError(
            message(
                "mask",
                f"shape [{batch}|1, 1|{heads}, N={n}, K={keys}]",
                mask,
                "Expand a [B, K] padding mask to [B, 1, N, K].",
            )
        )
    if mask.device != device:
        raise ValueError(message("mask", f"the device of q ({device})", mask, "Move it with .to(q.device)."))
    if mask.requires_grad:
        raise NotImplementedError(
            message(
                "mask",
                "a mask that needs no gradient",
                mask,
                "Detach it, or learn Routes.bias, which is differentiable.",
            )
        )


def _check_number(name: str, value: Any, *, positive: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message(name, "a Python number or None", value, "Convert a tensor with .item()."))
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(
            message(name, "a positive number" if positive else "a finite number", value, "Use None for the default.")
        )

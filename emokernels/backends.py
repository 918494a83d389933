"""What can run here, and why the rest cannot."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .errors import message


class Backend(NamedTuple):
    """One way to compute the same thing. `reason` says why it is available or not."""

    name: str
    available: bool
    reason: str


OPERATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("reference", "composed", "fused", "native"),
    "gated_activation": ("reference", "composed", "fused", "native"),
    "attention_flow": ("reference", "composed", "fused"),
    "logit_lens": ("reference", "composed", "fused"),
}
"""The backends that implement each public operation."""

MAX_HEAD_DIM = 256
"""Largest head dimension of the attention kernels of "fused" and "native"."""

MIN_CAPABILITY = (8, 0)
"""Compute capability that the GPU kernels need."""


_DESCRIPTIONS = {
    "reference": "plain torch, the definition; keeps the full score matrix",
    "composed": "stock attention merged by log-sum-exp",
    "fused": "Triton kernels; the fast path on a GPU",
    "native": "CUDA C++ kernels: decode attention and the gated activation",
}


def backends() -> list[Backend]:
    """Every backend by name, whether it can be used here, and the reason.

    >>> [b.name for b in backends() if b.available][:2]
    ['reference', 'composed']
    """
    from .composed import stock

    found = []
    for name, description in _DESCRIPTIONS.items():
        missing = _missing(name)
        if name == "composed":
            description = f"the fast path on a CPU; {stock.describe()}"
        elif name == "fused" and _interpreted():
            description = "Triton kernels in the interpreter (TRITON_INTERPRET=1): for tests, very slow"
        found.append(Backend(name, missing is None, missing or description))
    return found


def resolve(backend: str, tensor: Tensor | None = None, operation: str = "attention") -> str:
    """The backend to use for a name given by the user.

    "auto" takes fused for half precision and float32 on a GPU where Triton is installed, and composed elsewhere.

    Args:
        backend: "auto" or a name from `backends()`.
        tensor: the first tensor of the call; its device and dtype decide. None asks about this machine alone.
        operation: a key of `OPERATIONS`.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the backend is known but cannot run this here. An explicit backend never falls back.
    """
    offered = OPERATIONS[operation]
    if backend == "auto":
        on_gpu = torch.cuda.is_available() if tensor is None else tensor.device.type == "cuda"
        fits = tensor is None or (tensor.dtype != torch.float64 and not _too_wide(tensor, operation))
        return "fused" if on_gpu and fits and _missing("fused") is None else "composed"
    if backend not in _DESCRIPTIONS:
        names = ", ".join(repr(name) for name in ("auto", *_DESCRIPTIONS))
        raise ValueError(message("backend", f"one of {names}", backend, "emokernels.backends() says what runs here."))
    if backend not in offered:
        names = ", ".join(repr(name) for name in ("auto", *offered))
        raise NotImplementedError(message("backend", f"one of {names} for {operation}", repr(backend), "Use 'auto'."))
    missing = _missing(backend)
    if missing is not None:
        raise NotImplementedError(
            message("backend", "a backend available here", f"{backend!r}: {missing}", "Use 'auto'.")
        )
    if backend in ("fused", "native") and tensor is not None:
        if tensor.dtype == torch.float64:
            raise NotImplementedError(
                message("backend", f"float32, bfloat16 or float16 for {backend!r}", tensor, "Use 'reference'.")
            )
        if _too_wide(tensor, operation):
            raise NotImplementedError(
                message("q", f"a head dimension up to {MAX_HEAD_DIM} for {backend!r}", tensor, "Use 'composed'.")
            )
        if tensor.device.type != "cuda" and not (backend == "fused" and _interpreted()):
            raise NotImplementedError(
                message("backend", f"tensors on a CUDA device for {backend!r}", tensor, "Use 'auto' or .cuda().")
            )
    return backend


def _too_wide(tensor: Tensor, operation: str) -> bool:
    return operation.startswith("attention") and tensor.shape[-1] > MAX_HEAD_DIM


# What a machine has does not change while a process runs: compiled graphs may take these for constants.
@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch.compiler.assume_constant_result
def _missing(backend: str) -> str | None:
    """Why a backend cannot be used here, or None when it can."""
    if backend == "fused":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        return None if os.environ.get("TRITON_INTERPRET", "0") == "1" else _no_gpu()
    if backend == "native":
        return native.why_not() or _no_gpu()
    return None


@functools.cache
def _no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, the kernels need {MIN_CAPABILITY[0]}.0 or higher"
    return None

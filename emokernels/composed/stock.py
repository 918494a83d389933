"""Stock attention that returns its log-sum-exp, from whichever kernel is here: what `spans` merges.

On a CPU this is torch's flash kernel. On a GPU the first of `KERNELS` that is installed and takes the call; the
environment variable ``EMOKERNELS_STOCK`` names one of them to measure it alone, and then nothing else is used.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import message
from . import host, libraries
from .libraries import Kernel
from .softmax import accumulator

CHOICE = "EMOKERNELS_STOCK"
"""Environment variable: the name of the only kernel to use on GPUs."""

KERNELS: tuple[Kernel, ...] = (
    libraries.FlashAttention4(),
    libraries.FlashAttention3(),
    libraries.FlashAttention2(),
    libraries.Cudnn(),
    libraries.Flash(),
    libraries.Efficient(),
)
"""In order of preference."""

ALIGNMENT = 8
"""GPU kernels want head dimensions that are a multiple of this."""


class Refused(Exception):
    """No stock kernel takes a call; another way must be found."""


def stock_with_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T) v`` and its log-sum-exp.

    Args:
        q: ``[B, H, N, D]``, the elements of a head vector side by side, otherwise any strides.
        k: ``[B, Hkv, K, D]`` like q, with H a multiple of Hkv and K at least 1.
        v: like k.
        causal: query i sees keys ``j <= i``; needs N == K.
        scale: multiplies the logits.

    Returns:
        z ``[B, H, N, D]`` in q's dtype and lse ``[B, H, N]`` in float32 (float64 for float64), natural logarithm; any
        strides, fresh memory.

    Raises:
        Refused: no kernel takes this call.
        ValueError, NotImplementedError: ``EMOKERNELS_STOCK`` names no kernel, or one that cannot be used here.
    """
    if host.owns(q):
        return libraries.cpu_attention(q, k, v, causal, scale)
    if k.shape[2] == 1:
        return _one_key(q, k, v, scale)
    n, dim = q.shape[2:]
    q, k, v = aligned(q), aligned(k), aligned(v)
    z, lse = choose(q, k, v, causal)(q, k, v, causal, scale)
    return z[..., :dim], lse[..., :n]


def aligned(x: Tensor) -> Tensor:
    """``[B, H, L, D]`` with zeros after D up to a multiple of `ALIGNMENT`; x itself where that is none."""
    extra = -x.shape[3] % ALIGNMENT
    return F.pad(x, (0, extra)) if extra else x


def choose(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Kernel:
    """The kernel for a call on a GPU. Raises like `stock_with_lse`."""
    forced = os.environ.get(CHOICE)
    for kernel in KERNELS if not forced else (_named(forced),):
        if kernel.missing() is None and (reason := kernel.refuses(q, k, v, causal)) is None:
            return kernel
    if forced:
        given = f"{forced!r}, but {kernel.missing() or reason}"
        raise NotImplementedError(message(CHOICE, "a kernel that computes this call", given, f"Unset {CHOICE}."))
    raise Refused


@torch.compiler.assume_constant_result
def describe() -> str:
    """What `composed` is made of on this machine, for `emokernels.backends`, which compiled functions call too."""
    text = "stock attention merged by log-sum-exp: torch's flash kernel on a CPU"
    if libraries.capability() is None:
        return text
    why = {kernel.name: kernel.missing() for kernel in KERNELS}
    here = ", ".join(name for name, missing in why.items() if missing is None)
    absent = "; ".join(f"{name}: {missing}" for name, missing in why.items() if missing is not None)
    return f"{text}, {here or 'tiles'} on this GPU" + (f" ({absent})" if absent else "")


def _named(name: str) -> Kernel:
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    names = ", ".join(kernel.name for kernel in KERNELS)
    raise ValueError(message(CHOICE, f"one of {names}", repr(name), f"Unset {CHOICE} to take the first that fits."))


def _one_key(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The softmax over one key is 1: no kernel needed, and cuDNN would not take the call."""
    key_heads, share = k.shape[1], q.shape[1] // k.shape[1]
    z = v.unsqueeze(2).expand(-1, -1, share, q.shape[2], -1).clone(memory_format=torch.contiguous_format)
    wide = accumulator(q.dtype)
    dots = (q.unflatten(1, (key_heads, share)).to(wide) * k.unsqueeze(2).to(wide)).sum(-1)
    return z.flatten(1, 2), dots.mul_(scale).flatten(1, 2)

"""How each stock attention kernel is called: what it takes, how its arrays lie, and where it puts its log-sum-exp.

Every kernel here maps q ``[B, H, N, D]``, k and v ``[B, Hkv, K, D]`` (any strides with the elements of a head vector
side by side, D a multiple of 8) to z ``[B, H, N, D]`` and a natural log-sum-exp ``[B, H, N or more]`` in float32. A
causal call has N == K: flash-attn since 2.1 puts the diagonal of another shape at the bottom right, torch and cuDNN at
the top left.

What is written here about flash-attn 2 to 4 and about torch's CUDA kernels was read in their sources and is tested
against stand-ins that follow the same conventions; ``tests/gpu`` runs the real ones where there is a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

HALVES = (torch.float16, torch.bfloat16)
CUDNN_VERSION = 91501
"""Older ones are wrong at sequence lengths that are no multiple of 128; torch prefers cuDNN from here on too."""


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Torch's flash kernel for CPUs, every float dtype; lse is float64 for float64."""
    z, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return z, lse


def capability(tensor: Tensor | None = None) -> tuple[int, int] | None:
    """Compute capability of the GPU a tensor is on, or of the first one torch used; None when there is none."""
    if tensor is None:
        return _capability(None)
    return _capability(tensor.device.index) if tensor.is_cuda else None


@functools.cache
def _capability(index: int | None) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


class Kernel(ABC):
    """One stock attention kernel of a GPU."""

    name: str
    """What a user calls it (`stock.CHOICE`)."""
    majors: range | tuple[int, ...] = range(8, 100)
    """Compute capabilities it runs on, by their first number; `needs` says it in words."""
    needs = "8.0 or higher"
    dtypes: tuple[torch.dtype, ...] = HALVES
    max_dim = 256
    expanded = True
    """Takes tensors that repeat memory along a dimension (stride 0)."""

    def missing(self) -> str | None:
        """Why it cannot be used on this machine, None when it can."""
        gpu = capability()
        if gpu is None:
            return "no CUDA GPU is visible to torch"
        return self._wrong_gpu(gpu) or self.not_loaded

    @functools.cached_property
    def not_loaded(self) -> str | None:
        """Why its library cannot be used, None when it can. Asked once, on machines whose GPU it supports."""
        return None

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str | None:
        """Why it cannot compute this call, None when it can."""
        gpu = capability(q)
        if gpu is None:
            return f"q is on {q.device}, not on a CUDA GPU"
        if q.dtype not in self.dtypes:
            return f"it takes {' and '.join(str(dtype).removeprefix('torch.') for dtype in self.dtypes)}, not {q.dtype}"
        if q.shape[3] > self.max_dim:
            return f"it takes head dimensions up to {self.max_dim}, not {q.shape[3]}"
        if not self.expanded and any(_repeats_memory(x) for x in (q, k, v)):
            return "it takes no expanded (stride 0) tensors"
        return self._wrong_gpu(gpu)

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Attention as the module describes it."""

    def _wrong_gpu(self, gpu: tuple[int, int]) -> str | None:
        if gpu[0] in self.majors:
            return None
        return f"it needs compute capability {self.needs}, this GPU has {gpu[0]}.{gpu[1]}"


class FlashAttention2(Kernel):
    """Package flash-attn, ``flash_attn_func(q, k, v, ...) -> (out, lse, probabilities)`` on ``[B, N, H, D]``."""

    name = "flash2"
    module = "flash_attn"
    option = "return_attn_probs"
    """The argument that makes `flash_attn_func` return the log-sum-exp after the output."""

    @functools.cached_property
    def not_loaded(self) -> str | None:
        """Nothing is imported on a machine whose GPU the library does not support."""
        try:
            options = inspect.signature(self.function).parameters
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            # A build for another torch or CUDA fails while it loads; flash-attn 4 alone has no `flash_attn_func` here.
            return f"{self.module} cannot be used: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return None if self.option in options else f"this {self.module} is too old: it has no {self.option}"

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The library's public function."""
        found: Callable[..., Any] = importlib.import_module(self.module).flash_attn_func
        return found

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Key heads are shared by the kernel. Arguments go by name: their order changes between versions."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # Version 4 launches on the current device, whatever device its tensors are on.
        device = torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()
        with device, torch.no_grad():
            out, lse, *_ = self.function(q, k, v, softmax_scale=scale, causal=causal, **{self.option: True})
        return out.transpose(1, 2), lse


class FlashAttention3(FlashAttention2):
    """The Hopper build of flash-attention, ``flash_attn_func(...) -> (out, lse)`` since August 2025."""

    name = "flash3"
    module = "flash_attn_interface"
    majors, needs = (9,), "9.x"
    expanded = False


class FlashAttention4(FlashAttention2):
    """Package flash-attn-4 (CuTe), ``flash_attn_func(...) -> (out, lse)``; it has `return_lse` since February 2026."""

    name = "flash4"
    module = "flash_attn.cute"
    option = "return_lse"
    majors, needs = (9, 10), "9.x or 10.x"
    max_dim = 128  # more on some GPUs, this on all
    expanded = False


class _Torch(Kernel):
    """A kernel inside torch. What it takes is torch's to say, which also honours ``torch.nn.attention.sdpa_kernel``."""

    asks: str
    """The function of ``torch.backends.cuda`` that says so."""

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str | None:
        """Ask torch after the checks that need no call."""
        return super().refuses(q, k, v, causal) or self._asked(q, k, v, causal)

    def _asked(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str | None:
        grouped = q.shape[1] != k.shape[1]
        cuda: Any = torch.backends.cuda
        if getattr(cuda, self.asks)(cuda.SDPAParams(q, k, v, None, 0.0, causal, grouped)):
            return None
        return f"torch.backends.cuda.{self.asks} says no"


class Cudnn(_Torch):
    """cuDNN through torch; lse ``[B, H, N, 1]`` since torch 2.9. Builds a plan for every new shape, which takes time.

    Offered where torch itself prefers it.
    """

    name = "cudnn"
    asks = "can_use_cudnn_attention"
    majors, needs = (9, 10), "9.x or 10.x"
    expanded = False

    @functools.cached_property
    def not_loaded(self) -> str | None:
        """A version whose results are right."""
        version = torch.backends.cudnn.version()
        if version is None:
            return "this torch has no cuDNN"
        return None if version >= CUDNN_VERSION else f"cuDNN {version} is too old, {CUDNN_VERSION} is needed"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Key heads are shared by the kernel."""
        out = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out[0], out[1].flatten(2)


class Flash(_Torch):
    """FlashAttention inside torch: version 2, or 3 and 4 where ``torch.nn.attention`` has switched them on."""

    name = "flash"
    asks = "can_use_flash_attention"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Key heads are shared by the kernel."""
        out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out[0], out[1]


class Efficient(_Torch):
    """Torch's memory-efficient kernel, the one for float32; lse is padded to a multiple of 32."""

    name = "efficient"
    asks = "can_use_efficient_attention"
    majors, needs = range(7, 100), "7.0 or higher"
    dtypes = (*HALVES, torch.float32)
    max_dim = 1 << 16

    def _asked(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str | None:
        return super()._asked(q[:, : k.shape[1]], k, v, causal)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Key heads are repeated: not every torch shares them in this kernel."""
        share = q.shape[1] // k.shape[1]
        k, v = (x if share == 1 else x.repeat_interleave(share, 1) for x in (k, v))
        out = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
        return out[0], out[1]


def _repeats_memory(x: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))

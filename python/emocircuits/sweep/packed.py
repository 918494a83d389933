"""Matrix products on a CPU at the rate that its vector units allow.

``torch.nn.functional.linear`` computes float32 through the library that torch was built with. On AMD processors with
AVX-512 that library does not use it, and oneDNN, which torch brings too, is more than twice as fast once a weight has
been brought into its own layout. A sweep multiplies by the same weights thousands of times, so it brings them into
that layout once, where a measurement of some milliseconds says that it pays.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from emocircuits.families import Handle
from emocircuits.sweep.attend import replaced
from emocircuits.sweep.stale import bits

FEW = 8
"""Rows below which a call costs more than the product."""
SHARE = 0.25
"""Of the memory that is free, what packed weights may take."""
GAIN = 0.9
"""Packed products are used where they take at most this share of the time."""

_ALIVE: weakref.WeakValueDictionary[tuple[int, ...], Products] = weakref.WeakValueDictionary()


class Products:
    """The linear layers of a text decoder, computed with packed weights while the context lasts.

    Only float32 on a CPU, and only plain linear layers: everything else runs as it is. A weight is packed when it is
    first used. Rounding is that of float32 in another order of summation.

    Args:
        handle: the model; its weights must not change while this object is used.
    """

    @classmethod
    def of(cls, handle: Handle) -> Products:
        """Those of a model, shared by all that use them at the same time: the sweeps of several pairs pack once."""
        weights = [m.weight for m in _layers(handle)]
        key = id(handle.model), *(int(bits(w)) for w in weights)
        found = _ALIVE.get(key)
        if found is None:
            found = _ALIVE[key] = cls(handle)
        return found

    def __init__(self, handle: Handle) -> None:
        # Its number is in a key of _ALIVE: no other model may get it while this object lives.
        self._model = handle.model
        self._parts: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._inside: list[contextlib.AbstractContextManager[None]] = []
        layers = _layers(handle)
        weights = {id(m.weight): m.weight for m in layers}
        if layers and _room(weights.values()) and faster(*sorted(layers[0].weight.shape)):
            self._parts = [(m, _forward(m)) for m in layers]

    @property
    def packed(self) -> bool:
        """Whether anything is computed otherwise than torch would."""
        return bool(self._parts)

    def __enter__(self) -> Products:
        context = replaced(self._parts)
        context.__enter__()
        self._inside.append(context)
        return self

    def __exit__(self, *error: Any) -> None:
        self._inside.pop().__exit__(*error)


def _layers(handle: Handle) -> list[Any]:
    return [m for layer in handle.layers for m in layer.modules() if _plain(m)]


def _plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear and type(module) is not Conv1D:
        return False
    weight = module.weight
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and type(weight) is nn.Parameter
        and "forward" not in vars(module)
    )


def _room(weights: Iterable[Tensor]) -> bool:
    return sum(w.numel() * w.element_size() for w in weights) <= SHARE * available()


def available() -> int:
    """Bytes of memory that can be had, 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def pack(weight: Tensor) -> Tensor:
    """A weight ``[out, in]`` in oneDNN's layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` with a packed weight."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def _forward(module: Any) -> Callable[..., Any]:
    kept: list[Tensor] = []
    turned = isinstance(module, Conv1D)
    as_it_is = module.forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.numel() < FEW * x.shape[-1] or torch.is_grad_enabled():
            result: Tensor = as_it_is(x)
            return result
        if not kept:
            kept.append(pack(module.weight.T.contiguous() if turned else module.weight))
        return product(x, kept[0], module.bias)

    forward.packed = True  # type: ignore[attr-defined]
    return forward


@functools.cache
def faster(small: int, large: int) -> bool:
    """Whether packed products are there and pay on this machine, measured on one of these sizes."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    weight, x = torch.randn(large, small), torch.randn(256, small)
    with torch.inference_mode():
        try:
            packed = pack(weight)
            product(x, packed, None)
        except RuntimeError:
            return False
        plain = _best(lambda: linear(x, weight))
        return _best(lambda: product(x, packed, None)) <= GAIN * plain


def _best(run: Callable[[], Any], times: int = 7) -> float:
    run()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)

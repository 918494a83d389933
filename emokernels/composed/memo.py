"""Small caches of what all layers and steps of a generation see again and again.

Tables and roles on a CPU are keyed on their bytes, so one that was refilled in place is noticed, and reading a key
costs a microsecond. Masks are too large for that and device tensors too far away: they are remembered as objects, by
identity and version.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from . import host

T = TypeVar("T")

KEY_BYTES = 1 << 16
"""Largest CPU tensor whose bytes serve as a key: they are read at every call."""

Content = tuple[torch.dtype, tuple[int, ...], bytes]


class Memo(Generic[T]):
    """The last `size` results of a function of hashable keys."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The remembered result for `key`, or ``make()``."""
        try:
            found = self._known[key]
            self._known.move_to_end(key)
            return found
        except KeyError:
            found = make()
        self._known[key] = found
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        return found


class Seen(Generic[T]):
    """Results for the last `size` tensor objects, each dropped when its tensor dies or is written to."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: OrderedDict[int, tuple[weakref.ref[Tensor], int, T]] = OrderedDict()

    def get(self, tensor: Tensor, make: Callable[[], T]) -> T:
        """The remembered result for this very tensor in this state, or ``make()``."""
        if torch.is_inference(tensor):
            return make()  # inference tensors count no versions
        key, version = id(tensor), tensor._version
        seen = self._known.get(key)
        if seen is not None and seen[0]() is tensor and seen[1] == version:
            self._known.move_to_end(key)
            return seen[2]
        result = make()
        self._known[key] = (weakref.ref(tensor, functools.partial(self._forget, key)), version, result)
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        return result

    def _forget(self, key: int, _: weakref.ref[Tensor]) -> None:
        self._known.pop(key, None)


_on_devices: Seen[Content] = Seen(1024)
"""What was read from devices: up to four tables a layer, and the roles of a prompt."""


def content(tensor: Tensor) -> Content | None:
    """Dtype, shape and bytes of a tensor as a key, or None for a CPU tensor that is too large to read at every call.

    Device tensors of any size are read, once per object and version; the host waits for that.
    """
    if not host.owns(tensor):
        return _on_devices.get(tensor, lambda: _content(host.read(tensor)))
    if tensor.numel() * tensor.element_size() > KEY_BYTES:
        return None
    return _content(tensor)


def restore(content: Content) -> Tensor:
    """A CPU tensor from its content."""
    dtype, shape, data = content
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def _content(tensor: Tensor) -> Content:
    dense = tensor if tensor.is_contiguous() else tensor.contiguous()
    data = ctypes.string_at(dense.data_ptr(), dense.numel() * dense.element_size())
    return (tensor.dtype, tuple(tensor.shape), data)

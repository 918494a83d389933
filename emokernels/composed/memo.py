"""Small caches keyed on content: what all layers and steps of a generation see again and again.

Keys are the bytes of small CPU tensors, so a table or a role tensor that was refilled in place is noticed, and
reading a key costs a microsecond. Masks are too large for that: they are remembered as objects, by identity and
version.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

KEY_BYTES = 1 << 16
"""Largest tensor whose bytes serve as a key."""


def content(tensor: Tensor) -> tuple[Hashable, ...] | None:
    """Shape, dtype and bytes of a CPU tensor, or None when it is too large for a key."""
    size = tensor.numel() * tensor.element_size()
    if size > KEY_BYTES:
        return None
    dense = tensor if tensor.is_contiguous() else tensor.contiguous()
    return (tensor.dtype, tuple(tensor.shape), ctypes.string_at(dense.data_ptr(), size))


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


class LastSeen:
    """The result for the tensor object seen last, dropped when that object dies or is written to."""

    def __init__(self) -> None:
        self._seen: tuple[weakref.ref[Tensor], int, Hashable, Any] | None = None

    def get(self, tensor: Tensor, extra: Hashable, make: Callable[[], Any]) -> Any:
        """The remembered result for this very tensor in this state, or ``make()``."""
        if torch.is_inference(tensor):
            return make()  # inference tensors count no versions
        seen = self._seen
        if seen is not None and seen[0]() is tensor and seen[1] == tensor._version and seen[2] == extra:
            return seen[3]
        result = make()
        self._seen = (weakref.ref(tensor), tensor._version, extra, result)
        return result

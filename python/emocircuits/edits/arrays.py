"""Numbers and arrays that edits hold: checked when the edit is made, compared and hashed by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def number(name: str, value: float, *, minimum: float | None = None) -> float:
    """``value`` as a finite float of at least ``minimum``.

    Raises:
        TypeError: it is not a finite number.
        ValueError: it is too small.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
        raise TypeError(f"{name}={value!r}: expected a finite number")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}={value!r}: expected at least {minimum}")
    return float(value)


class FrozenArray:
    """A float32 array that compares and hashes by value; ``numpy.asarray`` and ``tolist`` give its content."""

    __slots__ = ("_array",)

    def __init__(self, name: str, value: Any) -> None:
        if isinstance(value, FrozenArray):
            self._array: np.ndarray = value._array
            return
        given = value.detach().cpu().float().numpy() if isinstance(value, torch.Tensor) else value
        try:
            array = np.array(given, np.float32)
        except (TypeError, ValueError):
            raise TypeError(
                f"{name} is {type(value).__name__}: expected a tensor, an array or nested lists of numbers"
            ) from None
        if array.ndim == 0 or array.size == 0 or not np.isfinite(array).all():
            raise ValueError(f"{name} has shape {array.shape}: expected a non-empty array of finite numbers")
        array.flags.writeable = False
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._array.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._array.ndim

    def tolist(self) -> list[Any]:
        """Nested lists of Python floats; exact."""
        return self._array.tolist()

    def tensor(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A fresh tensor with the content."""
        return torch.tensor(self._array, device=device, dtype=dtype)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._array.astype(dtype) if dtype is not None else self._array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrozenArray) and np.array_equal(self._array, other._array)

    def __hash__(self) -> int:
        return hash((self.shape, self._array.tobytes()))

    def __repr__(self) -> str:
        return f"<float32 array {'x'.join(map(str, self.shape))}>"

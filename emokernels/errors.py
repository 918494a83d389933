"""One way to word an error: what was expected, what was given, and the way out.

Every refusal of this package names the argument, what it expected, what it got and what to do instead, so that a
traceback alone is enough to fix the call.
"""

from __future__ import annotations

from typing import Any

import torch


def describe(value: Any) -> str:
    """A short description of a value for an error message: dtype, shape and device for tensors."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if value is None:
        return "None"
    return f"{value!r} ({type(value).__name__})"


def message(argument: str, expected: str, given: Any, way_out: str) -> str:
    """`argument: expected ..., got .... way out`; `given` is described unless it is a str already."""
    got = given if isinstance(given, str) else describe(given)
    return f"{argument}: expected {expected}, got {got}. {way_out}"


def require_tensor(argument: str, value: Any, way_out: str) -> None:
    """TypeError unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(message(argument, "a torch.Tensor", value, way_out))

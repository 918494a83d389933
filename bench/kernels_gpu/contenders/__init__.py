"""The ways to compute each problem, ours and others.

A contender has a name, the variant of the problem it computes, and a function that makes a call ready: everything that
a model would do once (masks, compiled functions, copies of a layout) happens there and is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from emokernels.backends import backends

from ..timing import Call

Prepare = Callable[[Any], Call]


class Unavailable(Exception):
    """A contender cannot run here or cannot compute this problem; the message says why."""


@dataclass(frozen=True)
class Contender:
    """`prepare` maps a problem's inputs to the call that is timed; it raises `Unavailable`."""

    name: str
    variant: str
    prepare: Prepare
    ours: bool = False
    note: str = ""
    """What a reader must know to compare, e.g. what is left out of the time."""


def need(backend: str) -> None:
    """`Unavailable` unless a backend of ours runs here; the interpreter is for tests, not for times."""
    found = next(one for one in backends() if one.name == backend)
    if not found.available:
        raise Unavailable(found.reason)
    if backend == "fused" and not sees_a_gpu():
        raise Unavailable("no CUDA GPU is visible to torch, and Triton's interpreter is not timed")


def sees_a_gpu() -> bool:
    return torch.cuda.is_available()

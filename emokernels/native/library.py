"""Loads the compiled kernels, once, and remembers why they cannot be used."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from ..errors import message

PACKAGE = Path(__file__).parents[1]
"""Where setup.py puts the library: the folder of emokernels."""

NAMESPACE = "emokernels_native"
"""The ops of csrc. The ops that users and compiled graphs see are defined in Python, in the namespace emokernels."""


@functools.cache
def why_not() -> str | None:
    """Why the native kernels cannot be used, or None when they are loaded."""
    built = sorted(PACKAGE.glob("_C*.so"))
    if not built:
        return (
            "no compiled CUDA kernels are part of this build (install with nvcc and torch at hand: "
            "pip install --no-build-isolation)"
        )
    failure = load(built[0])
    if failure is not None:
        return f"no compiled CUDA kernels could be loaded: {failure}"
    if torch.version.cuda is None:
        return "no compiled CUDA kernels can run: torch is built without CUDA"
    return None


def load(path: Path) -> str | None:
    """Load a library of ops; the reason when that fails."""
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path.name}: {str(error).strip().splitlines()[0]}"
    return None


def ops() -> Any:
    """The ops of csrc.

    Raises:
        NotImplementedError: they cannot be used here; the message says why.
    """
    reason = why_not()
    if reason is not None:
        raise NotImplementedError(
            message("backend", "a backend available here", f"'native': {reason}", "Use 'fused' or 'composed'.")
        )
    return getattr(torch.ops, NAMESPACE)

"""Loads csrc, the CUDA C++ kernels, when they were built."""

from __future__ import annotations


def why_not() -> str | None:
    """Why the native kernels cannot be used, or None when they are loaded."""
    return "no compiled CUDA kernels are part of this build"

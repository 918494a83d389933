"""What can run here, and why the rest cannot."""

from __future__ import annotations

from typing import NamedTuple

from .errors import message


class Backend(NamedTuple):
    """One way to compute the same thing. `reason` says why it is available or not."""

    name: str
    available: bool
    reason: str


_BACKENDS = (
    Backend("reference", True, "plain torch, the definition; keeps the full score matrix"),
    Backend("composed", True, "torch's attention kernels merged by log-sum-exp; the fast path on a CPU"),
    Backend("fused", False, "no Triton kernels are part of this build"),
    Backend("native", False, "no compiled CUDA kernels are part of this build"),
)


def backends() -> list[Backend]:
    """Every backend by name, whether it can be used here, and the reason.

    >>> [b.name for b in backends() if b.available]
    ['reference', 'composed']
    """
    return list(_BACKENDS)


def resolve(backend: str) -> str:
    """The backend to use for a name given by the user; "auto" picks composed.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the backend is known but not available. An explicit backend never falls back.
    """
    if backend == "auto":
        return "composed"
    for known in _BACKENDS:
        if known.name == backend:
            if known.available:
                return backend
            raise NotImplementedError(
                message("backend", "a backend available here", f"{backend!r}: {known.reason}", "Use backend='auto'.")
            )
    names = ", ".join(repr(name) for name in ("auto", *(known.name for known in _BACKENDS)))
    raise ValueError(message("backend", f"one of {names}", backend, "emokernels.backends() says what runs here."))

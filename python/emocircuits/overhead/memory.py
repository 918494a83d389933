"""How much memory a call takes beyond what was in use before it.

On a GPU: the peak of torch's allocator. On a CPU: the peak of the process's resident set, which Linux keeps (VmHWM in
/proc/self/status) and forgets when asked to (``5`` into /proc/self/clear_refs); freed memory is given back to the
system first, so that no call runs in what another left behind, and large blocks come from the system one by one
(`exact`). Elsewhere there is no figure.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

METHODS = {
    "cuda": "peak of torch's CUDA allocator during a generation, minus what was allocated before the contender came",
    "cpu": "peak resident set (VmHWM) during a generation, minus the resident set before it, freed memory returned",
}


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's mallopt."""


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Let malloc return every large block at once, as long as this lasts: slow, so nothing is timed meanwhile.

    Afterwards malloc keeps large blocks, as it does by itself in a process that has used them for a while.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another libc
        yield
        return
    mallopt(MMAP_THRESHOLD, 1 << 16)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, 1 << 25)
        mallopt(TRIM_THRESHOLD, 1 << 26)


def used(device: torch.device) -> int | None:
    """Bytes in use now, after giving back what is free; None where that cannot be known."""
    gc.collect()  # a cache of an earlier call that was freed during this one would make it look cheaper
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    _trim()
    return _status("VmRSS")


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes in use at any time during ``call()``; None where that cannot be known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        call()
        return None
    call()
    return _status("VmHWM")


def _trim() -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)

"""Where a number comes from: the device, the versions, and the code that was measured."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "pytest-benchmark")
MEASURED = ("emokernels/**/*.py", "csrc/**/*.[ch]*", "bench/kernels_gpu/**/*.py")


def slug(name: str) -> str:
    """A device name as a file name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device(name: str) -> dict[str, Any]:
    """What torch says of the GPU; of a CPU only that it is one (nothing is published about it)."""
    if torch.device(name).type != "cuda":
        return {"name": "cpu", "slug": "cpu-smoke"}
    found = torch.cuda.get_device_properties(name)
    return {
        "name": found.name,
        "slug": slug(found.name),
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "driver": _driver(),
    }


def versions() -> dict[str, str]:
    from emokernels import __version__

    found = {"emokernels": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def commit() -> str:
    """The commit of this checkout, with ``+`` when it has changes; "unknown" in a copy without its history."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@functools.cache
def sources() -> str:
    """A digest of the code that is measured and that measures: the same in any copy of a commit."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in MEASURED for path in ROOT.glob(pattern)):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"

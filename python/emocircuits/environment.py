"""Where a number comes from: device, versions and commit, written beside every result."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "triton", "numpy", "scipy", "safetensors", "plotly")


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of what it stands on; "not installed" where that is so."""
    from emokernels._version import __version__

    found = {"emokernels": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device(kind: str | None = None) -> dict[str, Any]:
    """The processor that results were made on: a GPU where there is one, unless ``kind`` is ``"cpu"``."""
    if torch.cuda.is_available() and kind != "cpu":
        return {"device": torch.cuda.get_device_name(), "threads": torch.get_num_threads()}
    return {"device": _cpu(), "threads": torch.get_num_threads()}


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout this package runs from (with ``+`` when it has changes), or None outside one."""
    here = Path(__file__).resolve().parent
    try:
        run = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def provenance(kind: str | None = None) -> dict[str, Any]:
    """Device, versions and commit as one JSON-ready object; ``kind`` as in :func:`device`."""
    return {**device(kind), "versions": versions(), "commit": commit()}

"""Machine-code statistics of the fused kernels, for a goal that is missed: what `python -m emokernels.audit` says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from emokernels.fused.launch import arch_of

from . import machine


def save(folder: Path, device: str, pattern: str) -> str:
    """Audit the kernels whose names have `pattern` in them for this device; the JSON lies beside the times.

    Returns what happened, in one line.
    """
    if torch.device(device).type != "cuda":
        return "no GPU, so no machine code of it to look at"
    path = folder / f"{machine.slug(torch.cuda.get_device_name(device))}-sass.json"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "emokernels.audit", "--arch", arch_of(torch.empty(0, device=device))]
    command += ["--json", str(path.resolve()), "--jobs", str(os.cpu_count() or 1)]
    command += ["--kernel", pattern] if pattern else []
    audit = subprocess.run(command, cwd=machine.ROOT, stdout=subprocess.DEVNULL, check=False)
    return f"{' '.join(['python', *command[1:]])} ended with code {audit.returncode}"

"""Machine-code statistics of the fused kernels, for a goal that is missed: what `python -m emokernels.audit` says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from . import machine


def save(folder: Path, device: str) -> str:
    """Run the audit for this device's architecture and keep its JSON beside the times; returns what happened."""
    if torch.device(device).type != "cuda":
        return "no GPU, no machine code to look at"
    major = torch.cuda.get_device_capability(device)[0]
    architecture = "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "emokernels.audit", "--arch", architecture, "--json"]
    audit = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=machine.ROOT, check=False)
    path = folder / f"{machine.slug(torch.cuda.get_device_name(device))}-sass.json"
    path.write_text(audit.stdout)
    return f"written: {path} ({' '.join(command[1:])} ended with code {audit.returncode})"

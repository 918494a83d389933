"""What this machine has, and what would run on it."""

from __future__ import annotations

from typing import Any

import torch

import emokernels as emo
from emocircuits.environment import provenance
from emocircuits.families import FAMILIES
from emokernels.backends import resolve


def examine() -> dict[str, Any]:
    """Versions, devices, backends with reasons, and which backend ``auto`` would take for what."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        **provenance(),
        "gpus": gpus,
        "backends": [b._asdict() for b in emo.backends()],
        "auto": {
            "layers a plan edits": resolve("auto"),
            "layers a plan leaves alone": "the model's own SDPA (or eager, if it was loaded so)",
        },
        "families": {f.name: {"models": list(f.model_types), "text": list(f.text_types)} for f in FAMILIES},
    }


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"emokernels {report['versions']['emokernels']}" + (f" at {report['commit']}" if report["commit"] else "")]
    lines += [f"  {name:14} {v}" for name, v in report["versions"].items() if name != "emokernels"]
    lines += ["", "devices", f"  cpu            {report['device']}, {report['threads']} threads"]
    lines += [f"  cuda:{i}         {name}" for i, name in enumerate(report["gpus"])] or [
        "  cuda           no GPU is visible to torch"
    ]
    lines += ["", "attention backends"]
    lines += [f"  {'yes' if b['available'] else 'no ':3} {b['name']:10} {b['reason']}" for b in report["backends"]]
    lines += ["", "what runs where"]
    lines += [f"  {what:28} {backend}" for what, backend in report["auto"].items()]
    lines += ["", "model families"]
    lines += [f"  {n:8} {', '.join(f['models'])} (text: {', '.join(f['text'])})" for n, f in report["families"].items()]
    return "\n".join(lines)

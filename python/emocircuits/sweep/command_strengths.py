"""What ``emocircuits sweep`` takes for strengths: of steering vectors, and of VEENA."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from emocircuits.circuit import Circuit
from emocircuits.edits.heads import READINGS
from emocircuits.files import read_json
from emocircuits.plan import Plan
from emocircuits.sweep import Sweep, SweepResult
from emocircuits.sweep import steering as steer

TARGETS = ("steering", "veena")
ALPHAS, BETAS, GAMMAS = "0.1,0.5,1", "1,1.4,2", "1,1.6,2.5"
OPTIONS = {
    **dict.fromkeys(("vectors", "alphas", "rows", "added"), "steering"),
    **dict.fromkeys(("circuit", "betas", "gammas", "readings"), "veena"),
}
MakePlans = Callable[[Any, str, Path | None], Callable[..., Plan]]
"""From a model, its name and a circuit file to the plan of a beta and a gamma, and a reading."""


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of these targets."""
    vectors = parser.add_argument_group("--target steering: h + alpha * S[layer] in the run that is patched")
    vectors.add_argument("--vectors", type=Path, metavar="FILE", help="safetensors, [layers, d_model] each")
    vectors.add_argument("--alphas", metavar="LIST", help=f"strengths (default {ALPHAS})")
    vectors.add_argument("--rows", choices=steer.ROWS, help="that are steered (default all, generated ones too)")
    vectors.add_argument("--added", choices=steer.READINGS, help="how a vector is added (default raw)")
    veena = parser.add_argument_group("--target veena: the strengths of VEENA on a circuit")
    veena.add_argument("--circuit", type=Path, metavar="FILE", help="circuit.json of the model")
    veena.add_argument("--betas", metavar="LIST", help=f"strengths of VEE (default {BETAS})")
    veena.add_argument("--gammas", metavar="LIST", help=f"strengths of ENA (default {GAMMAS})")
    veena.add_argument("--readings", metavar="LIST", help=f"among {','.join(READINGS)} (default the circuit's own)")


def check(args: argparse.Namespace) -> None:
    """Refuse options of other targets, and files that cannot be read, before a model is loaded.

    Raises:
        ValueError: one of them.
    """
    for name, target in OPTIONS.items():
        if getattr(args, name) is not None and args.target != target:
            raise ValueError(f"--{name} is for --target {target}, not {args.target}")
    if args.target not in TARGETS:
        return
    if args.positions != "all":
        raise ValueError(f"--positions: --target {args.target} has none; leave it out")
    if args.patch_with != "clean":
        raise ValueError(f"--patch-with: --target {args.target} takes nothing from the other prompt; leave it out")
    if args.target == "steering":
        if args.vectors is None:
            raise ValueError("--target steering needs --vectors FILE, such as the steering.safetensors of a circuit")
        read_vectors(args.vectors)
        _numbers(args.alphas, "alphas", ALPHAS)
        return
    if args.layers is not None:
        raise ValueError("--layers: VEENA acts where the circuit is; leave it out")
    if args.circuit is not None:
        Circuit.load(args.circuit)
    elif args.model != "embedded":
        raise ValueError(f"no circuit is known for {args.model!r}; give --circuit FILE, found in this model")
    _numbers(args.betas, "betas", BETAS)
    _numbers(args.gammas, "gammas", GAMMAS)
    _readings(args.readings)


def table(sweep: Sweep, args: argparse.Namespace, layers: list[int] | None) -> SweepResult:
    """The table of the chosen target."""
    if args.target == "steering":
        alphas = _numbers(args.alphas, "alphas", ALPHAS)
        rows: Any = args.rows or "all"
        reading: Any = args.added or "raw"
        return sweep.steering(read_vectors(args.vectors), layers, alphas, rows, reading)
    model = sweep.handle.model if sweep.several is None else sweep.several.model
    make: MakePlans = args.make_plans
    axes: dict[str, Any] = {
        "beta": _numbers(args.betas, "betas", BETAS), "gamma": _numbers(args.gammas, "gammas", GAMMAS),
    }  # fmt: skip
    if args.readings is not None:
        axes = {"reading": _readings(args.readings), **axes}
    return sweep.grid(make(model, args.model, args.circuit), axes)


def read_vectors(path: Path) -> dict[str, Tensor]:
    """Steering vectors by name: ``[layers, d_model]`` each.

    Args:
        path: safetensors. Tensors of three axes are several vectors, which ``steering.json`` beside the file names.

    Raises:
        ValueError: the file cannot be read, or a tensor has another number of axes.
    """
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot read steering vectors ({error})") from error
    known: list[str] = []
    if path.with_suffix(".json").exists():
        record = read_json(path.with_suffix(".json"), "steering vectors")
        known = list(record.get("emotions", [])) if isinstance(record, dict) else []
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            found[name] = tensor
        elif tensor.ndim == 3:
            several = known if len(known) == len(tensor) else [f"{name}.{i}" for i in range(len(tensor))]
            found |= dict(zip(several, tensor, strict=True))
        else:
            raise ValueError(f"{path}: {name} is {list(tensor.shape)}, expected [layers, d_model]")
    return found


def _numbers(given: str | None, name: str, default: str) -> list[float]:
    text = default if given is None else given
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} {text}: expected numbers such as 0.1,0.5,1") from None
    if len(set(found)) != len(found):
        raise ValueError(f"--{name} {text}: expected each number once")
    return found


def _readings(given: str | None) -> list[str]:
    found = [part.strip() for part in given.split(",")] if given is not None else []
    if any(part not in READINGS for part in found) or len(set(found)) != len(found):
        raise ValueError(f"--readings {given}: expected some of {', '.join(READINGS)}, each once")
    return found

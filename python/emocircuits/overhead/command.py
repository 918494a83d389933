"""The command ``emocircuits bench``: its options, and what they mean together."""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import Any

import torch

DTYPES = ("float32", "bfloat16", "float16")
SECONDS = {False: 120.0, True: 16.0}
TOKENS = {False: 32, True: 12}
PAIRS = {False: 5, True: 2}


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to those that every command has."""
    add = parser.add_argument
    add("--config", metavar="NAME", help="a published shape instead of a model, such as llava-1.5-7b")
    add("--random-weights", action="store_true", help="with --config: random weights, made on the device")
    add("--batch", type=int, default=1, metavar="B", help="rows of the batch (default 1)")
    add("--prompt", type=int, metavar="N", help="tokens of the prompt with its image (default: what the model's takes)")
    add(
        "--new-tokens",
        type=int,
        metavar="N",
        help=f"generated tokens (default {TOKENS[False]}; {TOKENS[True]} if quick)",
    )
    add("--dtype", choices=DTYPES, help="default: the model's; of random weights bfloat16 on a GPU, else float32")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU when there is one)")
    add("--cache", choices=("static", "dynamic"), help="default: static on a GPU, dynamic on a CPU and if quick")
    compiled = "compile decode steps; needs a static cache (default: on a GPU, unless quick)"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a CPU that others use too")
    add("--only", nargs="+", metavar="NAME", help="some contenders (and the untouched model on SDPA)")
    add("--seconds", type=float, help=f"for the timed pairs (default {SECONDS[False]:g}; {SECONDS[True]:g} if quick)")
    add(
        "--prepare-seconds",
        type=float,
        default=math.inf,
        help="start no contender after this time (default: start all)",
    )
    add("--seed", type=int, default=0, help="of random weights, pixels and synthetic circuits (default 0)")
    add("--quick", action="store_true", help="under a minute for small models: few pairs, wide intervals")
    add("--check", action="store_true", help="exit with 1 when VEENA or an empty plan costs more than it may")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, write; the record.

    Raises:
        ValueError: options that contradict each other, an unknown name, or contenders that disagree.
        NotImplementedError: the model's family is not supported.
    """
    from emocircuits.overhead import Settings, bounds, choose, make, measure, report

    _consistent(args)
    device = _device(args.device)
    on_gpu = device.startswith("cuda")
    if on_gpu and os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1: times of Triton's interpreter mean nothing; unset it")
    heavy = on_gpu and not args.quick
    cache = args.cache or ("static" if heavy or args.compile else "dynamic")
    compiled = (heavy and cache == "static") if args.compile is None else args.compile
    if compiled and cache != "static":
        raise ValueError("--compile needs --cache static: a growing cache would be compiled again at every step")
    competing = choose(args.only, torch.device(device).type)
    if args.clock == "cpu" and on_gpu:
        raise ValueError("--clock cpu: on a GPU the processor's time is not the model's; leave --clock out")
    tokens = TOKENS[args.quick] if args.new_tokens is None else args.new_tokens
    subject = make(
        model=args.model, config=args.config, batch=args.batch, prompt=args.prompt, device=device, seed=args.seed,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
    )  # fmt: skip
    record = measure(
        subject, competing, Settings(tokens, cache, compiled, args.clock), quick=args.quick, progress=not args.json,
        seconds=SECONDS[args.quick] if args.seconds is None else args.seconds, fewest=PAIRS[args.quick],
        prepare_seconds=args.prepare_seconds,
    )  # fmt: skip
    record["command"] = args.command_line
    judged = record["bounds"] = bounds.judge(record) if args.check else []
    if not args.json:
        print(report.table(record))
        print("\n".join(bounds.lines(judged)), end="\n" if judged else "")
    if args.out:
        paths = report.save(record, args.out)
        print("written: " + ", ".join(str(path) for path in paths.values()), file=sys.stderr)
    return record


def _consistent(args: argparse.Namespace) -> None:
    if args.config and args.model != "embedded":
        raise ValueError("--model and --config: give one of them")
    if args.config and not args.random_weights:
        raise ValueError(f"--config {args.config} is a shape without weights; add --random-weights, or give --model")
    if args.random_weights and not args.config:
        raise ValueError("--random-weights needs --config: the shape of the model")
    for name in ("batch", "prompt", "new_tokens", "seconds"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected more than 0")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; name a folder")


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"--device {name}: expected cpu, cuda, cuda:1, ...") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no GPU is visible to torch; use cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected cpu or cuda")
    return name

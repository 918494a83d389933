"""The command line of the kernel benchmarks; see the package's docstring."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import torch

from . import machine, record, run, sass
from .shapes import SHARES

RESULTS = machine.ROOT / "bench" / "results"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m bench.kernels_gpu", description="Kernel benchmarks on a GPU.")
    found.add_argument("--groups", nargs="+", metavar="GROUP", help=f"some of {', '.join(SHARES)} (default: all)")
    found.add_argument("--quick", action="store_true", help="one or two shapes a group, in less than two minutes")
    found.add_argument("--seconds", type=float, help="time for all groups (default 330, 90 with --quick)")
    found.add_argument("--resume", action="store_true", help="keep what the same code measured on this device before")
    found.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON (default bench/results)")
    found.add_argument("--device", default="cuda", help="cuda (default), or cpu for tiny shapes without figures")
    found.add_argument("--commit", help="the commit to record, for a copy without its history")
    found.add_argument(
        "--sass", nargs="?", const="", metavar="KERNEL",
        help="also save machine-code statistics of the fused kernels (whose name has KERNEL in it)",
    )  # fmt: skip
    found.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return found


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("no GPU is visible to torch: nothing was timed")
        return 0
    if not on_gpu and options.results.resolve() == RESULTS:
        print("--device cpu measures nothing worth keeping; give another folder with --results", file=sys.stderr)
        return 2
    chosen = "tiny" if not on_gpu else "quick" if options.quick else "full"
    seconds = options.seconds or run.TOTAL_SECONDS[chosen]
    try:
        groups = run.plan(options.groups, seconds)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not options.child:
        # Beyond the groups' own budgets: a case that has begun, and the start of a process.
        code = run.supervise([*given, "--child"], seconds + 120)
        if options.sass is not None:
            print(sass.save(options.results, options.device, options.sass))
        return code
    state = record.load_or_start(record.fresh(options.device, options.commit), options.results)
    for group in groups:
        part = state["groups"].get(group)
        if part is not None and (not options.resume or part["set"] != chosen):
            del state["groups"][group]
    command = " ".join(["python -m bench.kernels_gpu", *(one for one in given if one != "--child")])
    try:
        state = run.run_groups(state, groups, chosen, options.device, options.results, command)
    except Exception:
        traceback.print_exc()
        return run.DIED
    print(f"written: {record.path_of(state, options.results)}")
    wrong = record.failures(state)
    for line in wrong:
        print(f"WRONG {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m emokernels.audit``: see `main`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..fused.launch import ARCHITECTURES, INTERPRETED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m emokernels.audit",
        description="Compile every fused kernel in every configuration, without a GPU, and check the machine code: "
        "registers, spills, shared memory, matrix instructions, and the cost of routes in the main loop.",
        epilog="Exit code 0 when everything holds, 1 when something does not, 2 when asked for something impossible.",
    )
    parser.add_argument(
        "--arch", action="append", required=True, metavar="ARCH", help=f"{', '.join(ARCHITECTURES)} or all; repeatable"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write all numbers there; - is standard output, without the table"
    )
    parser.add_argument(
        "--kernel", metavar="PATTERN", help="only kernels whose name has PATTERN in it (or matches a glob)"
    )
    parser.add_argument("--quick", action="store_true", help="one dtype and one head dimension of each kernel")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="processes (default 2)"
    )
    parser.add_argument("--package", default="emokernels.fused", help="where to look (default emokernels.fused)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the audit and return its exit code: 0 all holds, 1 something does not, 2 an impossible request."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if "all" in args.arch:
        args.arch = list(ARCHITECTURES)
    for arch in args.arch:
        if arch not in ARCHITECTURES:
            parser.error(f"--arch: expected {', '.join(ARCHITECTURES)} or all, got {arch!r}")
    if args.jobs < 1:
        parser.error(f"--jobs: expected a positive number, got {args.jobs}")
    if args.json not in (None, "-") and not Path(args.json).resolve().parent.is_dir():
        parser.error(f"--json: the folder of {args.json} does not exist")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed, nothing can be compiled (pip install triton)")
    return _audit(args, parser)


def _audit(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from . import check, kernels, report
    from .run import run

    broken: list[str] = []
    every: list[Any] = []
    try:
        modules = kernels.discover(args.package)
    except ModuleNotFoundError as error:
        parser.error(f"--package: {error}")
    except kernels.Broken as error:
        print(f"emokernels.audit: {error}", file=sys.stderr)
        return 1
    for arch in dict.fromkeys(args.arch):
        for module in modules:
            try:
                every += kernels.cases(module, arch)
            except kernels.Broken as error:
                broken.append(str(error))
    wanted = kernels.chosen(every, args.kernel, args.quick)
    if not wanted and not broken:
        names = ", ".join(sorted({case.launch.kernel.__name__ for case in every})) or "none"
        parser.error(f"--kernel: nothing matches {args.kernel!r}; kernels: {names}")
    if INTERPRETED and wanted:
        parser.error("TRITON_INTERPRET is set in this process: its kernels cannot be compiled")
    records = run(wanted, args.jobs)
    check.compare(records)
    if args.json == "-":
        print(report.as_json(records, broken))
    else:
        if args.json:
            Path(args.json).write_text(report.as_json(records, broken) + "\n")
        print(report.text(records, broken))
    return 1 if broken or any(record.problems for record in records) else 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        # Kernels of a process that interprets are no code to compile: start again without.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "TRITON_INTERPRET": "0"})
    sys.exit(main())

# ruff: noqa: E402 - the environment is set before torch is imported
"""What exact activation patching costs here and elsewhere: the sweep engine, hook loops, and the libraries people use.

    python bench/sweep.py [--jobs heads,heads-each,...] [--columns 64] [--rounds 5] [--stride 1] [--json FILE]
                          [--model llama] [--plain]
                          [--layers 8 --width 512 --heads 8 --kv-heads 8 --neurons 1408 --vocabulary 8192]

Everything runs in one process, on one thread, on the same random weights and the same prompts (they differ at four
places, the first at column 4), and reads the same logit difference at the last column. First every contender patches
the same sample, and its numbers must agree with a plain one-patch-at-a-time hook loop to 2e-5 of the range of the whole
table; only then is anything timed. Contenders take turns, and the order turns too. A hook loop costs the same for every
patch, so it is timed on slices of the sweep; the engine's cost depends on layer and position, so it always runs the
whole sweep (with --stride 4 that of every fourth column: a quarter of the time, but the runs of both prompts then weigh
four times as much in a patch). Times are CPU time of the process: on a shared machine what others do changes the clock,
and this less.
Every round also times a matrix product of the MLP's shape, and the table says which share of the bound "least FLOPs at
that rate" is reached: at the rate of torch's own product, which all others use, and at that of a packed one
(emocircuits/sweep/packed.py), which the engine uses where it is faster. --plain keeps it to torch's own, so that one
can see what skipping work brings alone.

--model llava is a LLaVA whose two prompts have the same words and two images of 256 tokens, 4 layers of vision tower
before them. The hook loop runs the whole model; batched hooks get the merged embeddings, made once and not timed.

TransformerLens, nnsight and pyvene take part where they are installed (`pip install 'emokernels[peers]'`). PIP_NO_INDEX
is set for this process: TransformerLens installs packages by itself otherwise.
"""

from __future__ import annotations

import os

os.environ["PIP_NO_INDEX"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "python")]
warnings.filterwarnings("ignore")

import torch
from sweep_contenders import CONTENDERS, JOBS, Engine, Unavailable, Workload

from emocircuits.environment import provenance
from emocircuits.families import open_model
from emocircuits.sweep import packed as packing
from emocircuits.sweep.planner import Shape, forecast, outside

TOLERANCE = 2e-5
"""Largest difference from the hook loop, as a share of the range of the whole table."""
PEERS = ("transformer-lens", "nnsight", "pyvene")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS), help=f"some of {', '.join(JOBS)}")
    parser.add_argument("--only", help="contenders, by name (default: all that are installed)")
    parser.add_argument("--model", choices=["llama", "llava"], default="llama", help="(default llama)")
    parser.add_argument("--columns", type=int, default=64, help="words of a prompt (default 64)")
    parser.add_argument("--stride", type=int, default=1, help="of the columns patched one at a time (default 1: all)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender (default 5)")
    parser.add_argument("--slice", type=int, default=32, help="patches of a contender in a round (default 32)")
    parser.add_argument("--plain", action="store_true", help="the engine multiplies as torch does")
    parser.add_argument("--json", type=Path, metavar="FILE")
    sizes = dict(layers=8, width=512, heads=8, kv_heads=8, neurons=1408, vocabulary=8192, groups=16)
    for name, size in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"(default {size})")
    return parser.parse_args()


def agree(found: list[float], expected: list[float], span: float, name: str) -> float:
    """Largest difference as a share of the range of all patches; too large ends the program."""
    worst = max(abs(a - b) for a, b in zip(found, expected, strict=True)) / max(span, 1e-9)
    if not worst <= TOLERANCE:
        raise SystemExit(f"{name} differs from the hook loop by {worst:.1e} of the range: nothing is timed")
    return worst


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    jobs = args.jobs.split(",")
    unknown = [j for j in jobs if j not in JOBS]
    if unknown:
        raise SystemExit(f"--jobs {unknown[0]}: expected some of {', '.join(JOBS)}")
    wanted = args.only.split(",") if args.only else list(CONTENDERS)
    if args.plain:
        packing.faster = lambda *sizes: False
    with tempfile.TemporaryDirectory() as folder:
        work = Workload.build(Path(folder), args)
        contenders, missing = {}, {}
        for name in dict.fromkeys(["hook loop", *wanted]):
            try:
                contenders[name] = CONTENDERS[name](work)
            except Unavailable as reason:
                missing[name] = str(reason)
                print(f"left out: {name} ({reason})", file=sys.stderr)
        rows = [row for job in jobs for row in measure(job, contenders, work, args)]
    sizes = {k: v for k, v in vars(args).items() if type(v) is int}
    record = {
        "command": shlex.join(["python", "bench/sweep.py", *sys.argv[1:]]), **provenance("cpu"), "peers": peers(),
        "model": args.model, "left_out": missing, "sizes": sizes, "rows": rows,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def measure(job: str, contenders: dict, work: Workload, args: argparse.Namespace) -> list[dict]:
    """Agreement, then turns."""
    everything = work.patches(job)
    step = max(1, len(everything) // args.slice)
    sample = everything[step // 2 :: step][: args.slice]
    for contender in contenders.values():
        contender.ready(job)
    expected = contenders["hook loop"].run(job, sample)
    whole = (contenders.get("engine") or Engine(work)).run(job, everything)
    span = max(whole) - min(whole)
    of_engine = [whole[everything.index(patch)] for patch in sample]
    worst = {
        name: agree(of_engine if name == "engine" else c.run(job, sample), expected, span, name)
        for name, c in contenders.items()
    }
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    rates, packed_rates = [], []
    names = list(contenders)
    for turn in range(args.rounds):
        start = (turn * 7919 * args.slice) % max(1, len(everything) - args.slice + 1)
        part = everything[start : start + args.slice]
        rates.append(matrix_rate(args))
        packed_rates.append(matrix_rate(args, packed=True))
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            patches = everything if contenders[name].whole else part
            begin = time.process_time()
            contenders[name].run(job, patches)
            spent[name].append((time.process_time() - begin) / len(patches))
    handle = open_model(work.model())
    images = outside(handle, work.inputs("corrupt")) if work.images else 0
    shape = Shape.of(handle, work.columns, first=work.first, rows=2, images=images)
    kind, size = JOBS[job], args.neurons // args.groups
    counted = forecast(shape, kind, everything, size=size)
    best = min((n for n in names if n != "engine"), key=lambda n: statistics.median(spent[n]))
    rows = []
    for name in names:
        ratios = [a / b for a, b in zip(spent[best], spent[name], strict=True)]
        least = counted.least / len(everything)
        shares, of_packed = (
            [least / rate / s for rate, s in zip(measured, spent[name], strict=True)]
            for measured in (rates, packed_rates)
        )
        row = {
            "job": job, "contender": name, "columns": work.columns, "patches": len(everything),
            "cpu_ms_a_patch": 1e3 * statistics.median(spent[name]),
            "all_ms": [1e3 * s for s in spent[name]], "best_other": best, "times_best_other": statistics.median(ratios),
            "difference_of_range": worst[name], "arithmetic_allows": counted.naive / counted.least,
            "least_gflop_a_patch": least / 1e9, "share_of_bound": statistics.median(shares),
            "share_of_packed_bound": statistics.median(of_packed), "matrix_gflops": [rate / 1e9 for rate in rates],
            "packed_matrix_gflops": [rate / 1e9 for rate in packed_rates],
        }  # fmt: skip
        rows.append(row)
        print(
            f"T={work.columns} {job:14s} {name:28s} {row['cpu_ms_a_patch']:8.3f} ms a patch, "
            f"{row['times_best_other']:5.2f} times as fast as {best}, "
            f"{100 * row['share_of_bound']:3.0f} % of the bound ({100 * row['share_of_packed_bound']:.0f} % of that of "
            f"packed products), differs by {worst[name]:.0e} of the range"
        )
    return rows


def matrix_rate(args: argparse.Namespace, packed: bool = False) -> float:
    """FLOPs a second of CPU time of a large matrix product, torch's own or one with a packed weight."""
    x, weight = torch.randn(1024, args.width), torch.randn(2 * args.neurons, args.width)
    if packed and not packing.faster(args.width, args.width):
        return matrix_rate(args)
    ready = packing.pack(weight) if packed else weight
    times = []
    for _ in range(6):
        begin = time.process_time()
        packing.product(x, ready, None) if packed else torch.nn.functional.linear(x, ready)
        times.append(time.process_time() - begin)
    return 2 * x.numel() * len(weight) / statistics.median(times[1:])


def peers() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()

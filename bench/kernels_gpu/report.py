"""docs/gpu.md, written from bench/results: the same records always give the same page.

python -m bench.kernels_gpu.report [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import goals, machine
from .contenders import activation, attention, backward, flow, generation, lens, prefix
from .record import Record, read_all
from .shapes import SETS, SHARES

PAGE = machine.ROOT / "docs" / "gpu.md"
NOT_YET = "not yet run on a GPU"

# Group: what is shown of it. Ours first (whose time is given), then who is compared, with a short name.
COLUMNS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "prefill": (
        attention.BOOST,
        (
            ("no routes", attention.PLAIN), ("all heads", attention.ROUTES), ("every route", attention.EVERY),
            ("first layer", attention.FIRST), ("composed", "composed, gain in 10 heads"),
            ("SDPA flash", attention.FLASH), ("SDPA cuDNN", attention.CUDNN),
            ("SDPA + mask", "SDPA efficient, bias mask"),
            ("cuDNN + mask", "SDPA cuDNN, bias mask"), ("Flex", attention.FLEX), ("eager", "eager"),
            ("eager + mask", attention.EAGER), ("flash-attn 2", "flash-attn 2"), ("flash-attn 3", "flash-attn 3"),
        ),
    ),
    "decode": (
        attention.BOOST,
        (
            ("no routes", attention.PLAIN), ("all heads", attention.ROUTES), ("first layer", attention.FIRST),
            ("lengths", "fused, gain in 10 heads, lengths"), ("native", "native, gain in 10 heads"),
            ("SDPA flash", attention.FLASH), ("SDPA cuDNN", attention.CUDNN),
            ("SDPA + mask", "SDPA efficient, bias mask"), ("Flex", attention.FLEX), ("eager", "eager"),
            ("eager + mask", attention.EAGER), ("flash-attn 2", "flash-attn 2"), ("flash-attn 3", "flash-attn 3"),
        ),
    ),
    "prefix": (
        prefix.BOOSTED,
        (
            ("no routes", prefix.SHARED), ("prefix copied", prefix.COPIED),
            ("stock, merged", "stock kernels merged by log-sum-exp"), ("SDPA flash", attention.FLASH),
            ("SDPA cuDNN", attention.CUDNN),
        ),
    ),
    "backward": (
        backward.BOOST,
        (
            ("no routes", backward.PLAIN), ("all heads", backward.ROUTES), ("and of the tables", backward.TABLES),
            ("SDPA flash", attention.FLASH), ("SDPA cuDNN", attention.CUDNN), ("Flex", attention.FLEX),
            ("eager", "eager"),
        ),
    ),
    "activation": (
        activation.EDITED,
        (
            ("no edits", activation.PLAIN), ("native, edited", "native, 1 % of neurons edited"),
            ("act * up", activation.HF), ("act * up, edited", "act(gate) * up, then edited columns"),
            ("torch.compile", "torch.compile"), ("copy", activation.COPY),
        ),
    ),
    "flow": (flow.FUSED, (("composed", "composed"), ("eager", flow.EAGER))),
    "lens": (
        lens.FUSED,
        (
            ("and ten tokens", lens.TOP), ("composed", "composed"), ("all logits", lens.FULL),
            ("product alone", lens.PRODUCT),
        ),
    ),
    "generation": (generation.VEENA, (("untouched", generation.UNTOUCHED),)),
}  # fmt: skip

TITLES = {
    "prefill": "Prefill: causal attention over a prompt, bfloat16 unless a row says otherwise",
    "decode": "Decode: one query a row on a cache",
    "prefix": "Decode with a shared prefix",
    "backward": "Gradient of prefill attention with respect to q, k and v",
    "activation": "Gated activation",
    "flow": "Attention flow",
    "lens": "Logit lens",
    "generation": "Generation",
}

HEAD = f"""# On a GPU

`python -m bench.kernels_gpu.report` writes this page from the files in `bench/results`; a test holds the two together.

`make gpu` runs the GPU tests and then the benchmarks, with the Python at hand; it installs nothing, and without a GPU
it says so and ends well. `make gpu GPU_ARGS=--quick` measures one or two shapes a group.
`python -m bench.kernels_gpu --groups prefill decode` measures some groups alone ({", ".join(SHARES)}),
`--resume` goes on after an interruption, `--sass` adds what `python -m emokernels.audit` says of the compiled kernels.

How it is measured. CUDA events around one call, after the L2 was overwritten and while the GPU is still busy with that,
so that neither a warm cache nor a slow host shows. All contenders of a case run in turn, in another order every round;
a ratio is the median over rounds of the ratio within a round, with its 95 % bootstrap interval. Nobody is timed whose
answer differs from float64, on sampled rows, by more than twice the error of a plain run in that precision (twelve
times for kernels that are not ours). Who could not run is in the JSON with the reason. The ceilings, a large bfloat16
matrix product and a large copy, are measured in the same process before every group.

What a model does once for all its layers is done before the clock starts: dense masks, block masks, compilation, and,
for our kernels, the order of the key blocks. *First layer* is our kernel with that order worked out in every call.
"""


def page(records: Sequence[Record]) -> str:
    """The whole page."""
    parts = [HEAD, "## Goals\n", _goals(records)]
    for record in records:
        parts.append(_device(record))
        parts += [_group(group, record["groups"][group]) for group in SHARES if group in record["groups"]]
    if not records:
        parts.append("## What is measured\n")
        parts.append("\n".join(_planned()) + "\n")
    return "\n".join(parts)


def _goals(records: Sequence[Record]) -> str:
    heads = [record["device"]["name"] for record in records] or ["measured"]
    lines = [_row(["goal", "", *heads]), _row(["---", "---", *["---"] * len(heads)])]
    for goal in goals.GOALS:
        cells = [_cell(goals.judge(goal, record), goal) for record in records] or [NOT_YET]
        lines.append(_row([goal.what, goal.target, *cells]))
    return "\n".join(lines) + "\n\nThe worst case of each group counts.\n"


def _cell(found: goals.Finding | None, goal: goals.Goal) -> str:
    if found is None:
        return NOT_YET
    return f"{goals.number(found.value, goal.unit)} {'met' if found.met else '**missed**'} ({found.case})"


def _device(record: Record) -> str:
    device, versions = record["device"], record["versions"]
    about = [
        f"## {device['name']}\n",
        f"Compute capability {device['capability']}, {device['multiprocessors']} multiprocessors, "
        f"{device['memory_bytes'] / 2**30:.0f} GiB, {device['l2_bytes'] / 2**20:.0f} MiB of L2, "
        f"driver {device['driver']}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version != "not installed")
        + f". Commit {record['commit']} (sources {record['sources']}).",
    ]
    tests = record.get("tests")
    if tests:
        about.append(
            f"\nGPU tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped "
            f"in {tests['seconds']:.0f} s (`{tests['command']}`)."
        )
    return "\n".join(about) + "\n"


def _group(group: str, part: dict[str, Any]) -> str:
    main, others = COLUMNS[group]
    ceilings = part["ceilings"]
    lines = [f"### {TITLES[group]}\n"]
    state = "" if part["complete"] else " The run was interrupted."
    lines.append(
        f"`{part['command']}`: product {ceilings.get('matmul_tflops', 0):.0f} TFLOP/s, "
        f"copy {ceilings.get('copy_gbps', 0) / 1e3:.2f} TB/s.{state} "
        f"Time of *{main}*, 20th to 80th percentile in brackets; the other columns are its speed against each "
        "(their time / its time).\n"
    )
    shown = [(head, name) for head, name in others if any(goals.timed(case, name) for case in part["cases"])]
    lines.append(_row(["case", "time", "of the ceiling", *(head for head, _ in shown)]))
    lines.append(_row(["---"] * (3 + len(shown))))
    for case in part["cases"]:
        lines.append(
            _row([case["name"], *_figures(case, main, ceilings), *(_speed(case, main, name) for _, name in shown)])
        )
    lines += [f"\n{note}" for note in _absent(part)]
    return "\n".join(lines) + "\n"


def _figures(case: dict[str, Any], main: str, ceilings: dict[str, float]) -> list[str]:
    found = goals.timed(case, main)
    if found is None:
        why: list[str] = [one["reason"] for one in case["contenders"] if one["name"] == main]
        return [case.get("crashed") or case.get("skipped") or (why or ["not measured"])[0], ""]
    low, middle, high = (_time(found[key]) for key in ("p20_us", "p50_us", "p80_us"))
    shares = []
    if "tflops" in found and ceilings.get("matmul_tflops"):
        shares.append((found["tflops"] / ceilings["matmul_tflops"], f"{found['tflops']:.0f} TFLOP/s"))
    if "gbps" in found and ceilings.get("copy_gbps"):
        shares.append((found["gbps"] / ceilings["copy_gbps"], f"{found['gbps'] / 1e3:.2f} TB/s"))
    # The ceiling that is nearer is the one that bounds the problem.
    bound = max(shares, default=None)
    return [f"{middle} ({low} to {high})", "" if bound is None else f"{bound[0]:.0%} ({bound[1]})"]


def _time(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us >= 1000 else f"{us:.1f} µs"


def _speed(case: dict[str, Any], main: str, name: str) -> str:
    found = goals.ratio_of(case, main, name)
    if found is None:
        return "-"
    fast, slow = 1 / found["low"], 1 / found["high"]
    return f"{1 / found['median']:.3f} ({slow:.3f} to {fast:.3f})"


def _absent(part: dict[str, Any]) -> Iterable[str]:
    """Who never ran, and who was wrong anywhere."""
    ran = {one["name"] for case in part["cases"] for one in case["contenders"] if one["status"] == "timed"}
    why: dict[str, str] = {}
    for case in part["cases"]:
        for one in case["contenders"]:
            if one["status"] in ("wrong", "failed"):
                yield f"{one['status'].capitalize()}: {one['name']}, {case['name']}: {one['reason']}."
            elif one["status"] == "skipped" and one["name"] not in ran:
                why.setdefault(one["name"], one["reason"])
    if why:
        yield "Not here: " + "; ".join(f"{name} ({reason})" for name, reason in why.items()) + "."


def _planned() -> Iterable[str]:
    yield _row(["group", "cases", "measured"])
    yield _row(["---"] * 3)
    for group, cases in SETS["full"]().items():
        yield _row([TITLES[group], "; ".join(case.name for case in cases), NOT_YET])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels_gpu.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results")
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    options = parser.parse_args(arguments)
    text = page(read_all(options.results))
    if options.check:
        same = options.out.exists() and options.out.read_text() == text
        print(f"{options.out} is {'up to date' if same else 'out of date: python -m bench.kernels_gpu.report'}")
        return 0 if same else 1
    options.out.write_text(text)
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What routes cost on a CPU: routed attention against F.scaled_dot_product_attention on the same inputs.

    python bench/attention_cpu.py [--quick] [--check] [--json FILE] [--threads N]

Both run in one process, one call after the other in turn, and the number reported is the median of the ratios of such
pairs with its 95 % bootstrap interval: what a shared machine does to one side it mostly does to the other. Before
anything is timed, outputs are compared with plain float64 arithmetic. --check exits with 1 when a median ratio exceeds
1.15.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import emokernels as emo
from emokernels.attention import run

LIMIT = 1.15
"""Largest median ratio that --check accepts."""
SYSTEM, VISUAL = 35, 576
"""Tokens before and in the image of a LLaVA prompt."""


class Case(NamedTuple):
    phase: str  # prefill or decode
    keys: int
    heads: int
    key_heads: int
    dim: int
    dtype: torch.dtype
    boosted: str  # all or few heads
    fields: tuple[str, ...]
    batch: int = 1

    @property
    def name(self) -> str:
        shape = f"K={self.keys} H={self.heads}/{self.key_heads} D={self.dim} B={self.batch}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.phase:7s} {shape:26s} {dtype:8s} {self.boosted:3s} {'+'.join(self.fields)}"


BOTH = ("bias", "gain")
SHAPES = [(32, 32, 128), (32, 8, 128), (32, 8, 64)]


def cases(quick: bool) -> list[Case]:
    found = []
    for heads, key_heads, dim in SHAPES[1:2] if quick else SHAPES:
        for keys in (1024,) if quick else (1024, 4096):
            for boosted, fields in (("all", BOTH), ("few", ("gain",))):
                found.append(Case("prefill", keys, heads, key_heads, dim, torch.float32, boosted, fields))
                found.append(Case("decode", keys, heads, key_heads, dim, torch.float32, boosted, fields))
    if not quick:
        found.append(Case("prefill", 1024, 32, 8, 128, torch.bfloat16, "all", BOTH))
        found.append(Case("decode", 1024, 32, 8, 128, torch.bfloat16, "all", BOTH))
    return found


def small_cases() -> list[Case]:
    """The embedded model's decode step, where calls cost more than arithmetic: reported in microseconds."""
    return [Case("decode", 100, 8, 4, 16, torch.float32, "all", ("gain",), batch) for batch in (1, 16, 64)]


def inputs(case: Case) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, emo.Routes]:
    """q, k, v in the layouts a Hugging Face model gives them, roles, and routes that boost the image."""
    generator = torch.Generator().manual_seed(0)
    n = case.keys if case.phase == "prefill" else 1
    q = torch.randn(case.batch, n, case.heads, case.dim, generator=generator).transpose(1, 2)
    k, v = (torch.randn(case.batch, case.key_heads, case.keys, case.dim, generator=generator) for _ in range(2))
    visual = VISUAL * case.keys // 1024
    roles = [emo.Role.SYSTEM] * min(SYSTEM, case.keys // 10) + [emo.Role.VISUAL] * visual
    roles += [emo.Role.QUERY] * (case.keys - 1 - len(roles))
    roles.append(emo.Role.LAST if case.phase == "prefill" else emo.Role.GENERATED)
    routes = emo.Routes.identity(case.heads, fields=case.fields)
    heads = range(case.heads) if case.boosted == "all" else (3, case.heads // 2, case.heads // 2 + 1)
    for head in heads:
        for dst in (emo.Role.QUERY, emo.Role.LAST, emo.Role.GENERATED):
            for name, table in routes.tables():
                table[:, head, dst, emo.Role.VISUAL] = 0.4 if name == "bias" else 1.5
    return tuple(x.to(case.dtype) for x in (q, k, v)), torch.tensor([roles], dtype=torch.uint8), routes


def error(case: Case, z: torch.Tensor) -> tuple[float, float]:
    """RMS error of z against float64 on some heads and rows, and that of stock attention without routes."""
    (q, k, v), roles, routes = inputs(case)
    n, keys = q.shape[2], k.shape[2]
    rows = torch.tensor(sorted({0, n // 3, n - 2, n - 1} & set(range(n))))
    role = roles.long()[0]
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, enable_gqa=case.heads != case.key_heads)
    ours, theirs = [], []
    for head in (3, case.heads - 1):
        group = head * case.key_heads // case.heads
        plain = (q[0, head, rows].double() @ k[0, group].double().T) * case.dim**-0.5
        hidden = torch.arange(keys)[None, :] > rows[:, None] + keys - n
        pairs = (role[rows + keys - n][:, None], role[None, :])
        bias = routes.bias[0, head][pairs] if routes.bias is not None else 0.0
        gain = routes.gain[0, head][pairs] if routes.gain is not None else 1.0
        routed = torch.softmax((plain + bias).masked_fill(hidden, -torch.inf), -1) * gain
        plain = torch.softmax(plain.masked_fill(hidden, -torch.inf), -1)
        ours.append(z[0, head, rows] - routed @ v[0, group].double())
        theirs.append(stock[0, head, rows] - plain @ v[0, group].double())
    return tuple(float(torch.stack(x).square().mean().sqrt()) for x in (ours, theirs))  # type: ignore[return-value]


def measure(case: Case, seconds: float) -> dict[str, object]:
    (q, k, v), roles, routes = inputs(case)
    causal, grouped = q.shape[2] > 1, case.heads != case.key_heads

    def stock() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    def routed() -> torch.Tensor:
        return run(q, k, v, roles=roles, routes=routes)[0]

    ours, theirs = error(case, routed())
    if ours > 4 * theirs + 1e-7:  # boosts make outputs larger, so this is twice the error of stock attention
        raise SystemExit(f"{case.name}: rms error {ours:.2e}, stock attention has {theirs:.2e}. Not timed.")
    stock()
    begin = time.perf_counter()
    stock()
    once = time.perf_counter() - begin
    calls = max(1, round(2e-3 / once))
    pairs = max(7, min(400, round(seconds / (2 * calls * once))))
    base, ratios, extra = [], [], []
    for number in range(pairs):
        order = (stock, routed) if number % 2 else (routed, stock)
        took = {}
        for function in order:
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            took[function] = (time.perf_counter() - begin) / calls
        base.append(took[stock])
        ratios.append(took[routed] / took[stock])
        extra.append(took[routed] - took[stock])
    low, high = interval(ratios)
    return {
        "case": case.name,
        "stock_ms": statistics.median(base) * 1e3,
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "extra_us": statistics.median(extra) * 1e6,
        "pairs": pairs,
        "calls_per_pair": calls,
        "rms_error": ours,
        "rms_error_stock": theirs,
    }


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    choose = random.Random(0)
    medians = sorted(statistics.median(choose.choices(values, k=len(values))) for _ in range(500))
    return medians[12], medians[487]


def environment() -> dict[str, object]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    try:
        here = Path(__file__).resolve().parent
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        revision = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {
        "device": "cpu",
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "emokernels": emo.__version__,
        "commit": revision,
        "command": "python " + " ".join(sys.argv),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, short")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 when a median ratio exceeds {LIMIT}")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=6.0, help="time per case (default 6, at least 7 pairs)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    about = environment()
    print(", ".join(f"{name} {value}" for name, value in about.items() if name != "command"))
    print(f"{'case':66s} {'SDPA ms':>9s} {'ratio':>7s}  95 % interval")
    rows, small = [], []
    seconds = min(options.seconds, 2.0) if options.quick else options.seconds
    with torch.no_grad():
        for case in cases(options.quick):
            row = measure(case, seconds)
            rows.append(row)
            print(
                f"{row['case']:66s} {row['stock_ms']:9.3f} {row['ratio']:7.3f}  {row['low']:.3f} to {row['high']:.3f}",
                flush=True,
            )
        print("\na decode step of a small model, microseconds on top of SDPA")
        for case in small_cases():
            row = measure(case, min(seconds, 2.0))
            small.append(row)
            print(f"{row['case']:66s} {row['stock_ms']:9.3f} {row['extra_us']:+7.0f} us", flush=True)
    worst = max(rows, key=lambda row: float(str(row["ratio"])))
    print(f"\nworst median ratio {worst['ratio']:.3f}: {worst['case']}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": about, "ratios": rows, "small": small}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if options.check and float(str(worst["ratio"])) > LIMIT else 0


if __name__ == "__main__":
    raise SystemExit(main())

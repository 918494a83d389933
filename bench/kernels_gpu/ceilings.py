"""What this machine can do at most: a large matrix product and a large copy, measured in the same run."""

from __future__ import annotations

import torch

from .ratios import percentile
from .timing import WARMUP, Timer


def measure(timer: Timer, device: str, tiny: bool) -> dict[str, float]:
    """TFLOP/s of a bf16 product on random data, and GB/s of a copy, bytes read plus bytes written."""
    side, elements = (64, 1 << 16) if tiny else (8192, 1 << 30)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    calls = {"matmul": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    for call in calls.values():
        for _ in range(WARMUP):
            call()
    times, _ = timer.rounds(calls)
    return {
        "matmul_tflops": 2 * side**3 / percentile(times["matmul"], 0.5) / 1e12,
        "copy_gbps": 2 * source.nbytes / percentile(times["copy"], 0.5) / 1e9,
    }

"""What the intervention costs: time per generated token with and without, measured pair by pair."""

from __future__ import annotations

import contextlib
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from emocircuits.overhead.ratios import ratio
from emocircuits.patching import patch
from emocircuits.plan import Plan


class Overhead(NamedTuple):
    """Median seconds of a generation of ``tokens`` tokens for ``batch`` rows, and the ratio with / without.

    ``ratio`` is the median of the ratios of neighbouring runs; ``low`` and ``high`` bound 95 % of bootstrapped medians.
    """

    without: float
    with_plan: float
    ratio: float
    low: float
    high: float
    tokens: int
    batch: int
    pairs: int


@torch.inference_mode()
def overhead(
    model: nn.Module, inputs: dict[str, Tensor], plan: Plan, *, tokens: int = 32, pairs: int = 31, seed: int = 0
) -> Overhead:
    """Time whole generations (vision tower, prefill, ``tokens`` decode steps), alternating untouched and patched.

    The untouched model runs on SDPA, as Hugging Face sets it up. Which of a pair runs first alternates, so that drift
    of the machine's speed cancels.
    """
    options: dict[str, Any] = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    def timed(chosen: Plan | None) -> float:
        with contextlib.nullcontext() if chosen is None else patch(model, chosen):
            start = time.perf_counter()
            out = model.generate(**inputs, **options)  # type: ignore[operator]
            if out.is_cuda:
                torch.cuda.synchronize(out.device)
            return time.perf_counter() - start

    for warm in (None, plan):
        timed(warm)
    times = np.zeros((pairs, 2))
    for i in range(pairs):
        for j in (0, 1) if i % 2 == 0 else (1, 0):
            times[i, j] = timed(plan if j else None)
    found = ratio(times[:, 1].tolist(), times[:, 0].tolist(), seed)
    batch = inputs["input_ids"].shape[0]
    without, with_plan = np.median(times, axis=0)
    return Overhead(float(without), float(with_plan), found.median, found.low, found.high, tokens, batch, pairs)

"""Device time of calls with a cold L2, contenders in turn.

On a GPU a call is timed by CUDA events around it. Before each call a buffer larger than the L2 is overwritten, so that
inputs come from memory; and because events also see a GPU that waits for its host, the buffer is overwritten often
enough to keep the GPU busy until the host has submitted the whole call. What the host needs for that is reported
beside the device time: it is what eager code pays when the device is faster.

In every round each contender runs once, in another order; ratios are taken within rounds (`ratios.ratio`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]

WARMUP = 3
"""Calls before the first that is timed, after the one that was checked."""
FEWEST, MOST = 7, 61
"""Rounds of a case."""
MOST_FLUSHES = 60


class Timer:
    """Times calls on one device. ``seconds`` is what the rounds of one case may take."""

    def __init__(self, device: str, seconds: float = 1.5) -> None:
        self.seconds = seconds
        self.on_gpu = torch.device(device).type == "cuda"
        if self.on_gpu:
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self._buffer = torch.empty(max(4 * l2, 1 << 27), dtype=torch.uint8, device=device)
            self.flush(3)
            self._flush_seconds = self._sample(lambda: self.flush(10), 0)() / 10

    def flush(self, times: int = 1) -> None:
        """Push everything else out of the L2."""
        for _ in range(times):
            self._buffer.fill_(1)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def host_seconds(self, call: Call) -> float:
        """How long the host takes to submit a call to an idle device: the least of three."""
        took = []
        for _ in range(3):
            self.synchronize()
            begin = time.perf_counter()
            result = call()
            took.append(time.perf_counter() - begin)
            del result
        self.synchronize()
        return min(took)

    def rounds(self, calls: Mapping[str, Call], seed: int = 0) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Seconds of each contender in every round, and its host seconds. The calls have run before."""
        host = {name: self.host_seconds(call) for name, call in calls.items()}
        order, choose = list(calls), random.Random(seed)
        times: dict[str, list[float]] = {name: [] for name in calls}
        begin = time.perf_counter()
        for number in range(MOST):
            choose.shuffle(order)
            read = [(name, self._sample(calls[name], self._flushes(host[name]))) for name in order]
            for name, seconds in read:
                times[name].append(seconds())
            elapsed = time.perf_counter() - begin
            # One more round has to fit.
            if number + 1 >= FEWEST and elapsed * (number + 2) / (number + 1) > self.seconds:
                break
        return times, host

    def _flushes(self, host: float) -> int:
        if not self.on_gpu:
            return 0
        return min(MOST_FLUSHES, 1 + int(1.5 * host / self._flush_seconds))

    def _sample(self, call: Call, flushes: int) -> Callable[[], float]:
        """Submit one call; the result waits for it and returns its seconds."""
        if not self.on_gpu:
            begin = time.perf_counter()
            call()
            took = time.perf_counter() - begin
            return lambda: took
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush(flushes)
        start.record()
        call()
        stop.record()

        def seconds() -> float:
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3

        return seconds


class WallTimer(Timer):
    """Times calls that end on the host, such as a whole generation, by the clock on the wall."""

    def host_seconds(self, call: Call) -> float:
        """The host is busy all the time; nothing to separate."""
        return 0.0

    def _sample(self, call: Call, flushes: int) -> Callable[[], float]:
        self.synchronize()
        begin = time.perf_counter()
        call()
        self.synchronize()
        took = time.perf_counter() - begin
        return lambda: took

"""The sweep itself: variants in, metric values out, as little computed as exactness allows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emocircuits.sweep import attend
from emocircuits.sweep.memory import SHARE, Demand, free, too_large
from emocircuits.sweep.readout import Readout
from emocircuits.sweep.resume import Decoder, Packed
from emocircuits.sweep.targets import Entry, Target, Variant

if TYPE_CHECKING:
    from emocircuits.sweep.api import Sweep

CPU_TOKENS = 1024  # packed tokens of a batch that still fit a CPU's caches


def evaluate(
    sweep: Sweep, target: Target, variants: Sequence[Variant], batch: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Metric values of variants, in their order, chunk by chunk.

    Args:
        sweep: the pair, its runs and the metric.
        target: what is patched.
        variants: best ordered by layer and column: consecutive ones of a layer become one batch.
        batch: whole prompts in a batch; None: what memory allows. Halved, for good, when memory runs out.

    Yields:
        A slice into ``variants`` and its values ``[n]`` float64.
    """
    with torch.inference_mode():
        run = sweep.runner(target)
        if sweep.base.layers[0].resid_pre.device.type == "cpu":
            keep_freed_memory()
        budget = batch * sweep.columns if batch else run.tokens()
        at = 0
        while at < len(variants):
            end = run.chunk(variants, at, budget)
            found = None
            try:
                found = run.values(variants[at:end])
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if end - at == 1:
                    raise ValueError(too_large(sweep, variants[at])) from error
            if found is None:
                # Only here has the error let go of what the batch had computed.
                run.forget()
                budget = max(1, min(budget, sum(run.size(v) for v in variants[at:end])) // 2)
                continue
            yield slice(at, end), found
            at = end


def keep_freed_memory() -> None:
    """Have a CPU's allocator keep what a batch frees for the next one.

    glibc gives blocks of megabytes back to the system and takes them again, zeroed page by page: a tenth of a sweep's
    time. It stops doing so below the size of the largest block that was ever freed, 32 MiB at most; elsewhere, and with
    other allocators, this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def tokens(sweep: Sweep) -> int:
    """Packed tokens of a batch: for a GPU, what half of its free memory holds."""
    device = sweep.base.layers[0].resid_pre.device
    if device.type != "cuda":
        return max(CPU_TOKENS, sweep.columns)
    return max(sweep.columns, min(65536, int(SHARE * free(device)) // Demand.of(sweep).token))


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Run:
    """One target on one pair."""

    def __init__(self, sweep: Sweep, target: Target) -> None:
        self.sweep, self.target = sweep, target
        self.readout: Readout = sweep.readout
        self.decoder = Decoder(sweep.handle, sweep.base, self.readout.stop, self.readout.columns)
        # Other values than the other prompt's differ from the first column on.
        self.start = sweep.first if sweep.patch_with == "clean" else 0
        self._entry: Entry | None = None
        self.demand = Demand.of(sweep)
        self.room = int(SHARE * free(sweep.readout.base.device)) or sys.maxsize

    def tokens(self) -> int:
        """Packed tokens of a batch."""
        return tokens(self.sweep)

    def forget(self) -> None:
        """Give memory back."""
        self._entry = None
        self.decoder.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def entry(self, layer: int) -> Entry:
        """The entry into one layer; the last one is kept."""
        if self._entry is None or self._entry.layer != layer:
            self._entry = self.target.entry(self.sweep, self.decoder, layer)
        return self._entry

    def columns(self, v: Variant) -> tuple[int, ...]:
        """Where the variant is patched; empty when it provably changes nothing that is read."""
        if v.layer > self.decoder.stop or self.start >= self.sweep.columns:
            return ()
        if v.column is not None and v.column < self.start:
            return ()
        return self.entry(v.layer).columns(v.column, self.start, v.unit)

    def size(self, v: Variant) -> int:
        """Packed tokens of a variant in the layers after it."""
        columns = self.columns(v)
        if not columns:
            return 0
        if v.layer >= self.decoder.stop:
            return len(columns)
        return self.sweep.columns - self.decoder.reach[columns[0]]

    def chunk(self, variants: Sequence[Variant], at: int, budget: int) -> int:
        """Where the batch that begins at ``at`` ends: variants of one layer, and one kind of entry."""
        end, used = at, 0
        head = variants[at]
        last, same, widest = -1, 0, (0, 0)
        while end < len(variants):
            v = variants[end]
            size = self.size(v)
            if v.layer != head.layer or (v.column is None) != (head.column is None):
                break
            # Variants of one size in a row are of the same columns.
            same = same + 1 if size == last else 1
            group = max(widest, (same * size, same if size else 0))
            needed = self.demand.bytes(used + size, end - at + 1, group)
            if used and (used + size > budget or needed > self.room):
                break
            used, widest, last = used + size, group, size
            end += 1
        return end

    def values(self, variants: Sequence[Variant]) -> Tensor:
        """Metric values ``[n]`` float64 of one batch."""
        base = self.readout.value(self.readout.base)
        found = base.expand(len(variants)).clone()
        kept = [i for i, v in enumerate(variants) if self.columns(v)]
        # Queries of one column go on from one column, keys and values from all that meet them.
        queries = {i for i in kept if self.entry(variants[i].layer).query(variants[i].unit)}
        for which in ([i for i in kept if i in queries], [i for i in kept if i not in queries]):
            if which:
                packed = self.patched([variants[i] for i in which])
                found[torch.tensor(which, device=found.device)] = self.readout(packed)
        return found

    def patched(self, variants: Sequence[Variant]) -> Packed:
        """What leaves the last layer that is read, of a batch of variants that change something."""
        parts: list[tuple[tuple[int, ...], list[int | None]]] = []
        for v in variants:
            columns = self.columns(v)
            if parts and parts[-1][0] == columns:
                parts[-1][1].append(v.unit)
            else:
                parts.append((columns, [v.unit]))
        with attend.switched(self.sweep.handle), self.sweep.products:
            entry = self.entry(variants[0].layer)
            layer, packed = entry(parts, variants[0].column is not None)
            return self.decoder.run(layer, packed)

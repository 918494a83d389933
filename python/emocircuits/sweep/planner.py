"""Before a sweep: how much arithmetic it is, how much it would be one patch at a time, the least it could be, how long.

Counted are the matrix products (2 per multiply-add) of the text decoder and of the unembedding, and in a plain pass the
linear layers and convolutions of a vision tower. Norms, rotary embedding, activations and a tower's attention are not,
and models with mixtures of experts are not counted at all.

A patch at (layer l, column p) leaves layers below l and columns before p as they are, so the least exact work is that
of layers >= l at columns >= p, less what these identities save:

- a patch of one column enters the next layer with one column: queries, keys and values are new there only, and every
  later query meets one replaced key and value, a rank-one change of its attention;
- the last layer computes only the columns that the metric reads; the values of the others come as ``W_V`` of one
  weighted sum, and the unembedding only its rows;
- patches before the first column in which the prompts differ change nothing, nor do those of the last layer in columns
  that the metric does not read.
"""

from __future__ import annotations

import dataclasses as dc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from emocircuits.families import Handle
from emocircuits.sweep import progress
from emocircuits.sweep.store import Patch

KINDS = ("heads", "neurons", "residual", "attn_out", "mlp_out", "qkv")
V = TypeVar("V", bound=Patch)


@dc.dataclass(frozen=True)
class Savings:
    """What a run makes use of, beyond starting at the patched layer and column."""

    one_column: bool = True
    """A patch of one column enters the next layer with that column's queries, keys and values alone."""
    replaced_key: bool = True
    """... and its replaced key and value through a correction of the softmax, not by attention computed again."""
    last_columns: bool = True
    """The last layer computes queries and MLP of the metric's columns alone."""
    absorbed_values: bool = True
    """... and ``W_V`` of a weighted sum in place of the values of all columns."""
    no_ops: bool = True
    """Patches that provably change nothing are answered."""


LEAST = Savings()
NONE = Savings(False, False, False, False, False)


@dc.dataclass(frozen=True)
class Shape:
    """Sizes that decide the arithmetic of one prompt pair.

    Attributes:
        layers, heads, kv_heads, head_dim, d_model, neurons, vocabulary: of the text decoder.
        gated: whether its MLP has three matrices (gate, up, down) or two.
        columns: T, the length of the prompt.
        first: first column in which the two prompts differ; 0 when the patch is not one of the clean prompt.
        reads: columns that the metric reads.
        rows: rows of the unembedding that it reads.
        windows: of every layer, how many keys back it sees; None for all.
        images: FLOPs of what is not the decoder (a vision tower) in one pass.
        generated: tokens that are generated after the prompt, at most.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    d_model: int
    neurons: int
    vocabulary: int
    gated: bool
    columns: int
    first: int
    reads: tuple[int, ...]
    rows: int
    windows: tuple[int | None, ...] = ()
    images: int = 0
    generated: int = 0

    @classmethod
    def of(
        cls, handle: Handle, columns: int, *, first: int = 0, reads: Sequence[int] | None = (-1,),
        rows: int | None = None, images: int = 0, generated: int = 0,
    ) -> Shape:  # fmt: skip
        """The shape of a model and a prompt.

        Args:
            handle: the model.
            columns: length of the prompt.
            first: first differing column.
            reads: columns of the metric, negative from the end; None: all.
            rows: of the unembedding; None: all.
            images: FLOPs outside the decoder in one pass (:func:`outside`).
            generated: tokens after the prompt, at most.

        Raises:
            NotImplementedError: the MLPs are mixtures of experts, whose work is not that of one matrix.
            ValueError: a column outside the prompt.
        """
        g = handle.geometry
        if not g.neurons:
            raise NotImplementedError("the work of mixtures of experts is not counted; sweep without a planner")
        chosen = range(columns) if reads is None else sorted({r + columns if r < 0 else r for r in reads})
        if not all(0 <= r < columns for r in chosen) or not 0 <= first <= columns:
            raise ValueError(f"columns {reads} and first difference {first}: expected inside a prompt of {columns}")
        size = int(handle.weight(handle.unembed).shape[0])
        gated = handle.family.gate is not None or handle.family.gate_up is not None
        return cls(
            g.layers, g.heads, g.kv_heads, g.head_dim, g.d_model, g.neurons, size, gated, columns, first,
            tuple(chosen), size if rows is None else rows, handle.windows, images, generated,
        )  # fmt: skip


class Work:
    """FLOPs of single patches of one shape."""

    def __init__(self, shape: Shape, savings: Savings = LEAST) -> None:
        self.shape, self.savings = shape, savings
        s, width = shape, shape.heads * shape.head_dim
        self.width, self.kv = width, shape.kv_heads * shape.head_dim
        self.q = self.o = 2 * s.d_model * width
        self.qkv = self.q + 4 * s.d_model * self.kv
        self.mlp = (6 if s.gated else 4) * s.d_model * s.neurons
        self._dense: dict[tuple[int, int], int] = {}
        self._attention: dict[int | None, list[int]] = {}

    @cached_property
    def head(self) -> int:
        """Unembedding of what the metric reads."""
        return 2 * self.shape.d_model * self.shape.rows * len(self.shape.reads)

    @cached_property
    def forward(self) -> int:
        """One plain pass over the whole prompt, all logits, image included."""
        s = self.shape
        layers = sum(s.columns * (self.qkv + self.o + self.mlp) + self.attention(k, 0) for k in range(s.layers))
        return layers + 2 * s.d_model * s.vocabulary * s.columns + s.images

    @cached_property
    def decoding(self) -> int:
        """All tokens after the first one that a prompt may generate, in passes of one column each."""
        s, total = self.shape, 0
        for column in range(s.columns, s.columns + max(0, s.generated - 1)):
            seen = sum(4 * self.width * self.seen(layer, column) for layer in range(s.layers))
            total += s.layers * (self.qkv + self.o + self.mlp) + seen + 2 * s.d_model * s.vocabulary
        return total

    def seen(self, layer: int, column: int) -> int:
        """Keys that the query of a column sees."""
        window = self.shape.windows[layer] if self.shape.windows else None
        return column + 1 if window is None else min(column + 1, window)

    def attention(self, layer: int, start: int) -> int:
        """Scores and weighted sums of the queries from ``start`` on."""
        window = self.shape.windows[layer] if self.shape.windows else None
        if window not in self._attention:
            seen = [4 * self.width * self.seen(layer, i) for i in range(self.shape.columns)]
            self._attention[window] = [*list(accumulate(reversed(seen)))[::-1], 0]
        return self._attention[window][start]

    def last(self, live: int, changed: int) -> int:
        """The last layer, ``live`` columns from the first changed one on, and what the metric reads of it."""
        s = self.shape
        reads = [r for r in s.reads if r >= s.columns - live]
        n, layer = len(reads), s.layers - 1
        if not n:
            return 0
        if not self.savings.last_columns or n == live:
            return live * (self.qkv + self.o + self.mlp) + self.attention(layer, s.columns - live)
        keys = 2 * s.d_model * self.kv * changed
        if self.savings.absorbed_values and not s.generated:
            # Weights of the changed columns times their residuals, then W_V of each sum.
            values = min(keys, n * (2 * s.heads * changed * s.d_model + 2 * s.d_model * self.width))
        else:
            values = keys
        attention = sum(4 * self.width * self.seen(layer, r) for r in reads)
        return keys + values + attention + n * (self.q + self.o + self.mlp)

    def dense(self, layer: int, column: int) -> int:
        """From ``layer`` on, all columns from ``column`` on changed, to the metric."""
        if (layer, column) not in self._dense:
            s = self.shape
            live, total = s.columns - column, self.head
            for k in range(layer, s.layers):
                if k == s.layers - 1:
                    total += self.last(live, live)
                else:
                    total += live * (self.qkv + self.o + self.mlp) + self.attention(k, column)
            self._dense[layer, column] = total
        return self._dense[layer, column]

    def point(self, layer: int, column: int) -> int:
        """From ``layer`` on, entered with one changed column."""
        s = self.shape
        if layer >= s.layers:
            return self.head
        if not self.savings.one_column:
            return self.dense(layer, column)
        live = s.columns - column
        if layer == s.layers - 1 and self.savings.last_columns:
            reads = sum(r >= column for r in s.reads)
            if self.savings.replaced_key:
                attention = reads * 6 * self.width
            else:
                attention = sum(4 * self.width * self.seen(layer, r) for r in s.reads if r >= column)
            return self.qkv + attention + reads * (self.o + self.mlp) + self.head
        attention = live * 6 * self.width if self.savings.replaced_key else self.attention(layer, column)
        return self.qkv + attention + live * (self.o + self.mlp) + self.dense(layer + 1, column)

    def enter(self, layer: int, column: int | None) -> int:
        """From the residual stream that enters ``layer`` on; ``column`` None: all from the first difference on."""
        if layer >= self.shape.layers:
            return self.head
        return self.dense(layer, self.shape.first) if column is None else self.point(layer, column)

    def changes(self, kind: str, patch: Patch) -> bool:
        """Whether the patch can change what the metric reads."""
        s = self.shape
        if s.first >= s.columns or (patch.column is not None and patch.column < s.first):
            return False
        start = s.first if patch.column is None else patch.column
        if not any(r >= start for r in s.reads):
            return False
        # What leaves the last layer reaches the metric in the same column only; keys and values reach later ones.
        mixes = kind == "residual" or (kind == "qkv" and not self.is_query(patch))
        ends = patch.layer == s.layers - 1 and not mixes
        return not ends or patch.column is None or patch.column in s.reads

    def patch(self, kind: str, patch: Patch, size: int = 1) -> int:
        """One patch: the change itself, and everything after it.

        Args:
            kind: one of :data:`KINDS`.
            patch: layer and column.
            size: neurons in a group, or heads patched together.
        """
        s = self.shape
        if self.savings.no_ops and not self.changes(kind, patch):
            return 0
        start = s.first if patch.column is None else patch.column
        if patch.layer == s.layers - 1 and kind != "residual" and kind != "qkv" and self.savings.last_columns:
            live = sum(r >= start for r in s.reads) if patch.column is None else int(start in s.reads)
        else:
            live = s.columns - start if patch.column is None else 1
        after = self.enter(patch.layer + 1, patch.column)
        if kind == "heads":
            return live * (2 * size * s.head_dim * s.d_model + self.mlp) + after
        if kind == "attn_out":
            return live * self.mlp + after
        if kind == "neurons":
            return live * 2 * size * s.d_model + after
        if kind == "mlp_out":
            return after
        if kind == "residual":
            return self.enter(patch.layer, patch.column)
        if kind == "qkv":
            return self._projection(patch, start)
        raise ValueError(f"target {kind!r}: expected one of {', '.join(KINDS)}")

    def _projection(self, patch: Patch, start: int) -> int:
        """A query acts in its own column, as its head does; a key or value in all later ones, in each of its heads."""
        s, layer = self.shape, patch.layer
        ends = layer == s.layers - 1 and self.savings.last_columns
        query = self.is_query(patch)
        columns = [start] if query and patch.column is not None else range(start, s.columns)
        live = [c for c in columns if not ends or c in s.reads]
        heads = 1 if query else s.heads // s.kv_heads
        if not query and patch.column is not None and self.savings.replaced_key:
            attention = 6 * heads * s.head_dim * len(live)
        else:
            attention = sum(4 * heads * s.head_dim * self.seen(layer, c) for c in live)
        after = self.enter(layer + 1, patch.column)
        if not query and layer + 1 < s.layers:
            after = self.dense(layer + 1, start)
        return attention + len(live) * (2 * heads * s.head_dim * s.d_model + self.mlp) + after

    def is_query(self, patch: Patch) -> bool:
        """Whether a patch of "qkv" is that of a query: units are the query heads, then keys, then values."""
        return patch.unit is not None and patch.unit < self.shape.heads


@dc.dataclass(frozen=True)
class Forecast:
    """What a sweep will be. FLOPs in all, seconds None where nothing was timed."""

    patches: int
    no_ops: int
    flops: int
    naive: int
    least: int
    forward: int
    seconds: float | None = None
    costs: tuple[int, ...] = ()
    generated: int = 0

    @classmethod
    def sum(cls, parts: Sequence[Forecast]) -> Forecast:
        """Of several sweeps in all; a plain pass is one of the first."""
        patches, no_ops, flops, naive, least = (
            sum(getattr(part, name) for part in parts) for name in ("patches", "no_ops", "flops", "naive", "least")
        )
        return cls(patches, no_ops, flops, naive, least, parts[0].forward, generated=parts[0].generated)

    @property
    def lines(self) -> list[str]:
        """A few lines to print before the run."""
        each = max(1, self.flops // max(1, self.patches))
        lines = [
            f"{self.patches:,} patches, {self.no_ops:,} of which provably change nothing and are answered, not run",
            f"work      {_size(self.flops)}, {_size(each)} a patch (one plain pass: {_size(self.forward)})",
            f"one patch at a time it would be {_size(self.naive)}: {self.naive / max(1, self.flops):.1f} times as much",
            f"least known exact work {_size(self.least)}: this run does {self.flops / max(1, self.least):.2f} of it",
        ]
        if self.generated:
            lines.append(f"generated text is counted as {self.generated} tokens a patch: the most it may be")
        if self.seconds is not None:
            lines.append(f"expected  {_time(self.seconds)} at the rate of a plain pass, measured just now")
        return lines


def forecast(
    shape: Shape, kind: str, variants: Sequence[V], *, size: int = 1, savings: Savings = LEAST,
    rate: float | None = None, cost: Callable[[Work, V], int] | None = None,
) -> Forecast:  # fmt: skip
    """Count a sweep.

    Args:
        shape: model and prompt.
        kind: one of :data:`KINDS`.
        variants: all patches.
        size: neurons in a group.
        savings: what the run makes use of.
        rate: FLOPs a second (:func:`measure`); None: no time is told.
        cost: of a patch, in place of :meth:`Work.patch`: 0 for one that changes nothing.
    """
    run, least = Work(shape, savings), Work(shape, LEAST)
    if cost is None:
        costs, lower = (tuple(work.patch(kind, v, size) for v in variants) for work in (run, least))
        no_ops = sum(not run.changes(kind, v) for v in variants)
    else:
        costs, lower = (tuple(cost(work, v) for v in variants) for work in (run, least))
        no_ops = sum(not c for c in lower)
    if shape.generated:
        costs, lower = (tuple(c and c + run.decoding for c in those) for those in (costs, lower))
    total = sum(costs)
    return Forecast(
        patches=len(variants), no_ops=no_ops, flops=total, naive=(run.forward + run.decoding) * len(variants),
        least=sum(lower), forward=run.forward, seconds=None if rate is None else total / rate, costs=costs,
        generated=shape.generated,
    )  # fmt: skip


@torch.no_grad()
def outside(handle: Handle, inputs: Mapping[str, Any]) -> int:
    """FLOPs of linear layers and convolutions outside the text decoder (a vision tower, a projector) in one pass."""
    inner = {id(m) for m in (*handle.text.modules(), *handle.unembed.modules())}
    total = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        total += 2 * output.numel() * (weight.numel() // weight.shape[0])

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [m for m in handle.model.modules() if id(m) not in inner and isinstance(m, kinds)]
    hooks = [m.register_forward_hook(count) for m in found]
    try:
        if hooks:
            handle.model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total


@torch.no_grad()
def measure(forward: Callable[[], object], flops: int, *, seconds: float = 0.5) -> float:
    """FLOPs a second of ``forward``, the fastest of a few calls after one that does not count."""
    forward()
    best, since = float("inf"), time.perf_counter()
    while time.perf_counter() - since < seconds or best == float("inf"):
        begin = time.perf_counter()
        forward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return flops / best


def announce(found: Forecast, forward: Callable[[], object]) -> None:
    """Print a forecast to standard error, with the time expected at the rate of ``forward``, timed here.

    Of several pairs one forecast is printed for all (:mod:`.several`).
    """
    if progress.heard(found):
        return
    rate = measure(forward, found.forward, seconds=0.2)
    told = dc.replace(found, seconds=found.flops / rate)
    tqdm.write("\n".join(told.lines), file=sys.stderr)


def _size(flops: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if flops < 1000:
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops:.3g} EFLOP"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"

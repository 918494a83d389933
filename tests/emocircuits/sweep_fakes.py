"""A sweep without an engine: values that only depend on the patch, and a record of what was computed."""

from typing import NamedTuple

import torch


class Variant(NamedTuple):
    layer: int
    column: int | None
    unit: int | None


def grid(layers=3, columns=4, units=2):
    """All patches of a small table, with its axes and labels."""
    variants = [Variant(l, c, u) for l in range(layers) for c in range(columns) for u in range(units)]
    labels = {"layer": list(range(layers)), "pos": list(range(columns)), "head": list(range(units))}
    return variants, ("layer", "pos", "head"), labels


def value(v):
    return v.layer + v.column / 10 + v.unit / 100


class Engine:
    """Gives values in chunks and remembers of what; ``stop`` raises after so many chunks."""

    def __init__(self, chunk=5, stop=None):
        self.chunk, self.stop, self.seen = chunk, stop, []

    def __call__(self, todo):
        for k, start in enumerate(range(0, len(todo), self.chunk)):
            if self.stop is not None and k == self.stop:
                raise KeyboardInterrupt
            part = slice(start, min(start + self.chunk, len(todo)))
            self.seen += todo[part]
            yield part, torch.tensor([value(v) for v in todo[part]], dtype=torch.float64)

"""Resample ablation: every patch gets the activations of a prompt that is drawn for it.

Zeros and means are activations that the model never has; those of another prompt are (Chan et al. 2022, "Causal
scrubbing"). Each patch has a random order of the prompts of its own, decided by the seed and by what is patched alone,
so the same patch is the same in a table of one layer and of all. Its first draws are the first prompts of that order:
no prompt counts twice, and as many draws as there are prompts are the mean over all of them, whatever the seed.
"""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from emocircuits.sweep import inputs
from emocircuits.sweep.engine import evaluate
from emocircuits.sweep.generated import positioned
from emocircuits.sweep.identity import hash_inputs
from emocircuits.sweep.planner import Work
from emocircuits.sweep.results import SweepResult
from emocircuits.sweep.targets import Target, Variant, first_difference, same_frame
from emocircuits.sweep.trace import Trace, trace

if TYPE_CHECKING:
    from emocircuits.sweep.api import Sweep


class Drawn(NamedTuple):
    """A patch with one of its draws: the number of the draw, and of the prompt."""

    layer: int
    column: int | None
    unit: int | None
    draw: int
    prompt: int


class Resampling:
    """Prompts that patches come from.

    Args:
        sweep: whose base run is patched.
        prompts: model inputs of one row, as long as the base prompt.
        draws: prompts for each patch.
        seed: decides them.

    Raises:
        ValueError, TypeError, NotImplementedError: no prompts, one that cannot stand in for the sweep's own, or more
            draws than prompts.
    """

    def __init__(self, sweep: Sweep, prompts: Sequence[Mapping[str, Any]] | None, draws: int, seed: int) -> None:
        if not isinstance(prompts, Sequence) or not prompts:
            raise ValueError("patch_with='resample' needs resample=, a list of the inputs of other prompts")
        if not 1 <= draws <= len(prompts):
            raise ValueError(f"draws={draws}: expected 1 to {len(prompts)}, the number of prompts to draw from")
        if seed < 0:
            raise ValueError(f"seed={seed}: expected at least 0")
        self.prompts = [positioned(sweep.handle, sweep.metric, p) if isinstance(p, Mapping) else p for p in prompts]
        self.draws, self.seed = draws, seed
        self.first: list[int] = []
        """Of every prompt, the first column in which it differs from the base prompt."""
        for i, given in enumerate(self.prompts):
            try:
                inputs.check(sweep.corrupt_inputs, inputs.of_one(given, "the prompt"))
                run = self.run(sweep, i)
                same_frame(sweep.base, run)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise type(error)(f"resample[{i}] cannot stand in for the prompts of the sweep: {error}") from error
            self.first.append(first_difference(sweep.base, run))

    def run(self, sweep: Sweep, prompt: int) -> Trace:
        """A run of a prompt. It is not kept: one is in memory at a time, and its patches take far longer."""
        with torch.inference_mode(), sweep.products:
            return trace(sweep.handle, self.prompts[prompt], f"resample[{prompt}]", sweep.activations)[0]

    def draw(self, variants: Sequence[Variant]) -> list[Drawn]:
        """All draws of all patches, prompt by prompt."""
        found: list[list[Drawn]] = [[] for _ in self.prompts]
        for v in variants:
            key = [self.seed, v.layer, 0 if v.column is None else v.column + 1, 0 if v.unit is None else v.unit + 1]
            order = np.random.default_rng(key).permutation(len(self.prompts))
            for draw, prompt in enumerate(order[: self.draws].tolist()):
                found[prompt].append(Drawn(*v, draw, prompt))
        return [d for those in found for d in those]

    def table(
        self, sweep: Sweep, target: Target, variants: Sequence[Variant], axes: tuple[str, ...],
        labels: dict[str, list[Any]], what: Mapping[str, Any],
    ) -> SweepResult:  # fmt: skip
        """As :meth:`Sweep.table`: the mean over draws, with the single draws in ``draws``."""

        def run(todo: Sequence[Drawn]) -> Iterator[tuple[slice, Tensor]]:
            start = 0
            for prompt, those in groupby(todo, key=lambda d: d.prompt):
                chosen = list(those)
                # The sweep of this prompt and the base run; what comes before they differ changes nothing.
                one = copy.copy(sweep)
                one.source, one.first, one.patch_with = self.run(sweep, prompt), self.first[prompt], "clean"
                for part, values in evaluate(one, target, chosen, sweep.batch):  # type: ignore[arg-type]
                    yield slice(start + part.start, start + part.stop), values
                start += len(chosen)

        identity = {"resample": [hash_inputs(p) for p in self.prompts], "draws": self.draws, "seed": self.seed}
        found = sweep.collected(
            run, _Counted(target.kind, target.groups, target.cost, tuple(self.first)), self.draw(variants),
            (*axes, "draw"), {**labels, "draw": list(range(self.draws))}, {**what, **identity},
        )  # fmt: skip
        draws = found.values.movedim(-1, 0).contiguous()
        meta = {**found.meta, "draws": self.draws, "seed": self.seed, "resample": len(self.prompts)}
        return dc.replace(found, values=draws.mean(0), axes=axes, labels=labels, meta=meta, draws=draws)


@dc.dataclass(frozen=True, eq=False)
class _Counted(Target):
    """The target as the planner counts it: of every prompt, what differs from the base prompt."""

    real: Callable[[Work, Variant], int] | None = None
    first: tuple[int, ...] = ()
    _works: dict[tuple[int, int], Work] = dc.field(default_factory=dict)

    def cost(self, work: Work, variant: Variant) -> int:
        """FLOPs of a drawn patch."""
        assert isinstance(variant, Drawn)
        assert self.real is not None
        key = (id(work), variant.prompt)
        if key not in self._works:
            self._works[key] = Work(dc.replace(work.shape, first=self.first[variant.prompt]), work.savings)
        return self.real(self._works[key], variant)

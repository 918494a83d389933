"""Steering: adding a vector to the residual stream that leaves a layer, layer by layer and strength by strength.

``h~ = h + alpha * S[l]`` in the run that is patched (Zhang et al., "Interpreting and Enhancing Emotional Circuits in
Large Vision-Language Models via Cross-Modal Information Flow", arXiv 2605.21980, Stage II; raw S). What is added is
computed by the table that :class:`~emocircuits.edits.AddVector` compiles to, on what the run had there: all strengths
of a layer enter the next layer as one batch. Tokens that are generated are steered too, each row of a batch by its own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses as dc
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from emocircuits.edits import AddVector
from emocircuits.plan import Plan
from emocircuits.roles import prompt_roles
from emocircuits.sweep.keys import span
from emocircuits.sweep.results import SweepResult
from emocircuits.sweep.resume import Decoder, Group, Packed
from emocircuits.sweep.rowplans import RowPlans
from emocircuits.sweep.targets import Entry, Target, Variant
from emocircuits.tables import compile_plan

if TYPE_CHECKING:
    from transformers import DynamicCache

    from emocircuits.sweep.api import Sweep
    from emocircuits.sweep.planner import Work

Vectors = Tensor | Mapping[str, Tensor]
Rows = Literal["all", "prompt", "last"]
Reading = Literal["raw", "relative", "norm-preserving"]
ROWS = ("all", "prompt", "last")
READINGS = ("raw", "relative", "norm-preserving")


@dc.dataclass(frozen=True, eq=False)
class SteeringTarget(Target):
    """Vectors and strengths; unit ``vector * len(alphas) + number of alpha``.

    Attributes:
        vectors: ``[V, L, d_model]`` float32.
        alphas: strengths.
        rows, reading: see :meth:`Sweep.steering`.
        first: first column that is no padding.
        roles: ``[1, T]`` of the prompt.
    """

    kind: str = "steering"
    vectors: Tensor = dc.field(default_factory=lambda: torch.zeros(0))
    alphas: tuple[float, ...] = ()
    rows: Rows = "all"
    reading: Reading = "raw"
    first: int = 0
    roles: Tensor = dc.field(default_factory=lambda: torch.zeros(0))

    def entry(self, sweep: Sweep, decoder: Decoder, layer: int) -> Entry:
        """See :class:`SteeringEntry`."""
        return SteeringEntry(sweep, decoder, self, layer)

    def changes(self, layer: int, unit: int | None) -> bool:
        """Whether anything is added."""
        assert unit is not None
        vector, alpha = divmod(unit, len(self.alphas))
        return self.alphas[alpha] != 0 and bool(self.vectors[vector, layer].any())

    def plan(self, layer: int, unit: int | None) -> Plan:
        """The same as an edit, for a patched model."""
        assert unit is not None
        vector, alpha = divmod(unit, len(self.alphas))
        return Plan(
            [
                AddVector(
                    [layer], self.vectors[vector, layer], by=self.alphas[alpha],
                    norm="keep" if self.reading == "norm-preserving" else "free", relative=self.reading == "relative",
                    to="last" if self.rows == "last" else None, phase="both" if self.rows == "all" else "prefill",
                )
            ]
        )  # fmt: skip

    @contextlib.contextmanager
    def steps(self, sweep: Sweep, variants: Sequence[Variant], cache: DynamicCache) -> Iterator[Any]:
        """Each row of the decoding batch is steered as its prompt was."""
        if self.rows != "all":
            yield None
            return
        plans = [self.plan(v.layer, v.unit) for v in variants]
        with RowPlans(sweep.handle.model, plans) as patched:
            which = torch.arange(len(plans), device=self.roles.device)
            patched.take_up(cache, self.roles.expand(len(plans), -1), which)
            yield patched.keep

    def cost(self, work: Work, variant: Variant) -> int:
        """FLOPs of all layers after the one that is steered."""
        start = self.first if variant.column is None else variant.column
        live = [r for r in work.shape.reads if r >= start]
        if not self.changes(variant.layer, variant.unit) or not live:
            return 0
        after = variant.layer + 1
        if after == work.shape.layers:
            return work.head if variant.column is None or variant.column in live else 0
        return work.dense(after, start) if variant.column is None else work.point(after, start)


class SteeringEntry(Entry):
    """What leaves the steered layer, as it enters the next one."""

    def __init__(self, sweep: Sweep, decoder: Decoder, target: SteeringTarget, layer: int) -> None:
        super().__init__(sweep.handle, decoder, target, layer, decoder.base.layers[layer].resid_post)
        self.steering = target

    def columns(self, column: int | None, start: int, unit: int | None = None) -> tuple[int, ...]:
        """From the first token on; empty where nothing is added."""
        if not self.steering.changes(self.layer, unit):
            return ()
        return super().columns(column, max(start, self.steering.first), unit)

    def __call__(
        self, parts: Sequence[tuple[tuple[int, ...], Sequence[int | None]]], point: bool
    ) -> tuple[int, Packed]:
        """Steer."""
        found, geometry = [], self.handle.geometry
        for columns, units in parts:
            # Rows of the prompt have the role 0 here, whatever they are: all that come in are steered.
            plans = [Plan([dc.replace(e, to=None) for e in self.steering.plan(self.layer, u)]) for u in units]
            hidden = self.patched[span(columns)].expand(len(units), -1, -1)
            table = compile_plan(Plan.per_row(plans), geometry, len(units), hidden.device, hidden.dtype)
            kinds = torch.zeros(hidden.shape[:2], dtype=torch.uint8, device=hidden.device)
            found.append(table[self.layer].vectors["resid_post"].apply(hidden, kinds).flatten(0, 1))
        groups = tuple(Group(columns, len(units)) for columns, units in parts)
        return self.layer + 1, Packed(torch.cat(found), groups, point)


def sweep_steering(
    sweep: Sweep, vectors: Vectors, layers: Sequence[int] | None, alphas: Sequence[float], rows: Rows, reading: Reading
) -> SweepResult:
    """See :meth:`Sweep.steering`."""
    if rows not in ROWS:
        raise ValueError(f"rows is {rows!r}, expected one of {', '.join(ROWS)}")
    if reading not in READINGS:
        raise ValueError(f"reading is {reading!r}, expected one of {', '.join(READINGS)}")
    chosen = sweep.layers(layers)
    g = sweep.handle.geometry
    names, stacked = _stacked(vectors, g.layers, g.d_model)
    strengths = _alphas(alphas)
    if reading == "relative":
        for name, of_layers in zip(names, stacked, strict=True):
            empty = [l for l in chosen if not bool(of_layers[l].any())]
            if empty:
                raise ValueError(
                    f"vector {name} is zero in layer {empty[0]}, which is no direction: leave the layer out, or use "
                    "reading='raw'"
                )
    on = copy.copy(sweep)
    on.first, on.resampling, on.patch_with = 0, None, f"steering {reading} {rows}"
    ids = (on.corrupt_inputs if on.direction == "denoise" else on.clean_inputs)["input_ids"]
    roles = prompt_roles(ids, on.real[None].to(ids.device), on.handle.placeholder_ids()).to(on.real.device)
    real = on.real.nonzero().flatten().tolist()
    target = SteeringTarget(
        vectors=stacked, alphas=strengths, rows=rows, reading=reading, first=real[0], roles=roles
    )  # fmt: skip
    units = range(len(names) * len(strengths))
    column = real[-1] if rows == "last" else None
    flat = on.table(
        target, [Variant(l, column, u) for l in chosen for u in units], ("layer", "unit"),
        {"layer": chosen, "unit": list(units)},
        {"positions": rows, "vectors": stacked, "alphas": strengths, "reading": reading},
    )  # fmt: skip
    return _arranged(flat, chosen, names, strengths, single=isinstance(vectors, Tensor) and vectors.ndim == 2)


def _arranged(
    flat: SweepResult, layers: list[int], names: list[Any], alphas: Sequence[float], single: bool
) -> SweepResult:
    """From [layer, unit] to [vector, layer, alpha], or [layer, alpha] for one vector."""
    shape = (len(layers), len(names), len(alphas))
    values, texts = flat.values.reshape(shape).transpose(0, 1), flat.texts
    meta = dict(flat.meta)
    if texts is not None:
        order = torch.arange(values.numel()).reshape(shape).transpose(0, 1).flatten().tolist()
        meta["texts"] = {**meta["texts"], "patched": [texts[i] for i in order]}
    labels: dict[str, list[Any]] = {"vector": names, "layer": layers, "alpha": list(alphas)}
    if single:
        del labels["vector"]
        values = values[0]
    return dc.replace(flat, values=values.contiguous(), axes=tuple(labels), labels=labels, meta=meta)


def _stacked(vectors: Vectors, layers: int, d_model: int) -> tuple[list[Any], Tensor]:
    """Names and ``[V, L, d_model]`` float32 on the CPU.

    Raises:
        TypeError, ValueError: something else, of another size, or values that are not finite.
    """
    if isinstance(vectors, Mapping):
        if not vectors:
            raise ValueError("vectors is empty: there is nothing to steer with")
        names: list[Any] = [str(name) for name in vectors]
        parts = [_one(v, f"vectors[{name!r}]", layers, d_model) for name, v in vectors.items()]
        return names, torch.stack(parts)
    if not isinstance(vectors, Tensor):
        raise TypeError(
            f"vectors is {type(vectors).__name__}: expected a tensor [layers, d_model] or [vectors, layers, d_model], "
            "or a dict of them by name"
        )
    several = vectors if vectors.ndim == 3 else vectors[None]
    if not len(several):
        raise ValueError("vectors is empty: there is nothing to steer with")
    return list(range(len(several))), torch.stack([_one(v, "vectors", layers, d_model) for v in several])


def _one(vector: Any, name: str, layers: int, d_model: int) -> Tensor:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} is {type(vector).__name__}: expected a tensor [layers, d_model]")
    if tuple(vector.shape) != (layers, d_model):
        raise ValueError(
            f"{name} is {list(vector.shape)}: expected a vector for every layer, [{layers}, {d_model}] (layers= "
            "chooses among them)"
        )
    found = vector.detach().to("cpu", torch.float32)
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name} has NaN or infinite values")
    return found


def _alphas(alphas: Sequence[float]) -> tuple[float, ...]:
    try:
        found = tuple(float(a) for a in alphas)
    except TypeError as error:
        raise TypeError(f"alphas is {alphas!r}: expected numbers such as (0.1, 0.5, 1.0)") from error
    if not found or len(set(found)) != len(found) or not all(math.isfinite(a) for a in found):
        raise ValueError(f"alphas {alphas}: expected distinct finite numbers, at least one")
    return found

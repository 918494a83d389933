"""Grids of interventions: many plans, such as all strengths of a method, on many prompts, in one go.

A row of a batch is a prompt under a plan. What plans share of the pass over a prompt is computed once
(:mod:`.branching`), and all rows of a batch are decoded together, each under its own plan, whether their prompts are
the same or not; rows leave when they are finished. Every cell is what ``patch(model, plan)`` gives for its prompt.
"""

from __future__ import annotations

import dataclasses as dc
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emocircuits.edits import CACHE_SITES
from emocircuits.families import Handle, open_model
from emocircuits.plan import Plan
from emocircuits.sweep import inputs as given_inputs
from emocircuits.sweep.branching import Branching, gather
from emocircuits.sweep.collect import collect
from emocircuits.sweep.decoding import decode
from emocircuits.sweep.engine import _out_of_memory
from emocircuits.sweep.generated import CPU_BYTES, ROWS, SHARE, Generated, Said
from emocircuits.sweep.identity import hash_inputs
from emocircuits.sweep.metrics import Metric, declared
from emocircuits.sweep.packed import Products
from emocircuits.sweep.results import SweepResult
from emocircuits.sweep.rowplans import refuse_fixed
from emocircuits.sweep.stale import refuse_patched
from emocircuits.sweep.store import Store, open_store
from emocircuits.sweep.targets import Variant
from emocircuits.sweep.trace import refuse_hooks
from emocircuits.tables import LayerTables, check
from emokernels import Role

if TYPE_CHECKING:
    from emocircuits.sweep.api import Sweep

Inputs = Mapping[str, Any]
Axes = Mapping[str, Sequence[Any]]
CPU_TOKENS, TOKENS = 4096, 65536
"""Tokens of a pass whose logits are read, on a CPU and elsewhere."""


def plan_grid(
    model: nn.Module, prompts: Inputs | Sequence[Inputs], plan: Callable[..., Plan], axes: Axes, metric: Any, *,
    batch: int | None = None, out: str | Path | None = None, progress: bool = True,
) -> SweepResult:  # fmt: skip
    """The metric of prompts under every plan of a grid: one axis for each strength.

    Args:
        model: as for :class:`~emocircuits.sweep.Sweep`.
        prompts: model inputs of one row, or a list of them; they need not be as long as one another.
        plan: from one value of every axis, by name, to a plan. Plans that name batch rows or positions, and gates, are
            refused.
        axes: values by name, such as ``{"beta": (1.2, 1.6), "gamma": (1.0, 1.6)}``.
        metric: declared, from :func:`~emocircuits.sweep.generated`, or a function of logits; ``kl()`` is that to the
            prompt without a plan.
        batch: rows (a prompt under a plan) in a batch; None: what memory allows.
        out: a folder in which values are kept while they come in; a killed grid resumes.
        progress: show a bar.

    Returns:
        Values ``[*axes]``, of several prompts their mean, with ``pairs`` ``[prompts, *axes]``; ``clean`` and
        ``corrupt`` are both the metric without a plan, so there are no effects.

    Raises:
        TypeError, ValueError, NotImplementedError: what cannot be run exactly, before anything runs.
    """
    listed = [prompts] if isinstance(prompts, Mapping) else list(prompts)
    if not listed:
        raise ValueError("there are no prompts")
    handle, chosen = open_model(model), declared(metric)
    refuse_patched(handle)
    refuse_hooks(handle)
    run = PlanRun(handle, listed, _plans(plan, axes), axes, chosen, batch, Products(handle))
    store = None if out is None else run.store(Path(out) / "grid", {})
    return SweepResult.mean(run.results(store, progress))


def sweep_grid(sweep: Sweep, plan: Callable[..., Plan], axes: Axes) -> SweepResult:
    """See :meth:`Sweep.grid`."""
    refuse_hooks(sweep.handle)
    denoise = sweep.direction == "denoise"
    sides = (sweep.corrupt_inputs, sweep.clean_inputs)
    inputs, other = sides if denoise else sides[::-1]
    run = PlanRun(sweep.handle, [inputs], _plans(plan, axes), axes, sweep.metric, sweep.batch, sweep.products)
    if not isinstance(sweep.metric, Generated):
        run.reference = sweep.readout.reference
    what = {"other": hash_inputs(other), "direction": sweep.direction}
    store = None if sweep.out is None else run.store(Path(sweep.out) / "grid", what)
    (found,) = run.results(store, sweep.progress)
    meta = {**found.meta, "direction": sweep.direction}
    return dc.replace(found, clean=sweep.clean, corrupt=sweep.corrupt, meta=meta)


def _plans(plan: Callable[..., Plan], axes: Axes) -> list[Plan]:
    """The plan of every cell.

    Raises:
        TypeError: something that is no plan.
        ValueError: no axes, an axis without values, or with one twice.
    """
    if not axes:
        raise ValueError("axes is empty: expected values by name, such as {'beta': (1.2, 1.6)}")
    for name, values in axes.items():
        if not len(values) or len(set(values)) != len(values):
            raise ValueError(f"{name}={values!r}: expected distinct values, at least one")
    found = [plan(**dict(zip(axes, cell, strict=True))) for cell in itertools.product(*axes.values())]
    for made in found:
        if not isinstance(made, Plan):
            raise TypeError(f"plan gave a {type(made).__name__}: expected a Plan")
    return found


class PlanRun:
    """Prompts under plans.

    Attributes:
        plans: without doubles; the first one is empty.
        cells: of every cell of the grid, its plan.
        reference: what the metric of logits compares with, ``[1, columns, rows]``; None: the prompt without a plan.
    """

    def __init__(
        self, handle: Handle, prompts: Sequence[Inputs], plans: Sequence[Plan], axes: Axes, metric: Metric,
        batch: int | None, products: Products,
    ) -> None:  # fmt: skip
        if batch is not None and batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        if metric.depth is not None:
            raise NotImplementedError("a grid reads logits or generated texts, not what leaves a layer")
        self.prompts = [_prompt(p, i) for i, p in enumerate(prompts)]
        for p in self.prompts:
            metric.columns(p["input_ids"].shape[1])
        number = {plan: n for n, plan in enumerate(dict.fromkeys([Plan(), *plans]))}
        self.plans, self.cells = list(number), [number[plan] for plan in plans]
        for plan in self.plans[1:]:
            refuse_fixed(plan, "a plan of the grid")
            check(plan, handle.geometry)
            if Role.VISUAL in plan.roles_used() and not handle.sees:
                raise ValueError(
                    f"a plan of the grid edits visual tokens, and {type(handle.model).__name__} is a text-only model"
                )
        self.handle, self.metric, self.batch, self.products = handle, metric, batch, products
        self.axes = {name: list(values) for name, values in axes.items()}
        self.reference: Tensor | None = None
        self.said: dict[tuple[int, int], Said] = {}
        self._scores: dict[tuple[int, ...], tuple[Said, float]] = {}
        self._references: dict[int, Tensor] = {}
        self._compiled: dict[int, LayerTables] | None = None
        # Features that are added between layers are of prompts, not of the rows of a layer, and a cache is edited when
        # the pass has ended: rows are then their own from the beginning.
        cached = any(getattr(edit, "site", None) in CACHE_SITES for plan in self.plans for edit in plan)
        self.parts = not cached and not handle.family.between_layers

    def variants(self) -> list[Variant]:
        """A "layer" is a prompt here and a unit a plan; prompts of one form follow one another."""
        order = sorted(range(len(self.prompts)), key=lambda i: (_form(self.prompts[i]), i))
        return [Variant(p, None, n) for p in order for n in range(len(self.plans))]

    def results(self, store: Store | None, progress: bool) -> list[SweepResult]:
        """The table of every prompt."""
        labels: dict[str, list[Any]] = {"layer": list(range(len(self.prompts))), "unit": list(range(len(self.plans)))}
        dtype = str(next(self.handle.text.parameters()).dtype).removeprefix("torch.")
        meta: dict[str, Any] = {"target": "grid", "direction": "denoise", "patch_with": "plans", "dtype": dtype}
        said = (lambda v: self.said.pop((v.layer, v.unit))) if isinstance(self.metric, Generated) else None
        flat = collect(
            self.evaluate, self.variants(), axes=("layer", "unit"), labels=labels, clean=0.0, corrupt=0.0, meta=meta,
            store=store, progress=progress, said=said,
        )  # fmt: skip
        shape, found = [len(v) for v in self.axes.values()], []
        for p, row in enumerate(flat.values):
            base, more = float(row[0]), dict(meta)
            if flat.texts is not None:
                texts = flat.texts[p * len(self.plans) :]
                more["texts"] = {"corrupt": texts[0], "clean": texts[0], "patched": [texts[n] for n in self.cells]}
            found.append(SweepResult(row[self.cells].reshape(shape), base, base, tuple(self.axes), {**self.axes}, more))
        return found

    def store(self, folder: Path, what: Mapping[str, Any]) -> Store:
        """What keeps the values."""
        if isinstance(self.metric, Generated):
            config: Any = self.handle.model.generation_config
            what = {**what, "generation": config.to_diff_dict()}
        return open_store(
            folder, model=self.handle.model, clean={str(i): p for i, p in enumerate(self.prompts)}, corrupt={},
            variants=self.variants(), baselines=(0.0, 0.0),
            what={**what, "target": "grid", "plans": [p.digest() for p in self.plans], "metric": self.metric},
        )  # fmt: skip

    def evaluate(self, variants: Sequence[Variant]) -> Iterator[tuple[slice, Tensor]]:
        """Values of rows, batch by batch: prompts of one form. Batches are halved, for good, when memory runs out."""
        at, limit = 0, sys.maxsize
        while at < len(variants):
            first = self.prompts[variants[at].layer]
            end, most = at, min(limit, self.batch or self._rows(first))
            while end < len(variants) and end - at < most and _form(self.prompts[variants[end].layer]) == _form(first):
                end += 1
            rows = [(v.layer, v.unit or 0) for v in variants[at:end]]
            found = None
            try:
                with torch.no_grad(), self.products:
                    found = self._generate(rows) if isinstance(self.metric, Generated) else self._read(rows)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or len(rows) == 1:
                    raise
            if found is None:
                # Only here has the error let go of what the batch had computed.
                limit = len(rows) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            yield slice(at, end), found
            at = end

    def _rows(self, prompt: Inputs) -> int:
        """Rows of a batch."""
        columns, g = prompt["input_ids"].shape[1], self.handle.geometry
        weight = next(self.handle.text.parameters())
        on_cpu = weight.device.type == "cpu"
        if not isinstance(self.metric, Generated):
            return max(1, (CPU_TOKENS if on_cpu else TOKENS) // columns)
        # Keys and values, and once more while rows are taken out of them.
        row = 4 * weight.element_size() * g.layers * g.kv_heads * g.head_dim * (columns + self.metric.limit)
        room = CPU_BYTES if on_cpu else int(SHARE * torch.cuda.mem_get_info(weight.device)[0])
        return max(1, min(ROWS, room // row))

    def _generate(self, rows: Sequence[tuple[int, int]]) -> Tensor:
        """Scores ``[n]`` float64 of what each row says."""
        assert isinstance(self.metric, Generated)
        local, inputs = self._joined(rows)
        prompt = self.metric.prompt(self.handle, inputs)
        with self._patched() as patched:
            device, columns = prompt.ids.device, prompt.ids.shape[1]
            plans = torch.tensor([n for _, n in rows], device=device)
            if self.parts:
                with patched.parting(local, columns - 1) as found:
                    cache, logits = prompt.prefill()
                gather(cache, found)
                own = torch.tensor([p for p, _ in local], device=device)
                logits, roles, prompt = logits[found[-1].rows], patched.whole[own], prompt.rows(own)
            else:
                patched.follow(plans)
                cache, logits = prompt.prefill()
                assert patched.context.columns is not None
                roles = patched.context.columns.roles
            patched.take_up(cache, roles[:, :columns], plans)
            ids = decode(prompt, cache, logits, patched.keep)
        values = []
        for row, tokens in zip(rows, ids, strict=True):
            key = tuple(tokens.tolist())
            if key not in self._scores:
                said = self.metric.said(key)
                self._scores[key] = said, self.metric.of(said)
            self.said[row], value = self._scores[key]
            values.append(value)
        return torch.tensor(values, dtype=torch.float64)

    def _read(self, rows: Sequence[tuple[int, int]]) -> Tensor:
        """The metric ``[n]`` float64 of each row's logits."""
        local, inputs = self._joined(rows)
        columns = list(self.metric.columns(inputs["input_ids"].shape[1]))
        with self._patched() as patched:
            if self.parts:
                with patched.parting(local, columns[0]) as found:
                    logits = self._logits(inputs, columns, cache=True)
                logits = logits[found[-1].rows]
            else:
                patched.follow(torch.tensor([n for _, n in rows], device=inputs["input_ids"].device))
                logits = self._logits(inputs, columns)
        work = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not bool(work.isfinite().all()):
            raise ValueError("logits have NaN or infinite values under a plan; nothing can be measured")
        if self.reference is not None:
            return self.metric(work, self.reference.to(work)).double().cpu()
        values = []
        for at, (prompt, number) in enumerate(rows):
            if number == 0:
                self._references[prompt] = work[at : at + 1].clone()
            elif prompt not in self._references:  # a killed grid had it already
                plain = self._logits(self.prompts[prompt], columns)
                self._references[prompt] = plain.to(torch.promote_types(plain.dtype, torch.float32))
            values.append(self.metric(work[at : at + 1], self._references[prompt]))
        self._references = {rows[-1][0]: self._references[rows[-1][0]]}  # its plans may go on in the next batch
        return torch.cat(values).double().cpu()

    def _logits(self, inputs: Inputs, columns: list[int], *, cache: bool = False) -> Tensor:
        """``[n, columns, rows]``, of no more columns than wanted where the model can leave the others out."""
        model: Any = self.handle.model
        options: dict[str, Any] = {}
        # From the end: the columns before them may have been run apart.
        columns = [c - inputs["input_ids"].shape[1] for c in columns]
        if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
            options["logits_to_keep"] = torch.tensor(columns, device=inputs["input_ids"].device)
        logits: Tensor = model(**inputs, use_cache=cache, **options).logits
        logits = logits if options else logits[:, columns]
        return logits if self.metric.rows is None else logits[..., list(self.metric.rows)]

    def _patched(self) -> Branching:
        """The model under all plans, whose tables are compiled once."""
        patched = Branching(self.handle.model, self.plans)
        if self._compiled is None:
            self._compiled = patched.compiled()
        patched.use(self._compiled)
        return patched

    def _joined(self, rows: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], dict[str, Any]]:
        """Rows by number of the prompt among those of the batch, and these prompts as one batch."""
        which = list(dict.fromkeys(p for p, _ in rows))
        number = {p: i for i, p in enumerate(which)}
        taken = which if self.parts else [p for p, _ in rows]
        return [(number[p], n) for p, n in rows], join([self.prompts[p] for p in taken])


def join(prompts: Sequence[Inputs]) -> dict[str, Any]:
    """Prompts of one form as a batch, in their order."""
    found: dict[str, Any] = {}
    for name, value in prompts[0].items():
        found[name] = value
        if isinstance(value, Tensor):
            # Positions of three axes have the rows second.
            found[name] = torch.cat([p[name] for p in prompts], 1 if name == "position_ids" and value.ndim == 3 else 0)
    return found


def _form(prompt: Inputs) -> tuple[Any, ...]:
    """Prompts of one form make a batch."""
    shapes = {k: tuple(v.shape[1:]) if isinstance(v, Tensor) else repr(v) for k, v in prompt.items()}
    return tuple((k, str(v)) for k, v in sorted(shapes.items()))


def _prompt(given: Any, number: int) -> Inputs:
    found = given_inputs.of_one(given, f"prompt {number}")
    shape = tuple(found["input_ids"].shape)
    if len(shape) != 2 or shape[0] != 1 or not shape[1]:
        raise ValueError(f"prompt {number}: input_ids are {list(shape)}, expected [1, tokens]; give a list of prompts")
    if found.get("past_key_values") is not None:
        raise ValueError(f"prompt {number} continues on a cache; give the whole prompt")
    return {k: v for k, v in found.items() if v is not None}

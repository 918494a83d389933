"""``Sweep``: exact activation patching of a model on a pair of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor, nn

from emocircuits.families import open_model
from emocircuits.plan import Plan
from emocircuits.roles import prompt_roles
from emocircuits.sweep import inputs
from emocircuits.sweep.attribution.edges import EdgeMethod, sweep_edges
from emocircuits.sweep.attribution.graph import EdgeResult
from emocircuits.sweep.attribution.nodes import Method, estimates
from emocircuits.sweep.attribution.prescreen import Screen, screened
from emocircuits.sweep.collect import collect
from emocircuits.sweep.combinations import Heads, sweep_combinations
from emocircuits.sweep.engine import Run as Runner
from emocircuits.sweep.engine import evaluate
from emocircuits.sweep.generated import Continuation, positioned, readout, runner
from emocircuits.sweep.grids import Axes, sweep_grid
from emocircuits.sweep.memory import WHERE, Where
from emocircuits.sweep.metrics import Metric, declared
from emocircuits.sweep.packed import Products
from emocircuits.sweep.planner import Forecast, Savings, Shape, announce, forecast, outside
from emocircuits.sweep.qkv import names
from emocircuits.sweep.readout import finishing, refuse_padding
from emocircuits.sweep.resample import Resampling
from emocircuits.sweep.results import SweepResult
from emocircuits.sweep.routes import Run, sweep_routes
from emocircuits.sweep.several import Several, one_or_several, over_pairs
from emocircuits.sweep.stale import Weights, refuse_patched
from emocircuits.sweep.steering import Reading as Added
from emocircuits.sweep.steering import Rows, Vectors, sweep_steering
from emocircuits.sweep.store import Store, open_store
from emocircuits.sweep.targets import (
    KINDS,
    PATCHES,
    UNITS,
    Target,
    Variant,
    first_difference,
    refuse_wrapped,
    same_frame,
    values,
)
from emocircuits.sweep.trace import refuse_hooks, refuse_lost_cap, trace
from emokernels import Role

if TYPE_CHECKING:
    from emocircuits.edits.heads import Reading

Positions = str | Role | Sequence[int]
Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]]
Measure = Metric | Callable[[Tensor], Any] | Sequence[Metric | Callable[[Tensor], Any]]
DOES = Savings(absorbed_values=False)


class Sweep:
    """Activation patching between two prompts, every patch exact, nothing computed twice.

    Both prompts run once, when the sweep is made, images included. Each patch then starts at its layer, in its column,
    from what the base run had there.

    Of several pairs each is swept in turn, and every table is the mean over them, with the pairs' own tables in its
    ``pairs`` and a bootstrap over them in its ``interval()``.

    Args:
        model: a Hugging Face model of a family that :func:`~emocircuits.families.open_model` knows, in eval mode.
        clean, corrupt: model inputs of one row each and of the same token length. For several pairs lists of them, or
            batches of text prompts, a pair in each row; pairs need not be as long as one another.
        metric: from :mod:`.metrics`, or a function from logits ``[1, tokens, vocabulary]`` to one number; for several
            pairs one for all, or a list.
        direction: "denoise" patches clean values into the corrupt run, "noise" corrupt ones into the clean run.
        patch_with: "clean" (the values of the other prompt), "zero", "mean" (of the other prompt, over its tokens), or
            a tensor that broadcasts to ``[tokens, ...]`` of what is patched (``[heads, head_dim]``, ``[neurons]`` or
            ``[d_model]``), or "resample" (the values of prompts drawn from `resample`, each patch its own).
        batch: whole prompts in a batch; None: what memory allows.
        out: a folder in which results are kept while they come in, one for each target; a killed sweep resumes.
        progress: show a bar with the time that remains.
        resample: prompts to draw from, as long as the pair's own.
        draws: prompts for each patch; the table is the mean over them, their own tables are in its ``draws``.
        seed: of the draws.
        activations: where those of the two prompts are kept: on the "device", on the "host" (pinned memory, from which
            a layer's come to the device when they are read), or "auto": on the device of what fits into half of its
            free memory.

    Raises:
        TypeError, ValueError, NotImplementedError: what cannot be swept exactly is refused here, before any patch runs.
    """

    clean: float
    corrupt: float
    several: Several | None = None

    @one_or_several
    def __init__(
        self, model: nn.Module, clean: Inputs, corrupt: Inputs, metric: Measure, direction: str = "denoise",
        patch_with: str | Tensor = "clean", batch: int | None = None, out: str | Path | None = None,
        progress: bool = True, resample: Sequence[Mapping[str, Any]] | None = None, draws: int = 1, seed: int = 0,
        activations: Where = "auto",
    ) -> None:  # fmt: skip
        if direction not in ("denoise", "noise"):
            raise ValueError(f"direction is {direction!r}, expected 'denoise' or 'noise'")
        if not isinstance(patch_with, Tensor) and patch_with not in PATCHES:
            raise ValueError(f"patch_with is {patch_with!r}, expected one of {', '.join(PATCHES)} or a tensor")
        resampled = isinstance(patch_with, str) and patch_with == "resample"
        if resample is not None and not resampled:
            raise ValueError("resample= is given, and patch_with is not 'resample': nothing would be drawn from it")
        if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
            raise ValueError(f"batch is {batch!r}, expected a whole number of prompts, at least 1")
        if activations not in WHERE:
            raise ValueError(f"activations is {activations!r}, expected one of {', '.join(WHERE)}")
        if isinstance(patch_with, Tensor) and not bool(torch.isfinite(patch_with).all()):
            raise ValueError("patch_with has NaN or infinite values")
        clean, corrupt = inputs.of_one(clean, "clean"), inputs.of_one(corrupt, "corrupt")
        self.columns = inputs.check(clean, corrupt)
        self.metric = declared(metric)
        self.metric.columns(self.columns)
        self.handle = open_model(model)
        clean, corrupt = (positioned(self.handle, self.metric, given) for given in (clean, corrupt))
        self.clean_inputs, self.corrupt_inputs = clean, corrupt
        self.direction, self.patch_with, self.batch, self.out, self.progress = (
            direction, patch_with, batch, out, progress,
        )  # fmt: skip
        self.activations = activations
        refuse_patched(self.handle)
        refuse_hooks(self.handle)
        self.products = Products.of(self.handle)
        with torch.inference_mode(), self.products:
            runs = []
            for side, given in (("clean", clean), ("corrupt", corrupt)):
                # The run that patches come from stays on the device only where the other one fits there too.
                both = 2 if (side, direction) == ("clean", "denoise") else 1
                run, logits = trace(self.handle, given, side, activations, both)
                finish = finishing(self.handle, run, logits)
                if side == "clean":
                    refuse_lost_cap(self.handle, given, logits)
                runs.append(run)
                del logits
            clean_run, corrupt_run = runs
            if clean_run.columns != self.columns:
                raise NotImplementedError(
                    f"the text decoder sees {clean_run.columns} columns of {self.columns} tokens: give input_ids in "
                    "which every image already has its placeholder tokens"
                )
            same_frame(clean_run, corrupt_run)
            self.base, self.source = (corrupt_run, clean_run) if direction == "denoise" else (clean_run, corrupt_run)
            self.first = first_difference(clean_run, corrupt_run)
            self.readout = readout(self, clean_run, finish)
            self.clean, self.corrupt = (
                float(self.readout.value(self.readout.of(run))) for run in (clean_run, corrupt_run)
            )
        mask = corrupt.get("attention_mask")
        device = self.base.layers[0].resid_pre.device
        self.real = torch.ones(self.columns, dtype=torch.bool, device=device)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.real = mask[0].bool().to(device)
        refuse_padding(self.readout, self.real)
        for side, value in (("clean", self.clean), ("corrupt", self.corrupt)):
            if not math.isfinite(value):
                raise ValueError(f"the metric of the {side} prompt is {value}: nothing can be measured with it")
        self.weights = Weights(self.handle, self.readout.kept)
        self.resampling = Resampling(self, resample, draws, seed) if resampled else None

    # ---- targets --------------------------------------------------------------------------------------

    @over_pairs
    def heads(
        self, positions: Positions = "all", layers: Sequence[int] | None = None, **screen: Unpack[Screen]
    ) -> SweepResult:
        """Head outputs ``z``: axes [layer, head] for all positions at once, else [layer, pos, head].

        With ``prescreen="atp*"`` (or "atp", "ig") all patches are estimated, and the engine runs the ``confirm=64``
        strongest of them and ``sample=32`` others, drawn at random: see :class:`.attribution.prescreen.Screen`. The
        result's ``exact`` says which values are exact, ``meta["prescreen"]`` how good the estimates were. Residual,
        attn_out, mlp_out, qkv and neurons take the same options.
        """
        return self._sweep(*self.target("heads"), positions, layers, **screen)

    @over_pairs
    def residual(
        self, positions: Positions = "all", layers: Sequence[int] | None = None, **screen: Unpack[Screen]
    ) -> SweepResult:
        """The residual stream that enters a layer: [layer] or [layer, pos]."""
        return self._sweep(*self.target("residual"), positions, layers, **screen)

    @over_pairs
    def attn_out(
        self, positions: Positions = "all", layers: Sequence[int] | None = None, **screen: Unpack[Screen]
    ) -> SweepResult:
        """What attention adds to the residual stream: [layer] or [layer, pos]."""
        return self._sweep(*self.target("attn_out"), positions, layers, **screen)

    @over_pairs
    def mlp_out(
        self, positions: Positions = "all", layers: Sequence[int] | None = None, **screen: Unpack[Screen]
    ) -> SweepResult:
        """What the MLP adds to the residual stream: [layer] or [layer, pos]."""
        return self._sweep(*self.target("mlp_out"), positions, layers, **screen)

    @over_pairs
    def qkv(
        self, positions: Positions = "all", layers: Sequence[int] | None = None, **screen: Unpack[Screen]
    ) -> SweepResult:
        """Queries of a head, keys or values of a key-value head: [layer, qkv] or [layer, pos, qkv].

        They are patched as attention gets them, after rotary embedding; labels are "q0", ..., "k0", ..., "v0", ...
        """
        return self._sweep(*self.target("qkv"), positions, layers, **screen)

    @over_pairs
    def neurons(
        self, groups: int | Sequence[Sequence[int]] = 16, positions: Positions = "all",
        layers: Sequence[int] | None = None, **screen: Unpack[Screen],
    ) -> SweepResult:  # fmt: skip
        """Groups of neurons, patched together: [layer, group] or [layer, pos, group].

        Args:
            groups: so many equal runs of neurons, or lists of neuron numbers, the same in every layer.
            positions: see :meth:`heads`.
            layers: all by default.

        Raises:
            NotImplementedError: the MLPs are mixtures of experts.
            ValueError: a neuron that the MLP does not have, or more groups than neurons.
        """
        target, units = self.target("neurons", groups)
        return self._sweep(target, units, positions, layers, **screen)

    @over_pairs
    def routes(
        self, edit: Literal["knockout", "boost"] = "knockout", by: float | None = None,
        reading: Reading | None = None, routes: Sequence[tuple[str | Role, str | Role]] | None = None,
        layers: Sequence[int] | None = None, run: Run = "clean",
    ) -> SweepResult:  # fmt: skip
        """Attention of one head along one route (destination role <- source role): [layer, head, route].

        An edit acts on all columns of the destination role, in one run, and takes nothing from the other prompt:
        `direction` and `patch_with` do not matter. Labels are "query<-visual", ...

        Args:
            edit: "knockout" masks the route (the rest of the row is renormalised; a row that sees nothing else gives
                0), "boost" strengthens it.
            by, reading: of a boost, as in :class:`~emocircuits.edits.BoostRoute`: "weight" (default), "logit-add",
                "logit-scale" or "logit-abs".
            routes: (destination, source) pairs of roles; None: all that tokens of the prompt have.
            layers: all by default.
            run: the prompt that is edited: "clean" asks which routes the clean answer needs (an effect of 1 is no
                harm), "corrupt" which ones would bring it back.

        Raises:
            ValueError: a route that no two tokens of the prompt have, or a strength that the reading does not take.
        """
        return sweep_routes(self, edit, by, reading, routes, layers, run)

    @over_pairs
    def combinations(
        self, heads: Heads, size: int | Sequence[int] = 2, positions: Positions = "all", top: int = 10,
        limit: int = 5000,
    ) -> SweepResult:  # fmt: skip
        """Sets of heads patched together: [combination] or [combination, pos], labels such as "3.1+4.7".

        Each head of a set is overwritten, whatever the patches below made of it. How far a set is from the sum of its
        heads: :func:`~emocircuits.sweep.interaction`.

        Args:
            heads: (layer, head) pairs, or the result of :meth:`heads`, of which the `top` strongest are taken.
            size: heads in a set: 2 for pairs, 3 for triples, or several sizes.
            positions: see :meth:`heads`; a set is patched in the same columns.
            top: how many heads of a result.
            limit: patches that may be run.

        Raises:
            ValueError: a head that is not there, or more patches than `limit`.
        """
        return sweep_combinations(self, heads, size, positions, top, limit)

    @over_pairs
    def steering(
        self, vectors: Vectors, layers: Sequence[int] | None = None, alphas: Sequence[float] = (0.1, 0.5, 1.0),
        rows: Rows = "all", reading: Added = "raw",
    ) -> SweepResult:  # fmt: skip
        """``h + alpha * S[l]`` where the residual stream leaves a layer: [layer, alpha], or [vector, layer, alpha].

        The run that is patched is steered (the corrupt one, unless `direction` is "noise"), and nothing comes from the
        other prompt but its baseline. Each cell is what a model patched with
        :class:`~emocircuits.edits.AddVector` gives.

        Args:
            vectors: S, ``[layers, d_model]`` with a vector for every layer of the model, ``[vectors, layers,
                d_model]``, or a dict of the former by name; used in float32.
            layers: all by default.
            alphas: strengths.
            rows: that are steered: "all", of the prompt and what is generated after it, "prompt", or "last", the last
                one of the prompt.
            reading: "raw"; "relative": ``h + alpha * |h| * S/|S|``; "norm-preserving": ``h + alpha * S``, scaled back
                to the length of h.

        Raises:
            TypeError, ValueError: vectors of another size or not finite, a zero vector that should be a direction, or
                strengths twice.
        """
        return sweep_steering(self, vectors, layers, alphas, rows, reading)

    @over_pairs
    def grid(self, plan: Callable[..., Plan], axes: Axes) -> SweepResult:
        """The run that is patched under every plan of a grid: one axis for each strength.

        Nothing comes from the other prompt but its baseline. For prompts without a partner, and for many prompts in
        one batch: :func:`~emocircuits.sweep.plan_grid`.

        Args:
            plan: from one value of every axis, by name, to a plan.
            axes: values by name, such as ``{"beta": (1.2, 1.6), "gamma": (1.0, 1.6)}``.

        Raises:
            TypeError, ValueError, NotImplementedError: a plan that cannot be moved from row to row (batch rows,
                positions, gates) or does not fit the model, or a metric of what leaves a layer.
        """
        return sweep_grid(self, plan, axes)

    @over_pairs
    def attribute(
        self, target: str = "heads", method: Method = "atp", positions: Positions = "all",
        layers: Sequence[int] | None = None, groups: int | Sequence[Sequence[int]] = 16, steps: int = 8,
    ) -> SweepResult:  # fmt: skip
        """The table of a target, estimated from gradients: ``m(base) + (patch - base) . dm/dx`` for every patch.

        Nothing is stored in `out`. The metric must be differentiable.

        Args:
            target: "heads", "neurons", "residual", "attn_out", "mlp_out" or "qkv".
            method: "atp": gradients of the base run. "atp*" (Kramár et al. 2024): queries and keys with their softmax
                exact (the QK fix), and for all targets GradDrop: magnitudes averaged over runs without the gradient
                through one layer, with the sign of the estimate without drops. "ig": gradients averaged over `steps`
                points between what a layer's site is and what it is patched with.
            positions, layers: see :meth:`heads`.
            groups: see :meth:`neurons`.
            steps: of "ig".

        Raises:
            ValueError: a metric that autograd cannot follow.
            NotImplementedError: patches drawn from other prompts.
        """
        return estimates(self, *self.target(target, groups), method, positions, layers, steps)

    def edges(self, method: EdgeMethod = "eap-ig", steps: int = 5) -> EdgeResult:
        """Scores of all edges between what writes the residual stream and what reads it, estimated from gradients.

        Writers are the input, every head and every MLP; readers are queries, keys and values of every head, every MLP
        and the logits. An edge carries the values of the other prompt in all columns. Of several pairs the mean.

        Args:
            method: "eap" (Syed et al. 2023): gradients of the base run. "eap-ig" (Hanna et al. 2024): averaged over
                `steps` runs whose input goes from the base prompt's to the other's.
            steps: of "eap-ig".

        Raises:
            NotImplementedError: the residual stream is not the sum of what heads and MLPs write (norms after attention,
                scaled layers, features added between layers).
            ValueError: a metric that autograd cannot follow.
        """
        return sweep_edges(self, method, steps)

    def __repr__(self) -> str:
        what = f"{len(self.several.pairs)} pairs" if self.several is not None else f"{self.columns} columns"
        return f"Sweep({what}, clean={self.clean:.4g}, corrupt={self.corrupt:.4g})"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if self.several is not None and not name.startswith("__"):
                raise AttributeError(f"{name} is of one pair; this sweep has {len(self.several.pairs)}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ---- the parts of a sweep -------------------------------------------------------------------------

    def target(self, kind: str, groups: int | Sequence[Sequence[int]] = 16) -> tuple[Target, list[int | None]]:
        """A kind of patch and its units: heads, groups of neurons, or ``[None]``.

        Raises:
            ValueError: another kind, or groups that the MLP does not have.
            NotImplementedError: neurons of mixtures of experts.
        """
        g = self.handle.geometry
        if kind not in KINDS:
            raise ValueError(f"target {kind!r}: expected one of {', '.join(KINDS)}")
        if kind != "neurons":
            count = {"heads": g.heads, "qkv": g.heads + 2 * g.kv_heads}.get(kind)
            return Target(kind), [None] if count is None else list(range(count))
        total = g.neurons
        if not total:
            raise NotImplementedError(
                f"the MLPs of {type(self.handle.model).__name__} are mixtures of experts: a token's neurons are those "
                "of the experts that it is routed to, which need not be the same in both prompts, and transformers "
                "keeps all experts in one tensor, so that no module has their neurons; sweep mlp_out"
            )
        if isinstance(groups, int):
            if not 1 <= groups <= total:
                raise ValueError(f"{groups} groups of {total} neurons: expected 1 to {total}")
            edges = [i * total // groups for i in range(groups + 1)]
            chosen = tuple(tuple(range(a, b)) for a, b in pairwise(edges))
        else:
            if not isinstance(groups, Sequence):
                raise TypeError(f"groups={groups!r}: expected a number of groups, or lists of neurons")
            chosen = tuple(tuple(sorted(set(inputs.numbers(g, "a group")))) for g in groups)
            if not chosen or any(not g or g[0] < 0 or g[-1] >= total for g in chosen):
                raise ValueError(f"groups must name neurons 0 to {total - 1}, at least one in each")
        return Target("neurons", chosen), list(range(len(chosen)))

    def variants(
        self, target: Target, units: Sequence[int | None], positions: Positions, layers: Sequence[int] | None
    ) -> tuple[list[Variant], tuple[str, ...], dict[str, list[Any]]]:
        """All patches of a table, its axes and their labels."""
        chosen = self.layers(layers)
        columns = self.positions(positions)
        axes: list[str] = ["layer"]
        labels: dict[str, list[Any]] = {"layer": chosen}
        if columns != [None]:
            axes.append("pos")
            labels["pos"] = list(columns)
        if list(units) != [None]:
            axes.append(UNITS[target.kind])
            g = self.handle.geometry
            labels[UNITS[target.kind]] = names(g.heads, g.kv_heads) if target.kind == "qkv" else list(units)
        found = [Variant(l, c, u) for l in chosen for c in columns for u in units]
        return found, tuple(axes), labels

    def layers(self, layers: Sequence[int] | None) -> list[int]:
        """Layers of a table, ascending; None: all.

        Raises:
            ValueError: none, a layer that the model does not have, or one twice.
        """
        total = self.handle.geometry.layers
        chosen = list(range(total)) if layers is None else inputs.numbers(layers, "layers")
        if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= l < total for l in chosen):
            raise ValueError(f"layers {layers}: expected each of 0 to {total - 1} at most once")
        return sorted(chosen)

    def positions(self, positions: Positions) -> list[int | None]:
        """Columns that are patched one at a time; ``[None]``: all at once.

        Args:
            positions: "all" (at once), "each" column, the columns of a role, or a list of columns, negative from the
                end. Columns count padding.

        Raises:
            ValueError: a column outside the prompt, or a role that no token has, or other ones in the two prompts.
        """
        if isinstance(positions, str) and positions == "all":
            return [None]
        if isinstance(positions, str) and positions == "each":
            return list(range(self.columns))
        if isinstance(positions, str | Role):
            names = {role.name.lower(): role for role in Role}
            if isinstance(positions, str) and positions.lower() not in names:
                raise ValueError(f"positions={positions!r}: expected 'all', 'each', columns or one of {list(names)}")
            role = names[positions.lower()] if isinstance(positions, str) else positions
            found, there = (
                (prompt_roles(ids, self.real[None].to(ids.device), self.handle.placeholder_ids())[0] == int(role))
                .nonzero().flatten().tolist()
                for ids in (self.corrupt_inputs["input_ids"], self.clean_inputs["input_ids"])
            )  # fmt: skip
            if not found:
                raise ValueError(f"no token of the prompt is {role.name}")
            if found != there:
                raise ValueError(
                    f"{role.name} is in other columns of the clean prompt than of the corrupt one; name columns"
                )
            return found
        columns = inputs.numbers(positions, "positions")
        wrong = [c for c in columns if not -self.columns <= c < self.columns]
        if wrong or not columns:
            raise ValueError(f"positions {wrong or columns}: expected columns inside a prompt of {self.columns}")
        return list(dict.fromkeys(c % self.columns for c in columns))

    def forecast(
        self, target: Target, variants: Sequence[Variant], rate: float | None = None, images: int = 0
    ) -> Forecast:
        """What the patches will cost (:mod:`.planner`).

        Args:
            target: what is patched.
            variants: all patches.
            rate: FLOPs a second; None: no time is told.
            images: FLOPs of a vision tower in one plain pass (:func:`~.planner.outside`).
        """
        rows = self.metric.rows
        shape = Shape.of(
            self.handle, self.columns, first=self.first if self.patch_with == "clean" else 0,
            reads=self.readout.columns, rows=None if rows is None else len(rows), images=images,
            generated=getattr(self.metric, "limit", 0),
        )  # fmt: skip
        return forecast(shape, target.kind, variants, savings=DOES, rate=rate, cost=target.cost)

    def _sweep(
        self, target: Target, units: Sequence[int | None], positions: Positions, layers: Sequence[int] | None,
        **screen: Unpack[Screen],
    ) -> SweepResult:  # fmt: skip
        if unknown := screen.keys() - Screen.__annotations__.keys():
            raise TypeError(f"{target.kind}() got an unexpected keyword argument {min(unknown)!r}")
        if screen.get("prescreen") is not None:
            return screened(self, target, units, positions, layers, screen)
        if screen.keys() - {"prescreen"}:
            raise ValueError("confirm, sample and sample_seed are of a prescreened sweep: name prescreen='atp*'")
        variants, axes, labels = self.variants(target, units, positions, layers)
        # A tensor that does not fit is refused before the first patch.
        values(target, self.source.layers[0], self.patch_with, self.real)
        return self.table(target, variants, axes, labels, {"groups": target.groups})

    def table(
        self, target: Target, variants: Sequence[Variant], axes: tuple[str, ...], labels: dict[str, list[Any]],
        what: Mapping[str, Any],
    ) -> SweepResult:  # fmt: skip
        """Evaluate the patches of a table; ``what`` tells this target from others of its kind, also in a folder."""
        if self.resampling is not None:
            return self.resampling.table(self, target, variants, axes, labels, what)

        def run(todo: Sequence[Variant]) -> Iterator[tuple[slice, Tensor]]:
            return evaluate(self, target, todo, self.batch)

        return self.collected(run, target, variants, axes, labels, what)

    def collected(
        self, run: Callable[[Sequence[Any]], Iterator[tuple[slice, Tensor]]], target: Target, variants: Sequence[Any],
        axes: tuple[str, ...], labels: dict[str, list[Any]], what: Mapping[str, Any],
    ) -> SweepResult:  # fmt: skip
        """A table of what ``run`` gives for variants: counted, stored, resumed, with a bar."""
        refuse_hooks(self.handle)
        refuse_wrapped(self.handle, target.kind, sorted({v.layer for v in variants}))
        what = {
            "target": target.kind, "positions": labels.get("pos", "all"), "direction": self.direction,
            "patch_with": self.patch_with, **what,
        }  # fmt: skip
        patch = self.patch_with if isinstance(self.patch_with, str) else "tensor"
        meta = {
            "target": target.kind, "direction": self.direction, "patch_with": patch,
            "dtype": str(self.base.layers[0].resid_pre.dtype).removeprefix("torch."), "first_difference": self.first,
        }  # fmt: skip
        said = None
        if isinstance(self.readout, Continuation):
            said = self.readout.take
            meta["texts"] = {side: self.readout.said[side] for side in ("clean", "corrupt")}
        costs = self._announce(target, variants)
        return collect(
            run, variants, axes=axes, labels=labels, clean=self.clean, corrupt=self.corrupt, meta=meta,
            store=self._store(target, what, variants), costs=costs, progress=self.progress, said=said,
        )  # fmt: skip

    def runner(self, target: Target) -> Runner:
        """What runs the patches of a target and reads the metric."""
        return runner(self, target)

    def _announce(self, target: Target, variants: Sequence[Variant]) -> Sequence[int] | None:
        """FLOPs of every patch, None where they are not counted; with a bar to come, also told on standard error."""
        if not self.handle.geometry.neurons:
            return None
        if not self.progress:
            return self.forecast(target, variants).costs
        given = self.corrupt_inputs
        found = self.forecast(target, variants, images=outside(self.handle, given) if self.handle.sees else 0)
        with torch.no_grad(), self.products:
            announce(found, lambda: self.handle.model(**given))
        return found.costs

    def _store(self, target: Target, what: Mapping[str, Any], variants: Sequence[Variant]) -> Store | None:
        if self.out is None:
            return None
        return open_store(
            Path(self.out) / target.kind, model=self.handle.model, clean=self.clean_inputs,
            corrupt=self.corrupt_inputs, what={**what, "metric": self.metric, **self.readout.identity},
            variants=variants, baselines=(self.clean, self.corrupt),
        )  # fmt: skip

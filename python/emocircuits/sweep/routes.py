"""Knocking out or boosting one route (destination role <- source role) of one head of one run.

Nothing comes from another prompt. The edited head reads the run's own queries, keys and values once more, in the
columns of the destination role only, and the difference of its output enters the layer as that of a patched head does.
What an edit does to attention is that of :class:`~emocircuits.edits.BoostRoute`.
"""

from __future__ import annotations

import copy
import dataclasses as dc
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

import emokernels
from emocircuits.edits import BoostRoute
from emocircuits.roles import prompt_roles
from emocircuits.sweep.keys import mask_rows, span
from emocircuits.sweep.results import SweepResult
from emocircuits.sweep.resume import Decoder, Group, Packed
from emocircuits.sweep.targets import Entry, Target, Variant, rows
from emocircuits.sweep.trace import Trace, trace
from emokernels import Role

if TYPE_CHECKING:
    from emocircuits.edits.heads import Reading
    from emocircuits.sweep.api import Sweep
    from emocircuits.sweep.planner import Work

Pair = tuple[Role, Role]
Run = Literal["clean", "corrupt"]
Seen = tuple[tuple[tuple[int, ...], ...], ...]


@dc.dataclass(frozen=True, eq=False)
class RouteTarget(Target):
    """Edits of routes; unit ``head * len(pairs) + number of the pair``.

    Attributes:
        pairs: (destination, source).
        seen: of every layer and pair, the destination's columns that see a key of the source.
        roles: ``[T]`` uint8.
        field, value: of :class:`emokernels.Routes`, what is set.
    """

    kind: str = "routes"
    pairs: tuple[Pair, ...] = ()
    seen: Seen = ()
    roles: Tensor = dc.field(default_factory=lambda: torch.zeros(0))
    field: str = ""
    value: float = 0.0

    def entry(self, sweep: Sweep, decoder: Decoder, layer: int) -> Entry:
        """See :class:`RouteEntry`."""
        return RouteEntry(sweep, decoder, self, layer)

    def changed(self, layer: int, unit: int | None) -> tuple[int, ...]:
        """Columns whose head output the edit changes."""
        assert unit is not None
        return self.seen[layer][unit % len(self.pairs)]

    def cost(self, work: Work, variant: Variant) -> int:
        """FLOPs: attention, output projection and MLP of the changed columns, and all that follows."""
        s, layer = work.shape, variant.layer
        columns = self.changed(layer, variant.unit)
        last = layer == s.layers - 1
        live = [c for c in columns if not last or c in s.reads]
        if not live or not any(r >= live[0] for r in s.reads):
            return 0
        attention = sum(4 * s.head_dim * work.seen(layer, c) for c in live)
        here = attention + len(live) * (2 * s.head_dim * s.d_model + work.mlp)
        if last:
            return here + work.head
        if variant.column is not None:
            return here + work.enter(layer + 1, variant.column)
        return here + work.dense(layer + 1, live[0])


class RouteEntry(Entry):
    """Head outputs with an edited route, in place of the run's."""

    def __init__(self, sweep: Sweep, decoder: Decoder, target: RouteTarget, layer: int) -> None:
        super().__init__(sweep.handle, decoder, target, layer, decoder.base.layers[layer].z)
        self.edit = target

    def columns(self, column: int | None, start: int, unit: int | None = None) -> tuple[int, ...]:
        """From the first column that changes on; in the last layer that is read, those that change and are read."""
        changed = self.edit.changed(self.layer, unit)
        if self.layer == self.decoder.stop:
            return tuple(c for c in changed if c in self.decoder.reads)
        if not changed or not any(r >= self.decoder.reach[changed[0]] for r in self.decoder.reads):
            return ()
        return changed if column is not None else tuple(range(changed[0], self.decoder.total))

    def __call__(
        self, parts: Sequence[tuple[tuple[int, ...], Sequence[int | None]]], point: bool
    ) -> tuple[int, Packed]:
        """Run the layer in the columns that change; the others leave it as in the run."""
        record, live, deltas = self.record, [], []
        for columns, units in parts:
            # Routes of one destination share their columns.
            for which in dict.fromkeys(self._pair(u) for u in units):
                heads = [u // len(self.edit.pairs) for u in units if u is not None and self._pair(u) == which]
                changed = tuple(c for c in self.edit.seen[self.layer][which] if c in columns)
                live.append((columns, Group(changed, len(heads))))
                deltas.append(self._change(which, heads, changed))
        groups = tuple(g for _, g in live)
        index = self.decoder.index(groups)
        attention = record.attention[index] + torch.cat(deltas)
        out = self.decoder.after_attention(self.layer, record.resid_pre[index], groups, attention)
        whole, start = [], 0
        for columns, g in live:
            part = out[start : start + g.size]
            start += g.size
            if g.columns != columns:
                filled = record.resid_post[span(columns)].expand(g.count, -1, -1).clone()
                filled[:, [c - columns[0] for c in g.columns]] = part.unflatten(0, (g.count, -1))
                part = filled.flatten(0, 1)
            whole.append(part)
        return self.layer + 1, Packed(torch.cat(whole), tuple(Group(c, g.count) for c, g in live), point)

    def _pair(self, unit: int | None) -> int:
        assert unit is not None
        return unit % len(self.edit.pairs)

    def _change(self, which: int, heads: list[int], columns: tuple[int, ...]) -> Tensor:
        """What the edit adds to the output of attention, ``[heads * columns, d_model]``."""
        record, edit = self.record, self.edit
        count, shared = record.q.shape[1], record.k.shape[1]
        kv = [h // (count // shared) for h in heads]
        mask = mask_rows(record, columns)
        mask = mask if mask.shape[1] == 1 else mask[:, heads]
        dst, src = edit.pairs[which]
        routes = emokernels.Routes.identity(
            len(heads), fields=(edit.field,), device=record.q.device,
            dtype=torch.promote_types(record.q.dtype, torch.float32),
        )  # fmt: skip
        getattr(routes, edit.field)[:, :, int(dst), int(src)] = edit.value
        z = emokernels.attention(
            record.q[:, heads][:, :, span(columns)], record.k[:, kv], record.v[:, kv], roles=edit.roles[None],
            query_roles=edit.roles[None, span(columns)], routes=routes, mask=mask, causal=False,
            scale=record.scaling, softcap=record.softcap,
        ).z[0]  # fmt: skip
        change = z - record.z[span(columns)][:, heads].transpose(0, 1)
        weight = rows(self.handle.output_projections[self.layer]).unflatten(0, (count, -1))
        return (change @ weight[heads]).flatten(0, 1)


def sweep_routes(
    sweep: Sweep, edit: str, by: float | None, reading: Reading | None,
    routes: Sequence[tuple[str | Role, str | Role]] | None, layers: Sequence[int] | None, run: Run,
) -> SweepResult:  # fmt: skip
    """See :meth:`Sweep.routes`."""
    field, value, told = _edit(edit, by, reading)
    if run not in ("clean", "corrupt"):
        raise ValueError(f"run is {run!r}, expected 'clean' or 'corrupt'")
    chosen = sweep.layers(layers)
    wanted = None if routes is None else [_pair(r) for r in routes]
    on = _on(sweep, run)
    for i, record in enumerate(on.base.layers):
        if record.v.shape[-1] != record.k.shape[-1]:
            raise NotImplementedError(
                f"layer {i} has keys of {record.k.shape[-1]} and values of {record.v.shape[-1]} entries a head, and "
                "attention with routes takes them as wide as one another; sweep heads or attn_out"
            )
    inputs = sweep.clean_inputs if run == "clean" else sweep.corrupt_inputs
    ids = inputs["input_ids"]
    roles = prompt_roles(ids, on.real[None].to(ids.device), on.handle.placeholder_ids())[0].to(on.real.device)
    pairs, seen = existing(on.base, roles, wanted)
    single = {r: c[0] for r in Role if len(c := (roles == int(r)).nonzero().flatten().tolist()) == 1}
    target = RouteTarget(pairs=pairs, seen=seen, roles=roles, field=field, value=value)
    heads = range(sweep.handle.geometry.heads)
    # One destination column is entered as one column, others together.
    order = sorted(range(len(pairs)), key=lambda i: (pairs[i][0] in single, seen[0][i][:1], pairs[i]))
    variants = [
        Variant(l, single.get(pairs[i][0]), h * len(pairs) + i) for l in chosen for i in order for h in heads
    ]  # fmt: skip
    names = [f"{d.name.lower()}<-{s.name.lower()}" for d, s in pairs]
    units = len(heads) * len(pairs)
    on.patch_with = told
    flat = on.table(
        target, variants, ("layer", "unit"), {"layer": chosen, "unit": list(range(units))},
        {"positions": "all", "run": run, "routes": names, "field": field, "value": value},
    )  # fmt: skip
    return dc.replace(
        flat, values=flat.values.unflatten(1, (len(heads), len(pairs))), axes=("layer", "head", "route"),
        labels={"layer": chosen, "head": list(heads), "route": names}, meta={**flat.meta, "run": run},
    )  # fmt: skip


def existing(base: Trace, roles: Tensor, wanted: Sequence[Pair] | None) -> tuple[tuple[Pair, ...], Seen]:
    """Routes along which some token of the prompt sees another one.

    Args:
        base: the run.
        roles: ``[T]``.
        wanted: of which; None: of all.

    Returns:
        The routes, and of every layer and route the destination's columns that see a key of the source.

    Raises:
        ValueError: a wanted route has no tokens, or is named twice.
    """
    among = [(d, s) for d in Role for s in Role if Role.PAD not in (d, s)] if wanted is None else list(wanted)
    if not among or len(set(among)) != len(among):
        raise ValueError("routes: expected at least one (destination, source), each once")
    found: list[list[tuple[int, ...]]] = []
    everything = tuple(range(base.columns))
    for record in base.layers:
        mask = mask_rows(record, everything)
        sees = (mask > torch.finfo(mask.dtype).min / 2).flatten(0, 1).any(0)
        by_source = {s: sees[:, roles == int(s)].any(-1) for s in {s for _, s in among}}
        found.append([tuple((by_source[s] & (roles == int(d))).nonzero().flatten().tolist()) for d, s in among])
    kept = [i for i in range(len(among)) if any(layer[i] for layer in found)]
    if wanted is not None and len(kept) != len(among):
        d, s = next(among[i] for i in range(len(among)) if i not in kept)
        raise ValueError(
            f"no token of the prompt that is {d.name} sees one that is {s.name}; leave routes= out for those that exist"
        )
    return tuple(among[i] for i in kept), tuple(tuple(layer[i] for i in kept) for layer in found)


def _on(sweep: Sweep, run: Run) -> Sweep:
    """The sweep with ``run`` as the one that is edited."""
    on = copy.copy(sweep)
    on.direction, on.first, on.resampling = ("noise" if run == "clean" else "denoise"), 0, None
    if on.direction != sweep.direction:
        inputs = sweep.clean_inputs if run == "clean" else sweep.corrupt_inputs
        with torch.inference_mode(), sweep.products:
            on.base = trace(sweep.handle, inputs, run, sweep.activations)[0]
            on.readout = copy.copy(sweep.readout)
            on.readout.base = on.readout.of(on.base)
    return on


def _edit(edit: str, by: float | None, reading: Reading | None) -> tuple[str, float, str]:
    """The table of :class:`emokernels.Routes` and its entry, and what is done in words."""
    if edit == "knockout":
        if by is not None or reading is not None:
            raise ValueError("a knockout masks the route: by and reading are for edit='boost'")
        return "bias", -math.inf, "knockout"
    if edit != "boost":
        raise ValueError(f"edit is {edit!r}, expected 'knockout' or 'boost'")
    if by is None:
        raise ValueError("a boost needs its strength, such as by=1.5")
    given = BoostRoute([(0, 0)], to="last", by=by, reading=reading or "weight")
    told = f"boost {given.reading} {given.by:g}"
    if given.reading == "logit-add":
        return "bias", math.log(given.by) if given.by > 0 else -math.inf, told
    return {"weight": "gain", "logit-scale": "scale", "logit-abs": "abs"}[given.reading], given.by, told


def _pair(route: tuple[str | Role, str | Role]) -> Pair:
    names = {role.name.lower(): role for role in Role if role != Role.PAD}
    try:
        to, source = ((r if isinstance(r, Role) else names[r.lower()]) for r in route)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"route {route!r}: expected (destination, source), each one of {', '.join(names)}") from None
    return to, source

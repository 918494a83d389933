"""Attribution patching: the first-order estimate of every patch of a table, from a few backward passes.

``m(patched) ~ m(base) + (patch - base) . dm/dx``: Nanda 2023 ("Attribution patching"), AtP* of Kramár et al. 2024
(arXiv 2403.00745), and integrated gradients (Sundararajan et al. 2017) along the line from what a site is to what it is
patched with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from emocircuits.sweep.attribution.gradients import Graph, differentiable
from emocircuits.sweep.attribution.softmax import fixed
from emocircuits.sweep.results import SweepResult
from emocircuits.sweep.targets import Target, values

if TYPE_CHECKING:
    from emocircuits.sweep.api import Positions, Sweep

Method = Literal["atp", "atp*", "ig"]
METHODS = ("atp", "atp*", "ig")
NAMES = {"heads": ("z",), "neurons": ("neurons",), "residual": ("resid_pre",), "qkv": ("q", "k", "v")}


def estimates(
    sweep: Sweep, target: Target, units: Sequence[int | None], method: str, positions: Positions,
    layers: Sequence[int] | None, steps: int = 8,
) -> SweepResult:  # fmt: skip
    """The table of a target, estimated. See :meth:`Sweep.attribute`."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1")
    if sweep.resampling is not None:
        raise NotImplementedError(
            "attribution of patches that are drawn from other prompts; use patch_with='clean', zero, mean or a tensor"
        )
    variants, axes, labels = sweep.variants(target, units, positions, layers)
    values(target, sweep.source.layers[0], sweep.patch_with, sweep.real)  # refuses what does not fit
    chosen = labels["layer"]
    live = [l for l in chosen if l <= sweep.readout.stop]
    each = "pos" in labels
    if not live:
        found: dict[int, Tensor] = {}
    elif method == "ig":
        found = {l: _integrated(sweep, target, l, each, steps) for l in live}
    else:
        found = _first_order(sweep, target, live, each, star=method == "atp*")
    base = sweep.clean if sweep.direction == "noise" else sweep.corrupt
    moved = [
        0.0 if v.layer not in found else float(found[v.layer][v.column or 0, v.unit or 0]) for v in variants
    ]  # fmt: skip
    table = base + torch.tensor(moved, dtype=torch.float64).reshape([len(labels[a]) for a in axes])
    meta = {
        "target": target.kind, "direction": sweep.direction,
        "patch_with": sweep.patch_with if isinstance(sweep.patch_with, str) else "tensor", "method": method,
        "dtype": str(sweep.base.layers[0].resid_pre.dtype).removeprefix("torch."), "first_difference": sweep.first,
    }  # fmt: skip
    if method == "ig":
        meta["steps"] = steps
    return SweepResult(table, sweep.clean, sweep.corrupt, axes, labels, meta)


def _first_order(sweep: Sweep, target: Target, layers: Sequence[int], each: bool, star: bool) -> dict[int, Tensor]:
    """By layer the estimates ``[T or 1, units]`` of one column at a time, or of all at once."""
    graph = differentiable(sweep)

    def dotted(drop: int | None) -> Iterator[tuple[int, Tensor]]:
        # Changes are made when they are needed: all layers of them would be as much again as both runs.
        for l, g in _gradients(graph, target, layers, drop).items():
            yield l, _dotted(target, _delta(sweep, target, l), g, each)

    plain = dict(dotted(None))
    if not star:
        return plain
    drops = list(range(sweep.readout.stop + 1))
    heads: dict[int, list[Tensor]] = {l: [] for l in layers}
    # What the estimates are with the gradient through each layer dropped, magnitudes summed over layers.
    sums = {l: torch.zeros_like(plain[l]) for l in layers}
    for drop in (None, *drops):
        if target.kind == "qkv":
            for l, g in zip(layers, graph.gradients([("z", l) for l in layers], drop), strict=True):
                heads[l].append(g[0].cpu())
        if drop is not None:
            for l, found in dotted(drop):
                sums[l] += found.abs()
    if target.kind == "qkv":
        for l in layers:
            exact = fixed(sweep.base.layers[l], _patched(sweep, target, l), torch.stack(heads.pop(l)), each)
            plain[l][:, : exact.shape[-1]] = exact[0]
            sums[l][:, : exact.shape[-1]] = exact[1:].abs().sum(0)
    # The layer that a node is in gives 0 when it is dropped; the residual stream goes past every layer.
    share = len(drops) if target.kind == "residual" else max(1, len(drops) - 1)
    if len(drops) == 1:
        return plain
    return {l: plain[l].sign() * sums[l] / share for l in layers}


def _integrated(sweep: Sweep, target: Target, layer: int, each: bool, steps: int) -> Tensor:
    """Gradients averaged between the base's and the patch's activations of a layer (midpoints), times the change."""
    base, delta = target.site(sweep.base.layers[layer]), _delta(sweep, target, layer)
    total = torch.zeros_like(delta)
    for step in range(steps):
        at = (base.double() + (step + 0.5) / steps * delta).to(base)
        graph = differentiable(sweep, _split(sweep, target, layer, at))
        total += _gradients(graph, target, [layer], None)[layer].double()
    return _dotted(target, delta, total / steps, each)


def _patched(sweep: Sweep, target: Target, layer: int) -> Tensor:
    return values(target, sweep.source.layers[layer], sweep.patch_with, sweep.real)


def _delta(sweep: Sweep, target: Target, layer: int) -> Tensor:
    """What a patch adds to a site, float64; 0 before the prompts differ."""
    delta = _patched(sweep, target, layer).double() - target.site(sweep.base.layers[layer]).double()
    if sweep.patch_with == "clean":
        delta[: sweep.first] = 0.0
    return delta


def _gradients(graph: Graph, target: Target, layers: Sequence[int], drop: int | None) -> dict[int, Tensor]:
    """By layer the gradient at the site, shaped as :meth:`Target.site`."""
    names = NAMES.get(target.kind, (target.kind,))
    flat = iter(graph.gradients([(n, l) for l in layers for n in names], drop))
    found = {}
    for l in layers:
        parts = [next(flat)[0] for _ in names]
        found[l] = torch.cat(parts).transpose(0, 1) if target.kind == "qkv" else parts[0]
    return found


def _split(sweep: Sweep, target: Target, layer: int, site: Tensor) -> dict[tuple[str, int], Tensor]:
    """A site as the graph has it."""
    names = NAMES.get(target.kind, (target.kind,))
    if target.kind != "qkv":
        return {(names[0], layer): site[None]}
    g = sweep.handle.geometry
    parts = site.transpose(0, 1).split([g.heads, g.kv_heads, g.kv_heads])
    return {(n, layer): x[None] for n, x in zip(names, parts, strict=True)}


def _dotted(target: Target, delta: Tensor, gradient: Tensor, each: bool) -> Tensor:
    """Change times gradient for every unit, ``[T or 1, units]`` float64."""
    per = delta * gradient.double()
    if target.kind == "neurons":
        per = torch.stack([per[:, list(group)].sum(-1) for group in target.groups], -1)
    else:
        per = per.sum(-1)
    per = per if per.ndim == 2 else per[:, None]
    return (per if each else per.sum(0, keepdim=True)).cpu()

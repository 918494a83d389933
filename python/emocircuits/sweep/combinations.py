"""Sets of heads patched together: pairs, triples, ..., and how far the whole is from the sum of its parts."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Sequence
from itertools import combinations, groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from emocircuits.edits.heads import head_pairs
from emocircuits.sweep.keys import span
from emocircuits.sweep.results import SweepResult
from emocircuits.sweep.resume import Decoder, Group, Packed
from emocircuits.sweep.targets import Entry, Target, Variant, rows, values

if TYPE_CHECKING:
    from emocircuits.sweep.api import Positions, Sweep
    from emocircuits.sweep.planner import Work

Head = tuple[int, int]
Heads = Sequence[Head] | SweepResult
Parts = Sequence[tuple[tuple[int, ...], Sequence[int | None]]]


@dc.dataclass(frozen=True)
class CombinationTarget(Target):
    """Sets of heads, each in ascending order; a variant's unit is the number of its set, its layer the lowest one."""

    kind: str = "combinations"
    sets: tuple[tuple[Head, ...], ...] = ()

    def entry(self, sweep: Sweep, decoder: Decoder, layer: int) -> Entry:
        """See :class:`CombinationEntry`."""
        return CombinationEntry(sweep, decoder, self, layer)

    def cost(self, work: Work, variant: Variant) -> int:
        """FLOPs: as its heads of the lowest layer; heads above are overwritten where they are computed anyway."""
        assert variant.unit is not None
        here = sum(layer == variant.layer for layer, _ in self.sets[variant.unit])
        return work.patch("heads", variant, here)


class CombinationEntry(Entry):
    """Heads of the lowest layer enter as patched heads do; the others are set when the run comes to their layer."""

    def __init__(self, sweep: Sweep, decoder: Decoder, target: CombinationTarget, layer: int) -> None:
        self.sets = target.sets
        self._known: dict[int, Tensor] = {}
        self._values: Callable[[int], Tensor] = lambda at: values(
            Target("heads"), sweep.source.layers[at], sweep.patch_with, sweep.real
        )
        super().__init__(sweep.handle, decoder, target, layer, self.values(layer))

    def values(self, layer: int) -> Tensor:
        """What the heads of a layer are set to, ``[T, H, D]``."""
        if layer not in self._known:
            self._known[layer] = self._values(layer)
        return self._known[layer]

    def __call__(self, parts: Parts, point: bool) -> tuple[int, Packed]:
        """Enter at the lowest layer."""
        record = self.record
        groups = tuple(Group(columns, len(units)) for columns, units in parts)
        index = self.decoder.index(groups)
        out = record.attention[index] + torch.cat([self._added(columns, units) for columns, units in parts])
        x = self.decoder.after_attention(self.layer, record.resid_pre[index], groups, out)
        return self.layer + 1, Packed(x, groups, point, self._later(parts))

    def _added(self, columns: tuple[int, ...], units: Sequence[int | None]) -> Tensor:
        """What the heads of this layer add to the output of attention, ``[sets * columns, d_model]``."""
        sets = [[h for layer, h in self._set(u) if layer == self.layer] for u in units]
        heads = sorted({h for s in sets for h in s})
        at = span(columns)
        change = (self.patched[at][:, heads] - self.record.z[at][:, heads]).transpose(0, 1)
        weight = rows(self.handle.output_projections[self.layer]).unflatten(0, (self.record.z.shape[1], -1))
        each = dict(zip(heads, change @ weight[heads], strict=True))
        return torch.cat([torch.stack([each[h] for h in s]).sum(0) for s in sets])

    def _set(self, unit: int | None) -> tuple[Head, ...]:
        assert unit is not None
        return self.sets[unit]

    def _later(self, parts: Parts) -> Callable[[int, tuple[Group, ...], Tensor], Tensor] | None:
        """Sets heads of later layers in the patched columns, whatever the earlier patches made of them."""
        # By layer and group: which row, which head.
        found: dict[int, dict[int, list[tuple[int, int]]]] = {}
        for g, (_, units) in enumerate(parts):
            for row, unit in enumerate(units):
                for layer, head in self._set(unit):
                    if layer > self.layer:
                        found.setdefault(layer, {}).setdefault(g, []).append((row, head))
        if not found:
            return None
        patched = [columns for columns, _ in parts]

        def set_z(layer: int, groups: tuple[Group, ...], z: Tensor) -> Tensor:
            if layer not in found:
                return z
            new, start = self.values(layer), 0
            z = z.unflatten(-1, new.shape[1:]).clone()
            for g, group in enumerate(groups):
                inside = set(patched[g]).intersection(group.columns)
                if g in found[layer] and inside:
                    places = [(i, c) for i, c in enumerate(group.columns) if c in inside]
                    offset, column = torch.tensor(places, device=z.device).T
                    row, head = torch.tensor(found[layer][g], device=z.device).T[..., None]
                    z[start + row * len(group.columns) + offset, head] = new[column, head]
                start += group.size
            return z.flatten(-2)

        return set_z


def sweep_combinations(
    sweep: Sweep, heads: Heads, size: int | Sequence[int], positions: Positions, top: int, limit: int
) -> SweepResult:
    """See :meth:`Sweep.combinations`."""
    chosen = strongest(heads, top) if isinstance(heads, SweepResult) else list(head_pairs(heads))
    g = sweep.handle.geometry
    wrong = [h for h in chosen if h[0] >= g.layers or h[1] >= g.heads]
    if wrong:
        raise ValueError(f"head {wrong[0]}: the model has layers 0 to {g.layers - 1} of heads 0 to {g.heads - 1}")
    sizes = [size] if isinstance(size, int) else list(size)
    if not sizes or len(set(sizes)) != len(sizes) or not all(1 <= k <= len(chosen) for k in sizes):
        raise ValueError(f"size={size}: expected 1 to {len(chosen)}, the number of heads (or several sizes)")
    columns = sweep.positions(positions)
    patches = len(columns) * sum(math.comb(len(chosen), k) for k in sizes)
    if patches > limit:
        raise ValueError(
            f"{len(chosen)} heads in sets of {size} at {len(columns)} positions are {patches:,} patches; choose fewer "
            f"heads, or say limit={patches} to run them all"
        )
    values(Target("heads"), sweep.source.layers[0], sweep.patch_with, sweep.real)
    sets = tuple(s for k in sizes for s in combinations(sorted(chosen), k))
    order = sorted(range(len(sets)), key=lambda i: sets[i][0][0])
    by_layer = [(layer, list(those)) for layer, those in groupby(order, key=lambda i: sets[i][0][0])]
    variants = [Variant(layer, c, i) for layer, those in by_layer for c in columns for i in those]
    axes, labels = ["combination"], {"combination": ["+".join(f"{l}.{h}" for l, h in s) for s in sets]}
    if columns != [None]:
        axes.append("pos")
        labels["pos"] = list(columns)  # type: ignore[arg-type]
    return sweep.table(CombinationTarget(sets=sets), variants, tuple(axes), labels, {"sets": labels["combination"]})


def strongest(result: SweepResult, top: int) -> list[Head]:
    """The ``top`` heads of a sweep that move the metric most, at their best position where there are several.

    Raises:
        ValueError: not a sweep of heads, or fewer of them.
    """
    if "layer" not in result.axes or "head" not in result.axes:
        raise ValueError(f"a result of {', '.join(result.axes)}: expected one of heads, such as sweep.heads()")
    moved = (result.values - result.base).abs()
    if result.exact is not None:
        # Of a prescreened sweep those that were run come first, as in its top().
        moved = torch.where(result.exact & (moved > 0), moved + 1 + moved.max(), moved)
    moved = moved.movedim([result.axes.index("layer"), result.axes.index("head")], [0, 1])
    moved = moved.reshape(*moved.shape[:2], -1).amax(-1)
    if not 1 <= top <= moved.numel():
        raise ValueError(f"top={top}: expected 1 to {moved.numel()}, the heads of the result")
    layers, heads = result.labels["layer"], result.labels["head"]
    found = moved.flatten().argsort(descending=True, stable=True)[:top].tolist()
    return [(layers[i // len(heads)], heads[i % len(heads)]) for i in found]


def interaction(found: SweepResult, singles: SweepResult, of: Literal["effects", "values"] = "effects") -> Tensor:
    """What a set of heads does beyond what its heads do one by one.

    With ``d(S)`` the metric under the patch of S less that of the unpatched base run,
    ``interaction(S) = (d(S) - sum over h in S of d({h})) / (clean - corrupt)``: 0 where heads add up, below 0 for a
    positive effect where they do the same work twice, above 0 where one needs the other.

    Args:
        found: from :meth:`Sweep.combinations`.
        singles: of the same sweep, from :meth:`Sweep.heads`, or from :meth:`Sweep.combinations` with ``size=1``.
        of: "effects", or "values" for the numerator alone, in units of the metric.

    Returns:
        Float64, as ``found.values``.

    Raises:
        ValueError: results of other prompts, positions or patches, or a head that ``singles`` lacks; for effects also
            baselines that do not differ.
    """
    if "combination" not in found.axes:
        raise ValueError(f"a result of {', '.join(found.axes)}: expected one of combinations")
    close = math.isclose(found.clean, singles.clean, rel_tol=1e-5) and math.isclose(
        found.corrupt, singles.corrupt, rel_tol=1e-5
    )
    if not close or any(found.meta.get(k) != singles.meta.get(k) for k in ("direction", "patch_with")):
        raise ValueError("the two results are of other prompts, or other patches; take both from one sweep")
    if found.labels.get("pos") != singles.labels.get("pos"):
        raise ValueError("the two results are of other positions; sweep both with the same positions=")
    if of not in ("effects", "values"):
        raise ValueError(f"of={of!r}: expected 'effects' or 'values'")
    each = _singles(singles)
    moved = found.values - found.base
    for i, name in enumerate(found.labels["combination"]):
        for head in name.split("+"):
            if head not in each:
                raise ValueError(f"head {head} of {name} is not among the single heads")
            moved[i] -= each[head] - found.base
    if of == "values":
        return moved
    _ = found.effects
    return moved / found.gap


def _singles(result: SweepResult) -> dict[str, Tensor]:
    """By "layer.head" the values of a head: one number, or ``[pos]``."""
    if result.axes[0] == "combination":
        return dict(zip(result.labels["combination"], result.values, strict=True))
    if "layer" not in result.axes or "head" not in result.axes:
        raise ValueError(f"a result of {', '.join(result.axes)}: expected one of heads, such as sweep.heads()")
    if "method" in result.meta:
        raise ValueError("the single heads are estimates of attribution; take those of sweep.heads()")
    # Heads of a prescreened sweep that were not run are not there.
    values = result.values if result.exact is None else result.values.masked_fill(~result.exact, float("nan"))
    by_head = values.movedim([result.axes.index("layer"), result.axes.index("head")], [0, 1])
    labels: Any = result.labels
    found = {f"{l}.{h}": by_head[i, j] for i, l in enumerate(labels["layer"]) for j, h in enumerate(labels["head"])}
    return found if result.exact is None else {k: v for k, v in found.items() if not bool(v.isnan().any())}

"""The figure of a sweep: two of its axes as a heatmap, the others in a menu."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from emocircuits.plotting import style

if TYPE_CHECKING:
    from emocircuits.sweep.results import SweepResult

VIEWS, CELLS, INTERVALS = 128, 300_000, 20_000  # what one page holds: entries of the menu, cells in all, with intervals


def figure(result: SweepResult) -> go.Figure:
    """Effects, diverging around what the unpatched run has; see :meth:`.results.SweepResult.plot`."""
    measurable = result.measurable
    shown = (result.effects if measurable else result.values - result.base).numpy()
    middle = (result.base - result.corrupt) / result.gap if measurable else 0.0
    title = "effect" if measurable else "metric - unpatched"
    limit = float(np.nanmax(np.abs(shown - middle), initial=0.0)) or 1.0

    y, x, rest = axes(result)
    order = [result.axes.index(a) for a in (y, x, *rest) if a]
    names = [[str(name) for name in result.labels[a]] for a in rest]
    layers = [shown, result.values.numpy()]
    if measurable and result.sampled and shown.size <= INTERVALS:
        layers += [bound.numpy() for bound in result.interval()]
    # [y, x, combinations of the rest], of what is shown, the metric, and the bounds.
    size = [len(result.labels[y]), len(result.labels[x]) if x else 1, math.prod(len(n) for n in names)]
    cube = np.stack([layer.transpose(order).reshape(size) for layer in layers])
    which = [", ".join(f"{a} {n}" for a, n in zip(rest, chosen, strict=True)) for chosen in itertools.product(*names)]

    columns = [str(name) for name in result.labels[x]] if x else ["all positions" if y == "layer" else ""]
    if x == "pos" and "token" in result.labels:
        columns = [f"{c} {t}" for c, t in zip(columns, result.labels["token"], strict=True)]
    views = _views(cube, which, middle, [*rest])
    drawn = go.Figure(
        go.Heatmap(
            **_cells(*views[0][1:], columns, unpacked=True), x=list(range(size[1])),
            y=[str(name) for name in result.labels[y]], zmin=middle - limit, zmax=middle + limit,
            colorscale="RdBu_r", colorbar=dict(title=title, thickness=12), hovertemplate=_hover(y, x, title, layers),
        )
    )  # fmt: skip
    ticks = list(range(0, len(columns), max(1, len(columns) // 40)))
    drawn.update_xaxes(title=x, tickvals=ticks, ticktext=[columns[i] for i in ticks])
    drawn.update_yaxes(title=y, type="category")
    style(drawn, 120 + 18 * max(12, size[0]))
    if len(views) > 1:
        buttons = [dict(label=v[0], method="restyle", args=[_cells(*v[1:], columns)]) for v in views]
        drawn.update_layout(
            updatemenus=[dict(buttons=buttons, x=0, y=1.12, xanchor="left", yanchor="bottom")], margin=dict(t=56)
        )
    return drawn


def axes(result: SweepResult) -> tuple[str, str, tuple[str, ...]]:
    """Which axis goes up, which one to the right ("" for none), and which are left for the menu.

    Layers go up, and positions, or what is patched in a layer, to the right; a grid of strengths is drawn as one.
    """
    names = result.axes
    if len(names) < 3:
        return names[0], names[1] if len(names) == 2 else "", ()
    up = "layer" if "layer" in names else names[-2]
    # What comes before layers are other sweeps (vectors, readings), what comes behind parts of one.
    right = names[names.index(up) + 1] if up != names[-1] else names[0]
    return up, right, tuple(a for a in names if a not in (up, right))


def _views(
    cube: np.ndarray, which: list[str], middle: float, rest: list[str]
) -> list[tuple[str, np.ndarray, list[list[str]]]]:
    """What the menu offers: a name, ``[layers, y, x]``, and what each cell is of."""
    if not rest:
        return [("", cube[..., 0], [[""] * cube.shape[2]] * cube.shape[1])]
    best = np.abs(np.nan_to_num(cube[0] - middle)).argmax(-1)
    strongest = np.take_along_axis(cube, np.broadcast_to(best, cube.shape[:3])[..., None], -1)[..., 0]
    views = [(f"strongest {' and '.join(rest)}", strongest, [[f", {which[k]}" for k in row] for row in best])]
    if len(which) <= VIEWS and cube[0].size <= CELLS:
        views += [(name, cube[..., k], [[f", {name}"] * cube.shape[2]] * cube.shape[1]) for k, name in enumerate(which)]
    return views


def _cells(layers: np.ndarray, of: list[list[str]], columns: list[str], *, unpacked: bool = False) -> dict[str, Any]:
    """Values and hover texts of one view, as a trace has them or as a button sets them."""
    where = np.broadcast_to(np.asarray(columns, object), layers.shape[1:])
    custom = np.dstack([where, np.asarray(of, object), *(layer.astype(object) for layer in layers[1:])])
    return dict(z=layers[0], customdata=custom) if unpacked else dict(z=[layers[0]], customdata=[custom])


def _hover(y: str, x: str, title: str, layers: list[np.ndarray]) -> str:
    place = f"{y} %{{y}}, {x}{' ' * bool(x)}%{{customdata[0]}}%{{customdata[1]}}"
    bounds = " [%{customdata[3]:.4f}, %{customdata[4]:.4f}]" if len(layers) > 2 else ""
    return f"{place}<br>{title} %{{z:.4f}}{bounds}, metric %{{customdata[2]:.4f}}<extra></extra>"

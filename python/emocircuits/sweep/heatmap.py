"""The figure of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from emocircuits.plotting import style

if TYPE_CHECKING:
    from emocircuits.sweep.results import SweepResult


def figure(result: SweepResult) -> go.Figure:
    """Layer by position or unit, diverging around zero; a menu chooses among the entries of a third axis."""
    measurable = result.measurable
    shown = (result.effects if measurable else result.values - result.base).numpy()
    # What the unpatched run has.
    middle = (result.base - result.corrupt) / result.gap if measurable else 0.0
    raw = result.values.numpy()
    title = "effect" if measurable else "metric - unpatched"
    if shown.ndim == 1:
        shown, raw = shown[:, None], raw[:, None]
    across = result.axes[1] if len(result.axes) > 1 else ""
    names = result.labels[across] if across else ["all positions"]
    tokens = result.labels.get("token", [""] * len(names)) if across == "pos" else [""] * len(names)
    limit = float(np.nanmax(np.abs(shown - middle), initial=0.0)) or 1.0

    def cells(z: np.ndarray, values: np.ndarray, which: np.ndarray | None) -> dict[str, Any]:
        extra = [[str(tokens[j]) for j in range(z.shape[1])] for _ in range(z.shape[0])]
        unit = [
            ["" if which is None else f", {result.axes[2]} {which[i, j]}" for j in range(z.shape[1])]
            for i in range(len(z))
        ]
        custom = np.dstack([np.asarray(extra, object), np.asarray(unit, object), values.astype(object)])
        return dict(z=[z], customdata=[custom])

    if shown.ndim == 3:
        units = np.asarray(result.labels[result.axes[2]], object)
        best = np.abs(np.nan_to_num(shown - middle)).argmax(-1)
        take = lambda a: np.take_along_axis(a, best[..., None], -1)[..., 0]  # noqa: E731
        views = [(f"strongest {result.axes[2]}", cells(take(shown), take(raw), units[best]))]
        views += [
            (f"{result.axes[2]} {unit}", cells(shown[..., k], raw[..., k], np.full(best.shape, unit, object)))
            for k, unit in enumerate(units)
        ]
    else:
        views = [("", cells(shown, raw, None))]

    hover = (
        f"{result.axes[0]} %{{y}}, {across or 'positions'} %{{x}} %{{customdata[0]}}%{{customdata[1]}}<br>"
        f"{title} %{{z:.4f}}, metric %{{customdata[2]:.4f}}<extra></extra>"
    )
    drawn = go.Figure(
        go.Heatmap(
            z=views[0][1]["z"][0], customdata=views[0][1]["customdata"][0], x=list(range(len(names))),
            y=[str(name) for name in result.labels[result.axes[0]]], zmin=middle - limit, zmax=middle + limit,
            colorscale="RdBu_r", colorbar=dict(title=title, thickness=12), hovertemplate=hover,
        )
    )  # fmt: skip
    step = max(1, len(names) // 40)
    ticks = list(range(0, len(names), step))
    texts = [f"{names[i]} {tokens[i]}".strip() for i in ticks]
    drawn.update_xaxes(title=across, tickvals=ticks, ticktext=texts)
    drawn.update_yaxes(title=result.axes[0], type="category")
    style(drawn, 120 + 18 * max(12, len(result.labels[result.axes[0]])))
    if len(views) > 1:
        buttons = [dict(label=label, method="restyle", args=[data]) for label, data in views]
        drawn.update_layout(
            updatemenus=[dict(buttons=buttons, x=0, y=1.12, xanchor="left", yanchor="bottom")], margin=dict(t=56)
        )
    return drawn

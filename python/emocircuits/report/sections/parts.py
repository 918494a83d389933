"""What sections are made of: figures with captions side by side, and lines with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from emocircuits.report.figures import fragment

EMOTIONAL, NEUTRAL, OTHER, RANDOM = "#c2410c", "#6b7280", "#0e7490", "#9ca3af"
SIDES = (("emotional", EMOTIONAL, "solid"), ("neutral", NEUTRAL, "dash"))


def beside(figures: Sequence[tuple[go.Figure, str]], *, width: int = 320) -> str:
    """Figures and their captions (HTML), as many beside each other as the page is wide for; one on a phone."""
    look = "margin:0;min-width:0;overflow:hidden"
    parts = [
        f'<figure style="{look}">{fragment(figure)}<figcaption>{caption}</figcaption></figure>'
        for figure, caption in figures
    ]
    # Figures are drawn as the page is read: columns must not be wider before the next figure is there (auto-fit).
    columns = "1fr" if len(figures) == 1 else f"repeat(auto-fill,minmax(min(100%,{width}px),1fr))"
    return f'<div style="display:grid;grid-template-columns:{columns};gap:1.2rem">{"".join(parts)}</div>'


def line(
    figure: go.Figure, told: Mapping[str, Any], name: str, colour: str, dash: str = "solid",
    marked: Sequence[bool] | None = None, legend: bool = True,
) -> None:  # fmt: skip
    """A mean by layer with its shaded 95 % interval; ``marked`` layers have filled markers, the others open ones."""
    layers = list(range(len(told["mean"])))
    low, high = told["low"], told["high"]
    if all(v is not None for v in (*low, *high)):
        figure.add_scatter(
            x=[*layers, *layers[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=colour, opacity=0.15,
            line=dict(width=0), mode="lines", hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    filled = marked if marked is not None else [True] * len(layers)
    figure.add_scatter(
        x=layers, y=told["mean"], mode="lines+markers", name=name, showlegend=legend,
        line=dict(color=colour, dash=dash, width=2.2),
        marker=dict(
            size=8, color=colour, symbol=["circle" if m else "circle-open" for m in filled],
            line=dict(width=[0 if m else 2 for m in filled], color=colour),
        ),
        customdata=list(zip(low, high, strict=True)),
        hovertemplate="layer %{x}: %{y:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<extra>" + name + "</extra>",
    )  # fmt: skip


def below(values: Sequence[float | None], level: float = 0.05) -> list[bool]:
    """Which of some corrected p-values are below a level."""
    return [v is not None and v < level for v in values]

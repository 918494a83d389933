"""Information flow by layer and route."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from emocircuits.circuits.flow import FILE, FORMAT
from emocircuits.circuits.stored import read_record
from emocircuits.plotting import style
from emocircuits.report.sections import Section
from emocircuits.report.sections.parts import SIDES, below, beside, line

SHOWN = (("query", "visual"), ("last", "visual"), ("generated", "visual"), ("last", "query"), ("generated", "query"))
COLOURS = ("#c2410c", "#db2777", "#7c3aed", "#0e7490", "#15803d")


def section(folder: Path) -> Section | None:
    """Saliency of the routes that an emotion can take, both sides, and attention beside it; None without a result."""
    if not (folder / FILE).exists():
        return None
    record = read_record(folder / FILE, FORMAT, "information flow")
    settings, n = record["settings"], record["n"]
    routes = [r for shown in SHOWN for r in record["routes"] if (r["to"], r["source"]) == shown]
    loss = "the emotion words of" if settings["loss"] == "emotion words" else "all tokens of"
    figures = [(_saliency(r), f"{_name(r)}: average over {r['n']} pairs.") for r in routes]
    figures.append((_everything(record), f"All routes, emotional side, log scale: average over {n} pairs."))
    figures.append((_mass(routes), f"Plain attention on the same routes: average over {n} pairs. {_dashes()}"))
    peaks = [f"{_name(r)} in layer {_peak(r)}" for r in routes]
    text = (
        "Saliency |A dL/dA|, mean over heads, divided by the number of token pairs of a route. L is the cross-entropy "
        f"of {loss} the model's own answer to each side, which is forced ({settings['forced_tokens_likeliest']:.1%} of "
        f"its counted tokens are the likeliest there). Average over {n} of {settings['asked']} "
        "pairs on the unmodified model; shading is the 95 % bootstrap interval over pairs, a filled marker a layer in "
        "which the sides differ (q < 0.05). On the emotional side the largest saliency is found on "
        + ", ".join(peaks)
        + "."
    )
    if record["left_out"]:
        text += f" Left out: {len({x['id'] for x in record['left_out']})} pairs with an answer that names no emotion."
    return Section("Information flow", beside(figures), text)


def _name(route: dict[str, Any]) -> str:
    return f"{route['source']} → {route['to']}"


def _dashes() -> str:
    return "Solid: emotional side; dashed: neutral side."


def _peak(route: dict[str, Any]) -> int:
    mean = route["saliency"]["emotional"]["mean"]
    return int(max(range(len(mean)), key=lambda i: mean[i] or 0.0))


def _saliency(route: dict[str, Any]) -> go.Figure:
    figure = go.Figure()
    marked = below(route["saliency"]["difference"]["q"])
    for side, colour, dash in SIDES:
        line(figure, route["saliency"][side], side, colour, dash, marked)
    figure.update_xaxes(title="layer", dtick=_tick(route))
    figure.update_yaxes(title="saliency a pair", exponentformat="power", rangemode="tozero")
    return style(figure, 260)


def _everything(record: dict[str, Any]) -> go.Figure:
    names = [_name(r) for r in record["routes"]]
    raw = np.array([r["saliency"]["emotional"]["mean"] for r in record["routes"]], float)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(raw > 0, np.log10(raw), np.nan)
    figure = go.Figure(
        go.Heatmap(
            z=z, y=names, customdata=raw, colorscale="Viridis", colorbar=dict(title="log10", thickness=10),
            hovertemplate="%{y}, layer %{x}<br>saliency %{customdata:.3g}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="layer", dtick=_tick(record["routes"][0]))
    figure.update_yaxes(autorange="reversed", automargin=True)
    return style(figure, 120 + 18 * len(names))


def _mass(routes: list[dict[str, Any]]) -> go.Figure:
    figure = go.Figure()
    for route, colour in zip(routes, COLOURS, strict=False):
        for side, _, dash in SIDES:
            line(figure, route["mass"][side], _name(route), colour, dash, legend=side == "emotional")
    figure.update_xaxes(title="layer", dtick=_tick(routes[0]) if routes else None)
    figure.update_yaxes(title="weight of a row", range=[0, 1])
    return style(figure, 380).update_layout(legend=dict(y=1.3))


def _tick(route: dict[str, Any]) -> int:
    return 1 if len(route["saliency"]["emotional"]["mean"]) <= 12 else 4

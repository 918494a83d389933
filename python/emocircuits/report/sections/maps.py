"""Attention maps: masses, mean maps, and single examples drawn on their pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from PIL import Image

from emocircuits.circuits.maps import FILE, FORMAT
from emocircuits.circuits.stored import read_record
from emocircuits.plotting import style
from emocircuits.report.sections import Section
from emocircuits.report.sections.parts import RANDOM, SIDES, beside

Cells = Sequence[Sequence[float]]


def section(folder: Path) -> Section | None:
    """Where critical heads look when the emotion word is said, and where random heads do; None without a result."""
    if not (folder / FILE).exists():
        return None
    record = read_record(folder / FILE, FORMAT, "attention maps")
    n, mass, settings = record["n"], record["mass"], record["settings"]
    draws = settings["draws"]
    parts = [
        beside(
            [(
                _masses(record),
                f"Weight on the whole image: average over {n} pairs, bars are 95 % bootstrap intervals. Open circles: "
                f"{draws} draws of as many random heads of the same layers, emotional side.",
            )]
        )
    ]  # fmt: skip
    if record["average"] is not None:
        limit = max(_most(record["average"][s][k]) for s, _, _ in SIDES for k in ("heads", "random"))
        parts.append(
            beside(
                [
                    (_over(None, record["average"][s][k], limit), f"{what}, {s} side: average over {n} pairs.")
                    for s, _, _ in SIDES for k, what in (("heads", "Critical heads"), ("random", "Random heads"))
                ],
                width=220,
            )
        )  # fmt: skip
    for example in record["examples"]:
        limit = max(_most(example[s][k]) for s, _, _ in SIDES for k in ("heads", "random"))
        shown = [
            (_over(example[s]["picture"], example[s][k], limit), _caption(example, s, what, example[s][k]))
            for s, _, _ in SIDES for k, what in (("heads", "critical heads"), ("random", "random heads"))
        ]  # fmt: skip
        parts.append(beside(shown, width=220))
    told = mass["emotional"]
    text = (
        "The row that emits the first emotion word of the model's own answer, on the unmodified model. On the "
        f"emotional side {len(record['heads'])} critical heads give the image {told['heads']['mean']:.3f} of their "
        f"weight, random heads of the same layers {told['random']['mean']:.3f} (above {told['above']} of {draws} "
        f"draws; paired p = {told['p']:.2g}); on the neutral side {mass['neutral']['heads']['mean']:.3f} and "
        f"{mass['neutral']['random']['mean']:.3f}. Difference between the sides "
        f"{mass['difference']['mean']:+.3f} (p = {mass['difference']['p']:.2g}). Averages over {n} of "
        f"{settings['asked']} pairs, and {len(record['examples'])} single examples."
    )
    if record["left_out"]:
        text += f" Left out: {len({x['id'] for x in record['left_out']})} pairs with an answer that names no emotion."
    if record["average"] is None:
        text += f" {settings['grids'][0].upper()}{settings['grids'][1:]}."
    return Section("Attention maps", "".join(parts), text)


def _caption(example: dict[str, Any], side: str, what: str, cells: Cells) -> str:
    view = example[side]
    total = sum(map(sum, cells))
    return (
        f"Example {html.escape(example['id'])} ({html.escape(example['emotion'])}), {side} side, {what}: {total:.3f} "
        f"of their weight at “{html.escape(view['word'])}” in “{html.escape(view['said'])}”"
    )


def _masses(record: dict[str, Any]) -> go.Figure:
    figure, mass = go.Figure(), record["mass"]
    names = [f"{l}.{h}" for l, h in record["heads"]]
    for side, colour, _ in SIDES:
        told = mass[side]["by_head"]
        known = None not in (*told["low"], *told["high"])
        bars = dict(
            type="data", symmetric=False, thickness=1.5,
            array=[b - m for b, m in zip(told["high"], told["mean"], strict=True)],
            arrayminus=[m - a for a, m in zip(told["low"], told["mean"], strict=True)],
        ) if known else None  # fmt: skip
        figure.add_scatter(
            x=names, y=told["mean"], mode="markers", name=f"{side} side", error_y=bars,
            marker=dict(color=colour, size=10),
            hovertemplate="head %{x}: %{y:.3f}<extra>" + f"{side} side</extra>",
        )  # fmt: skip
    draws = mass["emotional"]["draws"]
    figure.add_scatter(
        x=["random"] * len(draws), y=draws, mode="markers", name="random draw",
        marker=dict(color=RANDOM, size=9, symbol="circle-open", line=dict(width=2)),
        hovertemplate="random draw: %{y:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title="head (layer.head)", type="category")
    figure.update_yaxes(title="weight on the image", rangemode="tozero")
    return style(figure, 320)


def _over(picture: str | None, cells: Cells, limit: float) -> go.Figure:
    """Weights by row and column of the image, over the picture where there is one."""
    rows, columns = len(cells), len(cells[0])
    figure = go.Figure(
        go.Heatmap(
            z=[list(r) for r in cells], x=[c + 0.5 for c in range(columns)], y=[r + 0.5 for r in range(rows)],
            zmin=0, zmax=limit or 1.0, opacity=1.0 if picture is None else 0.55, colorscale="Inferno", showscale=False,
            hovertemplate="weight %{z:.4f}<extra></extra>",
        )
    )  # fmt: skip
    ratio = rows / columns
    if picture is not None:
        width, height = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).size
        ratio = height / width
        figure.add_layout_image(
            source=picture, xref="x", yref="y", x=0, y=0, sizex=columns, sizey=rows, sizing="stretch", layer="below"
        )
    figure.update_xaxes(visible=False, range=[0, columns], constrain="domain")
    # One cell is as wide as the picture says, not always a square.
    figure.update_yaxes(
        visible=False, range=[rows, 0], scaleanchor="x", scaleratio=ratio * columns / rows, constrain="domain"
    )
    return style(figure, 240).update_layout(margin=dict(l=0, r=0, t=0, b=0))


def _most(cells: Cells) -> float:
    return max(map(max, cells))

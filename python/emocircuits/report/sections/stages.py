"""Stage patching: hit rates after rows of one role are set to those of X+, by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from emocircuits.circuits.stages import FILE, FORMAT
from emocircuits.circuits.stored import read_record
from emocircuits.plotting import style
from emocircuits.report.sections import Section
from emocircuits.report.sections.parts import EMOTIONAL, NEUTRAL, OTHER, RANDOM, beside

COLOURS = {"shallow": EMOTIONAL, "middle": OTHER, "deep": "#7c3aed"}
NAMES = {"visual": "visual tokens", "query": "the text after the image", "last": "the last prompt token"}


def section(folder: Path) -> Section | None:
    """Every role in every stage, beside both runs left alone and random controls; None without a result."""
    if not (folder / FILE).exists():
        return None
    record = read_record(folder / FILE, FORMAT, "stage patching")
    n, settings, gap, cells = record["n"], record["settings"], record["gap"], record["cells"]
    found = [c for c in cells if c["effect"]["q"] < 0.05 and c["random"]["q"] < 0.05 and c["effect"]["change"] > 0]
    told = "; ".join(
        f"{NAMES[c['role']]}, {_layers(c)}: {c['effect']['value']:.3f} "
        f"[{c['effect']['base'] + c['effect']['low']:.3f}, {c['effect']['base'] + c['effect']['high']:.3f}], "
        f"random {c['random']['mean']:.3f}"
        for c in sorted(found, key=lambda c: -c["effect"]["value"])
    )
    text = (
        "In the run on the neutral side, rows of one role are set to those of the emotional side (resid_post, every "
        f"layer of a stage); hit rate of the generated answers. Averages over {n} pairs, bars are 95 % bootstrap "
        "intervals. "
        f"Left alone the emotional side is hit {gap['value']:.3f} of the time, the neutral side {gap['base']:.3f}. "
        f"Open circles: {settings['draws']} random controls, {settings['random']}. "
        + (f"Above the neutral side and above random (q < 0.05): {told}." if found else
           "Nothing is above the neutral side and above random (q < 0.05).")
    )  # fmt: skip
    caption = f"Dotted: both sides left alone. Average over {n} pairs."
    return Section("Stage patching", beside([(_figure(record), caption)]), text)


def _layers(cell: dict[str, Any]) -> str:
    first, last = cell["layers"][0], cell["layers"][-1]
    return f"{cell['stage']} ({f'layer {first}' if first == last else f'layers {first} to {last}'})"


def _figure(record: dict[str, Any]) -> go.Figure:
    figure, cells, gap = go.Figure(), record["cells"], record["gap"]
    stages = list(dict.fromkeys(c["stage"] for c in cells))
    for i, stage in enumerate(stages):
        of = [c for c in cells if c["stage"] == stage]
        names, effects = [c["role"] for c in of], [c["effect"] for c in of]
        figure.add_bar(
            x=names, y=[e["value"] for e in effects], name=_layers(of[0]), marker_color=COLOURS[stage], offsetgroup=i,
            error_y=dict(
                type="data", symmetric=False, thickness=1.5,
                array=[e["base"] + e["high"] - e["value"] for e in effects],
                arrayminus=[e["value"] - e["base"] - e["low"] for e in effects],
            ),
            customdata=[[e["q"], c["random"]["mean"], c["random"]["q"]] for e, c in zip(effects, of, strict=True)],
            hovertemplate="%{x}: hit rate %{y:.3f}<br>q %{customdata[0]:.2g}<br>random %{customdata[1]:.3f}, "
            "q %{customdata[2]:.2g}<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[c["role"] for c in of for _ in c["random"]["values"]],
            y=[v for c in of for v in c["random"]["values"]], mode="markers", offsetgroup=i, showlegend=False,
            marker=dict(symbol="circle-open", size=7, color=RANDOM), hoverinfo="skip",
        )  # fmt: skip
    for value, name in ((gap["value"], "emotional side"), (gap["base"], "neutral side")):
        figure.add_hline(y=value, line=dict(dash="dot", color=NEUTRAL), annotation_text=name)
    figure.update_layout(barmode="group", scattermode="group")
    figure.update_yaxes(title="hit rate", range=[0, 1.08])
    return style(figure, 340)

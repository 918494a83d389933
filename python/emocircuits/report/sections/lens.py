"""The logit lens on visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from emocircuits.circuits.lens import FILE, FORMAT, GROUPS
from emocircuits.circuits.stored import read_record
from emocircuits.plotting import style
from emocircuits.report.sections import Section
from emocircuits.report.sections.parts import OTHER, RANDOM, SIDES, below, beside, line

NAMES = {"visual": "visual tokens", "query": "text after the image", "last": "the last prompt token"}


def section(folder: Path) -> Section | None:
    """Entropy and emotion mass by layer, of visual tokens and, for comparison, of text; None without a result."""
    if not (folder / FILE).exists():
        return None
    record = read_record(folder / FILE, FORMAT, "a logit lens")
    settings, figures = record["settings"], []
    for group in GROUPS:
        told = record["groups"][group]
        if told["n"]:
            told_of = f"{NAMES[group]}: average over the rows of a prompt, then over {told['n']} pairs."
            figures += [(_mass(told), f"Emotion words, {told_of}"), (_entropy(told), f"Entropy, {told_of}")]
    visual = record["groups"]["visual"]["emotional"]
    draws = settings["draws"]
    above = [l for l, k in enumerate(visual["random"]["gold_above"]) if k == draws]
    where = f"in layers {', '.join(map(str, above))}" if above else "in no layer"
    last = len(visual["gold"]["mean"]) - 1
    text = (
        f"Every row read through the final norm and the unembedding ({settings['vocabulary']} tokens): entropy in "
        f"nats, and the probability of the first sub-tokens of the pair's emotion, of the other emotions (mean), "
        f"and of as many random tokens ({draws} draws, mean). Unmodified model; shading is the 95 % bootstrap interval "
        f"over {record['n']} pairs, a filled marker a layer in which the sides differ (q < 0.05). Visual tokens of the "
        f"emotional side give the pair's emotion more than every random draw {where}; in layer {last} it has "
        f"{visual['gold']['mean'][last]:.3g}, the other emotions {visual['others']['mean'][last]:.3g} each, random "
        f"tokens {visual['random']['mean'][last]:.3g}."
    )
    return Section("Logit lens on visual tokens", beside(figures), text)


def _mass(told: dict[str, Any]) -> go.Figure:
    figure = go.Figure()
    marked = below(told["difference"]["gold"]["q"])
    for side, colour, dash in SIDES:
        line(figure, told[side]["gold"], f"the pair's emotion, {side} side", colour, dash, marked)
    line(figure, told["emotional"]["others"], "other emotions, emotional side", OTHER, "dot")
    line(figure, told["emotional"]["random"], "random tokens, emotional side", RANDOM, "dot")
    figure.update_yaxes(title="probability", rangemode="tozero")
    return _styled(figure, told, 400).update_layout(legend=dict(orientation="v", y=-0.25, yanchor="top"))


def _entropy(told: dict[str, Any]) -> go.Figure:
    figure = go.Figure()
    marked = below(told["difference"]["entropy"]["q"])
    for side, colour, dash in SIDES:
        line(figure, told[side]["entropy"], f"{side} side", colour, dash, marked)
    figure.update_yaxes(title="nats", rangemode="tozero")
    return _styled(figure, told, 320)


def _styled(figure: go.Figure, told: dict[str, Any], height: int) -> go.Figure:
    figure.update_xaxes(title="layer", dtick=1 if len(told["emotional"]["entropy"]["mean"]) <= 12 else 4)
    return style(figure, height)

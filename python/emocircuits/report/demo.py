"""The demo's page: one HTML file, no network, every figure labelled average or single example with its n."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs

from emocircuits.files import write_bytes, write_json
from emocircuits.report.figures import COLOURS, fragment, heatmap, over_image, style

NAMES = {"baseline": "untouched", "veena": "VEENA", "vee": "VEE alone", "ena": "ENA alone"}


def save(result: dict[str, Any], out: Path) -> dict[str, Path]:
    """Write ``demo.json``, ``circuit.json``, ``plan.json`` and ``demo.html`` into ``out``; returns their paths."""
    return {
        "json": write_json(out / "demo.json", result),
        "circuit": write_json(out / "circuit.json", result["circuit"]),
        "plan": write_json(out / "plan.json", result["plan"]),
        "page": write_bytes(out / "demo.html", page(result).encode()),
    }


def page(result: dict[str, Any]) -> str:
    """The whole page as HTML."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    attention = result["attention"]
    limit = max(max(map(max, attention[k]["map"])) for k in ("before", "after"))
    figures = {
        "intensity": fragment(by_intensity(result)),
        "controls": fragment(controls(result)),
        "heads": fragment(
            heatmap(result["localization"]["head_effects"], result["attention"]["heads"], title="effect")
        ),
        "layers": fragment(layers(result)),
        "dose": fragment(dose(result)),
        "before": fragment(over_image(attention["image"], attention["before"]["map"], limit)),
        "after": fragment(over_image(attention["image"], attention["after"]["map"], limit)),
    }
    template = environment.get_template("demo.html")
    return template.render(r=result, figures=figures, plotly=get_plotlyjs(), names=NAMES, settings=_settings(result))


def by_intensity(result: dict[str, Any]) -> go.Figure:
    """Hit rate and prior-driven hallucination by intensity of the expression."""
    figure = go.Figure()
    for variant in ("baseline", "veena"):
        rows = result["by_intensity"][variant]
        for column, name, dash in ((1, "says the face", "solid"), (2, "says the event", "dot")):
            figure.add_scatter(
                x=[r[0] for r in rows], y=[r[column] for r in rows], mode="lines+markers",
                name=f"{NAMES[variant]}: {name}", line=dict(color=COLOURS[variant], dash=dash, width=2.5),
                hovertemplate="intensity %{x}<br>%{y:.3f}<extra>" + f"{NAMES[variant]}: {name}</extra>",
            )  # fmt: skip
    figure.update_xaxes(title="intensity of the expression")
    figure.update_yaxes(title="share of answers", range=[0, 1])
    return style(figure, 400).update_layout(legend=dict(y=1.25))


def controls(result: dict[str, Any]) -> go.Figure:
    """Each variant beside its random controls."""
    figure = go.Figure()
    for variant in ("veena", "vee", "ena"):
        draws = result["hit_rate"]["random_controls" if variant == "veena" else f"random_controls_{variant}"]
        figure.add_scatter(
            x=draws, y=[NAMES[variant]] * len(draws), mode="markers", name="random, same layers",
            showlegend=variant == "veena",
            marker=dict(color=COLOURS["random"], size=9, symbol="circle-open", line=dict(width=2)),
            hovertemplate="random draw %{x:.3f}<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[result["hit_rate"][variant]], y=[NAMES[variant]], mode="markers", name="the circuit",
            showlegend=variant == "veena",
            marker=dict(color=COLOURS["veena"], size=13), hovertemplate=f"{NAMES[variant]} %{{x:.3f}}<extra></extra>",
        )  # fmt: skip
    base = result["hit_rate"]["baseline"]
    figure.add_vline(x=base, line=dict(color=COLOURS["baseline"], dash="dash"), annotation_text=f"untouched {base:.3f}")
    figure.update_xaxes(title="hit rate on weak faces with contradicting events")
    return style(figure, 300).update_layout(margin=dict(l=80))


def layers(result: dict[str, Any]) -> go.Figure:
    """Steering and whole-layer patching by layer."""
    found = result["localization"]
    x = list(range(len(found["injection"])))
    figure = go.Figure()
    for name, key, colour, dash in (
        ("steering vector injected", "injection", COLOURS["veena"], "solid"),
        ("random direction of equal norm", "injection_random", COLOURS["random"], "dot"),
        ("all heads of the layer patched", "layer_effects", COLOURS["ena"], "dash"),
    ):
        figure.add_scatter(
            x=x, y=found[key], mode="lines+markers", name=name, line=dict(color=colour, dash=dash, width=2.5),
            hovertemplate="layer %{x}: %{y:.3f}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title="layer", dtick=1)
    figure.update_yaxes(title="P(emotion word), or effect")
    return style(figure, 340).update_layout(legend=dict(y=1.3))


def dose(result: dict[str, Any]) -> go.Figure:
    """Dose response of the chosen VEE on the choosing part."""
    rows = [{**result["choosing"]["baseline"], "beta": 1.0}, *result["choosing"]["dose"]]
    figure = go.Figure()
    for key, name, colour, dash in (
        ("hit", "says the face (weak)", COLOURS["veena"], "solid"),
        ("prior", "says the event (weak)", COLOURS["veena"], "dot"),
        ("cost", "hit where a boost can only cost", COLOURS["ena"], "dash"),
    ):
        figure.add_scatter(
            x=[r["beta"] for r in rows], y=[r[key] for r in rows], mode="lines+markers", name=name,
            line=dict(color=colour, dash=dash, width=2.5),
            hovertemplate="beta %{x}: %{y:.3f}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title="beta")
    figure.update_yaxes(title="share of answers", range=[0, 1])
    return style(figure, 360).update_layout(legend=dict(y=1.3))


def _settings(result: dict[str, Any]) -> str:
    v = result["chosen"]["veena"]
    last = ", last prompt row too" if v["last"] else ""
    return (
        f"{v['heads']} heads, beta {v['beta']:g} ({v['reading']}, {v['where']}{last}); "
        f"{v['neurons']} neurons, gamma {v['gamma']:g} ({v['ena_phase']})"
    )

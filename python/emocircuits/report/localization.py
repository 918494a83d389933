"""The page of a localisation: one HTML file without a network, made from the files of a run folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs

from emocircuits.circuit import Circuit
from emocircuits.files import read_json, write_bytes
from emocircuits.report.sections import (
    decoupling,
    flow,
    heads,
    layers,
    lens,
    maps,
    neurons,
    pairs,
    run,
    stages,
    steering,
    tuning,
    verification,
)

FILE = "report.html"
SECTIONS = (
    pairs, steering, layers, heads, neurons, decoupling, flow, lens, maps, stages, verification, tuning, run,
)  # fmt: skip
"""In the order of the page. Each has ``section(folder)``."""


def save(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run folder.

    Args:
        folder: of :func:`emocircuits.circuits.localize.localize`; the run need not be finished.
        out: where to write; ``report.html`` in the folder by default.

    Raises:
        ValueError: the folder has no ``run.json``, or files that are damaged.
    """
    return write_bytes(Path(folder) / FILE if out is None else Path(out), page(folder).encode())


def page(folder: str | Path) -> str:
    """The whole page as HTML; see :func:`save`."""
    folder = Path(folder)
    record: Any = read_json(folder / run.FILE, "a run (emocircuits localize makes one)")
    found = []
    for module in SECTIONS:
        try:
            section = module.section(folder)
        except (KeyError, TypeError, IndexError) as error:
            name = module.__name__.rsplit(".", 1)[-1]
            raise ValueError(f"{folder}: the files of {name} are damaged ({error!r}); find them again") from error
        if section is not None:
            found.append(section)
    circuit = Circuit.load(folder / "circuit.json") if (folder / "circuit.json").is_file() else None
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("localization.html").render(
        run=record, circuit=circuit, sections=found, plotly=get_plotlyjs()
    )

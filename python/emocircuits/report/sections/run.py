"""Where the numbers come from: settings, model, versions, seconds."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from emocircuits.files import read_json
from emocircuits.report.sections import Section

FILE = "run.json"


def section(folder: Path) -> Section | None:
    """From ``run.json``."""
    if not (folder / FILE).is_file():
        return None
    r: Any = read_json(folder / FILE, "a run")
    steps = "".join(
        f'<tr><td>{escape(name)}</td><td>{escape(step["says"])}</td><td class="n">{step["seconds"]:.1f}</td></tr>'
        for name, step in r["steps"].items()
    ) + "".join(
        f'<tr><td>{escape(name)}</td><td class="soft">left out: {escape(why)}</td><td></td></tr>'
        for name, why in r["skipped"].items()
    )
    settings = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(json.dumps(value))}</code></td></tr>"
        for name, value in r["settings"].items()
    )
    versions = ", ".join(f"{escape(name)} {escape(v)}" for name, v in r["versions"].items())
    html = (
        '<div class="wrap"><table><tr><th>step</th><th>what it found</th><th class="n">seconds</th></tr>'
        f"{steps}</table></div>"
        f'<details><summary>Settings and readings</summary><div class="wrap"><table>{settings}</table></div></details>'
        f'<p class="soft">{escape(r["device"])}, {r["threads"]} threads; {versions}; commit '
        f"{escape(str(r['commit']))}.</p>"
    )
    text = (
        f"{r['model']} ({r['model_type']}, {r['layers']} layers of {r['heads']} heads, weights "
        f"{r['fingerprint'][:12]}), seed {r['seed']}."
    )
    return Section("How it was found", html, text)

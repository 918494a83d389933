"""Neuron cards, and the trees that contextual triggers were found by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from emocircuits.files import read_json
from emocircuits.report.sections import Section

FILE, TREES = "neurons.json", "tracing.json"
TITLES = {"explicit": "Explicit-state neurons", "contextual": "Contextual triggers"}
WORDS, TOKENS, NEURONS = 6, 3, 3
"""Of each row and node so many are shown; all of them stand in the files."""
Record = Mapping[str, Any]


def section(folder: Path) -> Section | None:
    """From ``neurons.json`` and, where there is one, ``tracing.json``."""
    if not (folder / FILE).is_file():
        return None
    record: Any = read_json(folder / FILE, "neurons of a circuit")
    settings = record["settings"]
    parts = [_table(name, [n for n in record["neurons"] if n["type"] == name], settings) for name in TITLES]
    if record["tracing"]:
        parts.append(_trees(read_json(folder / TREES, "traced heads")))
    elif settings["not_traced"]:
        parts.append(f'<p class="soft">Nothing was traced: {escape(settings["not_traced"])}.</p>')
    passed = {name: sum(n["critical"] for n in record["neurons"] if n["type"] == name) for name in TITLES}
    text = (
        f"Averages over {settings['tested_on']} of {record['n']} pairs; the neurons were ranked on the other "
        f"{settings['ranked_on']}. {passed['explicit']} explicit-state neurons and {passed['contextual']} contextual "
        "triggers restore more of the answer than random neurons of their layers that fire as much."
    )
    return Section("Neurons", "\n".join(parts), text)


def _table(name: str, neurons: Sequence[Record], settings: Record) -> str:
    title = f"<h3>{TITLES[name]}</h3>"
    if not neurons:
        return f'{title}<p class="soft">No candidates.</p>'
    told = {
        "explicit": f"At least {settings['k']} of the first {settings['look']} tokens that it makes more likely are "
        f"emotion words ({settings['emotion_tokens']} of {settings['vocabulary']} tokens are).",
        "contextual": f"Fewer than {settings['k']} of the first {settings['look']} tokens are emotion words; a "
        "critical head gets the emotion from it.",
    }[name]  # fmt: skip
    rows = "\n".join(_row(n) for n in neurons)
    return f"""{title}
<p class="soft">{told} Effect: share of the gap in {escape(settings["reads"])} that comes back when the neuron alone is
patched in {escape(settings["patched_rows"][name])} rows, with a 95 % interval over the pairs of its emotion; beside it
the 95th percentile of {settings["controls"]} random neurons of its layer. Bold: it passed
(q &lt; {settings["level"]:g}, {settings["margin"]:g} above random).</p>
<div class="wrap"><table class="neurons">
<tr><th>neuron</th><th>spells</th><th class="n">effect</th></tr>
{rows}
</table></div>"""


def _row(n: Record) -> str:
    e = n["effect"]
    name = f"{n['layer']}.{n['neuron']}"
    name = f"<b>{name}</b>" if n["critical"] else name
    source = f"<br>from head {n['head'][0]}.{n['head'][1]}" if n["head"] else ""
    silent = "<br>by falling silent" if n["sign"] < 0 else ""
    words = ", ".join(map(escape, n["tokens"][:WORDS]))
    fires = "; ".join(
        f"{escape(role)} {value:.2f} / {n['activation']['neutral'].get(role, 0.0):.2f}"
        for role, value in n["activation"]["emotional"].items()
    )
    return (
        f'<tr><td>{name}<br><span class="soft">{escape(n["emotion"])}{source}{silent}</span></td>'
        f'<td>{words}<details><summary class="soft">card</summary><p class="soft">{n["hits"]} emotion words among: '
        f"{', '.join(map(escape, n['tokens']))}. Mean activation, emotional / neutral: {fires}. Score {n['score']:.3g} "
        f"[{n['low']:.3g}, {n['high']:.3g}], random {n['random']:.3g}.</p></details></td>"
        f'<td class="n">{e["effect"]:.3f}<br><span class="soft">[{e["low"]:.3f}, {e["high"]:.3f}]<br>'
        f"random {e['random']:.3f}<br>q = {e['q']:.2g}, n = {e['n']}</span></td></tr>"
    )


def _trees(record: Record) -> str:
    settings = record["settings"]
    roots = [n for n in record["nodes"] if n["parent"] is None]
    trees = "\n".join(f"<li>{_node(n, record['nodes'])}</li>" for n in roots)
    left = "".join(f"<li>head {l}.{h}: {escape(why)}</li>" for l, h, why in record["untraced"])
    left = f'<p class="soft">Not traced:</p><ul class="soft">{left}</ul>' if left else ""
    return f"""<h3>Where critical heads get the emotion from</h3>
<p class="soft">For each head the token that most of its contribution along S comes from ({escape(settings["source"])}),
in how many of {record["n"]} pairs, and what neurons and heads there are worth: share of the head's change, average over
{settings["tested_on"]} pairs.</p>
<ul class="trees">
{trees}
</ul>{left}"""


def _node(node: Record, nodes: Sequence[Record]) -> str:
    tokens = ", ".join(f"{escape(s['token'])} ({s['frequency']:.0%})" for s in node["sources"][:TOKENS])
    roles = ", ".join(f"{escape(r)} {share:.0%}" for r, share in node["roles"].items())
    neurons = ", ".join(f"{u['layer']}.{u['neuron']} ({u['score']:.3g})" for u in node["neurons"][:NEURONS])
    worth = "" if node["parent"] is None else f" writes {node['score']:.1%} of the change there;"
    below = "".join(f"<li>{_node(n, nodes)}</li>" for n in nodes if n["parent"] == node["id"])
    return (
        f"<b>head {node['layer']}.{node['head']}</b>{worth} reads {roles}: <i>{tokens}</i>"
        + (f"; neurons {neurons}" if neurons else "")
        + (f"<ul>{below}</ul>" if below else "")
    )

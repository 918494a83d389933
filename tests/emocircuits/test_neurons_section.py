"""The report's section on neurons: from files alone, and every number on it stands in them."""

import json
from html.parser import HTMLParser

from emocircuits.report.sections.neurons import section

EFFECT = {"effect": 0.4321, "low": 0.4, "high": 0.5, "random": 0.0123, "p": 1e-4, "q": 0.002, "n": 6}
CARD = {
    "layer": 3, "neuron": 17, "type": "explicit", "emotion": "sad", "sign": -1, "tokens": ["<b>gloomy", "tearful"],
    "hits": 2, "head": None, "rank_score": 0.2, "score": 0.1875, "low": 0.1, "high": 0.25, "random": 0.01,
    "effect": EFFECT, "critical": True,
    "activation": {"emotional": {"visual": 1.25, "last": 3.5}, "neutral": {"visual": 0.5, "last": 0.25}},
}  # fmt: skip
SETTINGS = {
    "look": 20, "k": 5, "emotion_tokens": 40, "vocabulary": 259, "reads": "log-odds", "controls": 10, "level": 0.05,
    "margin": 0.01, "patched_rows": {"explicit": "last", "contextual": "all"}, "tested_on": 12, "ranked_on": 13,
    "not_traced": "",
}  # fmt: skip
NODE = {
    "id": 0, "parent": None, "depth": 0, "layer": 2, "head": 1, "rank_score": 1.0, "score": 1.0, "frequency": 1.0,
    "change": 3.0, "sources": [{"token": "ready", "role": "query", "frequency": 0.75, "share": 0.2}],
    "roles": {"query": 1.0}, "neurons": [],
}  # fmt: skip


class Balanced(HTMLParser):
    """Refuses tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def write(folder, neurons, tracing=None, settings=SETTINGS):
    record = {"n": 25, "settings": settings, "neurons": neurons, "tracing": "tracing.json" if tracing else None}
    (folder / "neurons.json").write_text(json.dumps(record))
    if tracing:
        (folder / "tracing.json").write_text(json.dumps(tracing))


def test_cards_and_trees(tmp_path):
    trigger = {**CARD, "layer": 0, "neuron": 5, "type": "contextual", "head": [1, 2], "sign": 1, "critical": False}
    child = {**NODE, "id": 1, "parent": 0, "depth": 1, "layer": 1, "head": 2, "score": 0.187}
    child["neurons"] = [{"layer": 0, "neuron": 5, "rank_score": 0.1, "score": 0.0625, "frequency": 0.5}]
    about = {"source": "signed", "tested_on": 12}
    trees = {"n": 25, "settings": about, "nodes": [NODE, child], "untraced": [[5, 0, "no"]]}
    write(tmp_path, [CARD, trigger], trees)
    found = section(tmp_path)
    for told in (
        "<b>3.17</b>", "0.432", "[0.400, 0.500]", "random 0.012", "q = 0.002, n = 6", "by falling silent",
        "visual 1.25 / 0.50", "from head 1.2", "head 2.1", "ready (75%)", "writes 18.7% of the change", "0.5 (0.0625)",
        "Not traced",
    ):  # fmt: skip
        assert told in found.html
    assert "<b>gloomy" not in found.html
    assert "&lt;b&gt;gloomy" in found.html
    assert "12 of 25 pairs" in found.text
    assert "1 explicit-state neurons and 0 contextual" in found.text
    parser = Balanced()
    parser.feed(found.html)
    assert not parser.open


def test_without_trees_or_files(tmp_path):
    assert section(tmp_path) is None
    write(tmp_path, [CARD], settings={**SETTINGS, "not_traced": "there are no critical heads"})
    assert "Nothing was traced: there are no critical heads" in section(tmp_path).html
    assert "No candidates" in section(tmp_path).html

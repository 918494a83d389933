"""docs/analyses.md: its code runs, and its numbers are what it measures."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "analyses.md").read_text(encoding="utf-8")


def row(name):
    (line,) = [x for x in PAGE.splitlines() if x.startswith(f"| {name} ")]
    return [float(cell) for cell in line.split("|")[2:-1]]


def test_the_page_measures_what_it_says():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/analyses.md", "exec"), names)
    assert {"flow.json", "lens.json", "maps.json"} <= {p.name for p in names["run"].iterdir()}
    assert len(names["pairs"]) == 40
    flow, lens, maps = names["flow"], names["lens"].summary()["visual"], names["maps"].summary()
    # Rounding differs between machines; the story does not.
    for source in ("visual", "query"):
        for side in ("emotional", "neutral"):
            told = row(f"saliency {source} → generated, {side} (1e-6)")
            assert np.allclose(flow.of("generated", source, side).mean(0) * 1e6, told, rtol=0.05, atol=0.6)
    for side in ("emotional", "neutral"):
        assert np.allclose(lens[side]["gold"]["mean"], row(f"visual tokens, P(the pair's emotion), {side}"), atol=0.01)
    assert np.allclose(
        lens["emotional"]["random"]["mean"], row("visual tokens, P(random tokens), emotional"), atol=0.01
    )
    assert lens["emotional"]["random"]["gold_above"][2:] == [10] * 4
    assert lens["neutral"]["gold"]["mean"][5] < 0.1
    q = next(r for r in flow.summary() if (r["to"], r["source"]) == ("generated", "visual"))["saliency"]["difference"]
    assert max(q["q"][3:]) < 0.01
    assert maps["emotional"]["heads"]["mean"] == pytest.approx(0.956, abs=0.003)
    assert maps["emotional"]["random"]["mean"] == pytest.approx(0.941, abs=0.003)
    assert maps["neutral"]["heads"]["mean"] == pytest.approx(0.978, abs=0.003)
    assert maps["neutral"]["random"]["mean"] == pytest.approx(0.958, abs=0.003)

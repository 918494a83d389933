"""The demo's parts and the whole of it, small."""

import contextlib
import io
import json
import re

import numpy as np
import pytest

from emocircuits import VEENA, Circuit, Plan
from emocircuits.circuits import random_like, steering_vectors
from emocircuits.cli import main
from emocircuits.demo import story, summary
from emocircuits.demo.cases import LEVELS, WEAK, Scores, agreeing, contradicting, identities, neutral
from emocircuits.embedded import faces, language
from emocircuits.scoring import compare


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The command as a user runs it, on fewer identities: (result printed, folder written)."""
    out, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(story, "PEOPLE", {"rank": 5, "choose": 2, "report": 3})
        assert main(["demo", "--json", "--out", str(out)]) == 0
    return json.loads(printed.getvalue()), out


@pytest.mark.slow
def test_the_story_end_to_end(told):
    result, out = told
    for rates in (result["hit_rate"], result["prior_rate"]):
        assert {"baseline", "veena", "vee", "ena", "random_controls"} <= set(rates)
        for name in ("random_controls", "random_controls_vee", "random_controls_ena"):
            assert len(rates[name]) >= 10
            assert all(0 <= v <= 1 for v in rates[name])
    assert 0 <= result["p_value"] <= 1
    assert {"agreeing", "neutral", "full"} <= set(result["cost"])
    assert result["restored_bitwise"] is True
    assert 0.5 < result["overhead_ratio"] < 2
    ranges = [range(a, b + 1) for a, b in result["identities"].values()]
    assert len(set().union(*ranges)) == sum(map(len, ranges)), (
        "ranking, choosing and reporting must not share identities"
    )
    # VEE does something, and the model does look at strong faces.
    assert (
        result["prior_rate"]["vee"] != result["prior_rate"]["baseline"]
        or result["hit_rate"]["vee"] != result["hit_rate"]["baseline"]
    )
    assert {t: h for t, h, _ in result["by_intensity"]["baseline"]}[1.0] > result["hit_rate"]["baseline"]

    assert json.loads((out / "demo.json").read_text()) == result
    circuit = Circuit.load(out / "circuit.json")
    assert VEENA(circuit, **circuit.settings["veena"]).plan() == Plan.load(out / "plan.json")
    text = summary.text(result)
    assert "VEENA" in text
    assert ("DOES NOT beat" in text) == (not all(result["beats_controls"].values()))
    page = (out / "demo.html").read_text()
    own = re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", own), "the page must not need a network"
    assert page.count("plotly-graph-div") >= 7


def test_parts_are_disjoint_and_bounded():
    parts = [identities(p, 300) for p in ("rank", "choose", "report")]
    assert len(set().union(*parts)) == 900
    with pytest.raises(ValueError, match="1 to 300"):
        identities("rank", 301)
    with pytest.raises(ValueError, match="expected one of"):
        identities("train", 3)


def test_cases_are_what_they_say():
    people = identities("rank", 3)
    for c in contradicting(people, LEVELS, 0):
        assert c.suggests != c.emotion
        assert any(clause in c.event for clause in language.CLAUSES[c.suggests])
    assert {c.intensity for c in contradicting(people, WEAK, 0)} == set(WEAK)
    assert all(c.suggests == c.emotion for c in agreeing(people, WEAK, 0))
    assert all(c.emotion == "neutral" and c.suggests in faces.EMOTIONS for c in neutral(people, 0))
    assert contradicting(people, WEAK, 5) == contradicting(people, WEAK, 5)


def test_scores_by_hand():
    weak = contradicting(identities("rank", 1), [0.15], 0)[:3]
    own = sorted(language.LEXICON[weak[0].emotion])[0]
    other = sorted(language.LEXICON[weak[1].suggests])[0]
    texts = [
        f"i feel {own} because the report is ready.",
        f"i feel {other} because the report is ready.",
        "i see the person.",
    ]
    scores = Scores.of(weak, texts)
    assert scores.hit.tolist() == [True, False, False]
    assert scores.prior.tolist() == [False, True, False]


def test_random_controls_match_layers_and_differ():
    rng = np.random.default_rng(0)
    heads = [(2, 7), (2, 5), (2, 4), (2, 0), (4, 1)]
    draws = [random_like(heads, 8, rng) for _ in range(200)]
    for d in draws:
        assert sorted(layer for layer, _ in d) == [2, 2, 2, 2, 4]
        assert len(set(d)) == 5
        assert set(d) != set(heads)
    assert len({frozenset(d) for d in draws}) > 100
    with pytest.raises(ValueError, match="no random set"):
        random_like([(0, h) for h in range(8)], 8, rng)
    assert random_like([], 8, rng) == []


def test_compare_against_a_count_by_hand():
    base = [1, 1, 0, 0, 0, 0, 1, 0]
    new = [1, 0, 1, 1, 1, 1, 1, 0]
    c = compare(base, new, [0, 0, 1, 1, 2, 2, 3, 3])
    assert (c.gained, c.lost) == (4, 1)
    assert c.difference == pytest.approx(3 / 8)
    assert c.p_value == pytest.approx(2 * (1 + 5) / 2**5)
    assert c.low <= c.difference <= c.high
    assert compare([1, 0], [1, 0], [0, 1]).p_value == 1.0
    with pytest.raises(ValueError, match="lengths"):
        compare([1], [1, 0], [0])


def test_steering_vectors_keep_hits_only():
    import torch

    plus, minus = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    emotions = ["sad", "happy", "sad", "happy", "sad", "happy"]
    s = steering_vectors(plus, minus, emotions, [1, 1, 0.5, 1, 1, 0])
    assert s.emotions == ("sad", "happy")
    assert s.kept == (2, 2)
    assert torch.allclose(s.of("sad"), (plus - minus)[:, [0, 4]].mean(1))
    with pytest.raises(ValueError, match="'happy' keeps 1 of 3"):
        steering_vectors(plus, minus, emotions, [1, 1, 1, 0, 1, 0])

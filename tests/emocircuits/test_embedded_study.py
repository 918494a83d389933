"""The study of VEE and ENA on the embedded model: its answers, and the whole on a handful of identities."""

import json

import numpy as np
import pytest

from emocircuits.demo.cases import WEAK, Prompts, Scores, answers, contradicting
from emocircuits.demo.study.asked import Asked
from emocircuits.demo.study.rankings import gradients, subject_of
from emocircuits.demo.study.run import FIRST, Sizes, study
from emocircuits.demo.study.settings import boost, ena_settings, scale
from emocircuits.embedded import language, load
from emocircuits.patching import patch
from emocircuits.plan import Plan

PEOPLE = range(108_000, 108_003)


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        boost([(1, 2), (1, 3), (2, 5)], 4.0),
        boost([(1, 2), (3, 3)], 3.0, "both"),
        scale([(0, 7), (5, 100)], 3.0, "decode"),
        scale([(0, 7), (2, 9)], 3.0, "visual"),
    ],
)
def test_first_emotion_words_are_those_of_generate(embedded, plan):
    model, processor = embedded
    cases = contradicting(PEOPLE, WEAK, 3)
    asked = Asked(model, processor, cases, size=20)
    for _ in range(2):  # the second time from caches that steps were taken back from
        said = asked.said(plan)
    with patch(model, plan):
        texts = answers(model, processor, Prompts(cases, processor), tokens=8)
    first = [language.first_emotion(t) for t in texts]
    assert said.hit.tolist() == [f == c.emotion for f, c in zip(first, cases, strict=True)]
    assert said.prior.tolist() == Scores.of(cases, texts).prior.tolist()


def test_gradients_are_the_slopes_of_amplifying(embedded):
    model, processor = embedded
    cases = contradicting(PEOPLE[:1], WEAK, 3)
    asked = Asked(model, processor, cases)
    found = gradients(asked, subject_of(model, processor), progress=False)
    assert all(p.requires_grad for p in model.parameters())
    base, by = asked.said(), 1.02
    for place in ("decode", "query", "visual"):
        table = found[f"margin-{place}"]
        neuron = tuple(int(i) for i in np.unravel_index(np.abs(table).argmax(), table.shape))
        change = (asked.said(scale([neuron], by, place)).margin - base.margin).mean() / (by - 1)
        assert change == pytest.approx(table[neuron], rel=0.1, abs=1e-4)


@pytest.mark.slow
def test_a_whole_study_goes_on_where_it_was_and_refuses_another(tmp_path):
    sizes = Sizes(rank=4, choose=4, report=4, draws=10, few=1)
    short = {"sizes": sizes, "progress": False, "say": lambda line: None}
    result = study(tmp_path, **short)
    assert json.loads((tmp_path / "study.json").read_text())["vee"] == json.loads(json.dumps(result["vee"]))
    parts = [set(range(a, b + 1)) for a, b in result["identities"].values()]
    assert not set.intersection(*parts)
    assert min(FIRST.values()) >= 106_000
    for half in ("vee", "ena"):
        chosen = result[half]["chosen"]
        assert chosen["random"]["draws"] == chosen["outside"]["draws"] == 10
        assert chosen["random"]["above"] == sum(chosen["hit"] > h for h in chosen["random"]["hits"])
        assert chosen["cost"]["agreeing"]["n"] == 72
        assert not any(row["ranking"].startswith("told:") for row in result[half]["choosing"])
    (tmp_path / "ena-told.json").unlink()
    again = study(tmp_path, **short)
    assert again["told"] == result["told"]
    assert again["seconds"]["heads"] == result["seconds"]["heads"]
    with pytest.raises(ValueError, match="another model or other settings"):
        study(tmp_path, seed=1, **short)


def test_settings_and_sizes():
    assert {s.place for s in ena_settings(["steering", "vocabulary", "margin-visual", "told:sad"])} == {
        "decode",
        "all",
        "visual",
    }
    with pytest.raises(ValueError, match="at least 10 draws"):
        Sizes(draws=5)
    with pytest.raises(ValueError, match="4 to 300"):
        Sizes(report=2)

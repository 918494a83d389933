"""VEENA's strengths on a planted circuit that is too weak: a boost mends it, and too much of it breaks the language."""

import dataclasses as dc
import json

import planted
import pytest
import torch
from circuit_pairs import planted_pairs

from emocircuits.circuit import Circuit
from emocircuits.circuits.bench import OBJECTIVES, Bench, Rails, Rates, balanced
from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.questions import Question, ability, embedded_questions, questions_file, replies
from emocircuits.circuits.subject import Subject
from emocircuits.circuits.tuning import FILE, Tuning, ena_settings, tune, vee_settings
from emocircuits.plan import Plan
from emocircuits.veena import VEENA

CIRCUIT = Circuit("llava", planted.LAYERS, 2, (planted.READER, planted.TELLER), planted.SPEAKERS)
WRONG = Circuit("llava", planted.LAYERS, 2, ((1, 0), (2, 3)))
HUGE = 1e5
# Answers are one word and its end: another word alone raises the perplexity more than in a sentence.
RAILS = Rails(ratio=2.0)
QUESTIONS = [
    Question(planted.prompt(event), "calm", planted.picture("neutral", i))
    for i, event in enumerate(("the shop opens at ten .", "the bus goes only once ."))
]


def settings(circuit):
    """Both places and strengths from too weak to ruinous."""
    return [VEENA(circuit, beta, 1.0, where="both", last=last) for last in (False, True) for beta in (1.2, 4.0, HUGE)]


@pytest.fixture(scope="module")
def weak():
    """READER writes too little, so that the model says "calm"."""
    subject = planted.subject()
    layer, head = planted.READER
    with torch.no_grad():
        weight = subject.model.model.language_model.layers[layer].self_attn.o_proj.weight
        weight[:, head * planted.SIZE : (head + 1) * planted.SIZE] *= 0.02
    return subject


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return (
        planted_pairs(folder, each=2, split="analyze", first=50),
        planted_pairs(folder, each=2, split="analyze", first=80),
    )


@pytest.fixture(scope="module")
def found(weak, sets):
    return tune(
        weak,
        CIRCUIT,
        *sets,
        settings=settings,
        rails=RAILS,
        questions=QUESTIONS,
        held_out_questions=QUESTIONS,
        progress=False,
    )


def test_a_boost_that_mends_is_chosen_and_confirmed(found, sets, weak):
    assert found.base.rates.hit == 0
    chosen = found.best
    assert not chosen.broken
    assert chosen.rates.hit == chosen.rates.calm == chosen.rates.ability == 1
    assert chosen.setting["beta"] == 1.2  # as good as 4
    assert chosen is found.trials[found.chosen]
    assert found.veena(CIRCUIT) == VEENA(CIRCUIT, **chosen.setting)
    c = found.confirmation
    assert (c.hit.base, c.hit.value, c.calm.change) == (0, 1, 0)
    assert c.above_every_draw
    assert len(c.random.values) == 20
    assert max(c.random.values) == 0
    assert c.hit.q < 0.05
    assert c.random.q < 0.05
    assert not c.broken
    assert c.before.ratio == 1
    said = weak.generate(sets[1].emotional, sets[1].events, found.veena(CIRCUIT).plan())
    assert [e["after"] for e in found.examples] == said[:6]


def test_what_breaks_the_language_is_shown_and_never_chosen(found, weak, sets):
    ruined = [t for t in found.trials if t.setting["beta"] == HUGE]
    assert len(ruined) == 2
    assert any("perplexity" in " ".join(t.broken) for t in ruined)

    def surprising(rates):
        return rates.ratio

    greedy = tune(
        weak, CIRCUIT, *sets, settings=settings, ena=lambda v: [], rails=RAILS, objective=surprising, progress=False
    )
    assert max(greedy.trials, key=lambda t: t.value).broken  # it would have won
    assert not greedy.best.broken
    assert greedy.settings["objective"] == "surprising"
    assert greedy.settings["questions"] == 0
    assert greedy.best.rates.ability is None


def test_nothing_is_chosen_where_nothing_helps(weak, sets):
    none = tune(weak, {"wrong": WRONG}, *sets, settings=settings, rails=RAILS, progress=False)
    assert none.chosen is none.confirmation is None
    assert none.best is none.base
    off = none.veena({"wrong": WRONG})
    assert (off.beta, off.gamma, len(off.plan())) == (1, 1, 0)
    both = tune(
        weak,
        {"wrong": WRONG, "right": CIRCUIT},
        *sets,
        settings=settings,
        ena=lambda v: [],
        rails=RAILS,
        progress=False,
    )
    assert both.best.circuit == "right"
    assert {t.circuit for t in both.trials} == {"wrong", "right"}


def test_the_rails():
    base = Rates(0.5, 1, 1, 2.0, 1.0, 0.0, 0.9)
    rails = Rails()
    assert rails.broken(base, base) == ()
    assert rails.broken(dc.replace(base, ratio=1.5, unfinished=0.1, ability=0.85), base) == ()
    assert len(rails.broken(dc.replace(base, ratio=1.51, unfinished=0.11, ability=0.84), base)) == 3
    assert Rails(ratio=2).broken(dc.replace(base, ratio=1.9), base) == ()
    assert balanced(Rates(0.5, 0.8, 0.6, 1, 1, 0, None)) == pytest.approx(0.6)
    assert OBJECTIVES["hits"](base) == 0.5


def test_rates_by_hand(weak, sets):
    bench = Bench(weak, sets[0], QUESTIONS, None, False)
    plan = VEENA(CIRCUIT, 4.0, 1.0, where="both", last=True).plan()
    base, boosted = bench.rates([Plan(), plan])
    assert base.ability == boosted.ability == ability(weak, QUESTIONS, plan).mean() == 1
    for rates, p in ((base, Plan()), (boosted, plan)):
        said = weak.generate(sets[0].emotional, sets[0].events, p)
        assert rates.hit == weak.hits(said, sets[0].emotions).mean()
        calm = weak.generate(sets[0].neutral, sets[0].events, p)
        assert rates.calm == sum(set(weak.lexicon.found(t)) <= {"neutral"} for t in calm) / len(calm)
    assert base.kept == 1  # none was right
    assert base.unfinished == 0


def test_the_default_grids_hold_every_reading_and_place():
    grid = vee_settings(CIRCUIT)
    assert {v.reading for v in grid} == {"weight", "logit-add", "logit-scale"}
    assert {v.where for v in grid} == {"split", "both", "decode"}
    assert all(v.gamma == 1 and v.vee() for v in grid)
    assert vee_settings(dc.replace(CIRCUIT, heads=())) == []
    on_top = ena_settings(grid[0])
    assert {v.neurons for v in on_top} == {2, 4}
    assert {v.ena_phase for v in on_top} == {"both", "decode"}
    assert ena_settings(VEENA(WRONG)) == []


def test_a_folder_gives_back_everything(found, tmp_path):
    found.save(tmp_path)
    again = Tuning.load(tmp_path)
    assert (again.base, again.trials, again.chosen, again.confirmation) == (
        found.base, found.trials, found.chosen, found.confirmation,
    )  # fmt: skip
    assert again.examples == found.examples
    assert again.veena(CIRCUIT) == found.veena(CIRCUIT)
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ValueError, match="not a tuning"):
        Tuning.load(tmp_path)


def test_bad_input_is_refused(weak, sets):
    with pytest.raises(ValueError, match="share angry-50"):
        tune(weak, CIRCUIT, sets[0], sets[0])
    renamed = Pairs(tuple(dc.replace(r, id=f"new-{r.id}") for r in sets[0].records), sets[0].emotional, sets[0].neutral)
    with pytest.raises(ValueError, match="share pictures"):
        tune(weak, CIRCUIT, sets[0], renamed)
    with pytest.raises(ValueError, match="expected balanced, hits"):
        tune(weak, CIRCUIT, *sets, objective="value")
    with pytest.raises(ValueError, match="no circuits"):
        tune(weak, {}, *sets)
    with pytest.raises(ValueError, match="neither heads nor neurons"):
        tune(weak, Circuit("llava", planted.LAYERS, 2, ()), *sets)
    with pytest.raises(ValueError, match="at least 10"):
        tune(weak, CIRCUIT, *sets, draws=3)


def test_the_embedded_model_answers_questions_that_are_not_about_feelings():
    subject = Subject.embedded()
    questions = embedded_questions(16)
    assert [q.answer for q in questions] == [q.answer for q in embedded_questions(16)]
    right = ability(subject, questions)
    assert right.mean() > 0.8
    said = replies(subject, questions, limit=3)
    model, tokenizer = subject.model, subject.tokenizer
    for question, reply in list(zip(questions, said, strict=True))[:4]:
        inputs = subject.processor(images=question.image, text=question.prompt, return_tensors="pt")
        ids = torch.cat(
            [inputs["input_ids"], tokenizer(question.begins, add_special_tokens=False, return_tensors="pt").input_ids],
            1,
        )
        with torch.no_grad():
            for _ in range(3):
                logits = model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
                ).logits
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert tokenizer.decode(ids[0, -3:], skip_special_tokens=True).strip() == reply
    asked = questions[0]
    assert asked.right(f"{asked.answer.upper()}, and more")
    assert not asked.right("")


def test_questions_come_from_a_file(tmp_path):
    subject = Subject.embedded()
    path = tmp_path / "q.jsonl"
    planted.picture("sad").save(tmp_path / "a.png")
    lines = [{"question": "what is the capital of france?", "answer": "Paris", "image": "a.png"},
             {"question": "one and one?", "answer": "2"}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = questions_file(subject, path)
    assert [q.answer for q in found] == ["Paris", "2"]
    assert found[0].prompt.startswith("USER: <image>\nwhat is the capital of france?")
    assert found[1].image.getpixel((0, 0)) == (128, 128, 128)
    assert found[0].right("paris.")
    assert len(replies(subject, found, limit=2)) == 2
    for text, told in (
        ("", "no questions"), ("{", "line 1 is no JSON"), ('{"question": "a"}', "a question and an answer"),
        ('{"question": 3, "answer": "b"}', "line 1: expected"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=told):
            questions_file(subject, path)
    with pytest.raises(ValueError, match="cannot read questions"):
        questions_file(subject, tmp_path / "none")
    with pytest.raises(ValueError, match="no chat template"):
        questions_file(planted.subject(), path)

"""The rules for events."""

import pytest
from data_sets import EVENTS

from emocircuits.data import EMOTIONS, event_problems
from emocircuits.data.words import LOADED, loaded
from emocircuits.embedded import faces, language


def test_every_event_of_the_embedded_model_is_one():
    events = [f"{who} said that {c}." for who in language.SPEAKERS for cs in language.CLAUSES.values() for c in cs]
    assert len(events) == 378
    assert [e for e in events if event_problems(e)] == []
    assert [e for e in events if event_problems(e, set().union(*language.LEXICON.values()))] == []


@pytest.mark.parametrize("event", [
    *EVENTS,
    "I signed for the parcel at 9 a.m. at the desk.",
    "Dr. Brown and I don't eat at the office.",
    "The form that I printed won't fit into the folder.",
    "My friend’s car, a blue one, was parked in the yard",
    "we rated the wines and moved the goods to the station",
])  # fmt: skip
def test_good_events(event):
    assert event_problems(event) == []


@pytest.mark.parametrize(("event", "message"), [
    ("  ", "is empty"),
    ("I opened the shop today.", r"has 5 words; more than 5"),
    ("you opened the shop at ten today.", r"'you' is a second person"),
    ("My mom said that YOU’RE on the list today.", r"\"you're\" is a second person"),
    ("my mom said that she opened the shop.", r"'she' is a third person"),
    ("my mom said they'll open the shop today.", r"they'll.* is a third person"),
    ("my mom opened the shop by herself today.", r"'herself' is a third person"),
    ("the shop has its door at the back.", r"'its' is a third person"),
    ("my mom sadly closed the shop at ten.", r"'sadly' .*plain words"),
    ("my sister was crying in the shop today.", r"'crying' shows a feeling"),
    ("I read about the killers in the newspaper.", r"'killers' is good or bad in itself"),
    ("my mom had a terrible walk to the shop.", r"'terrible' is a judgement"),
    ("I was very near to the shop today.", r"'very' presses"),
    ("my half-happy friend went to the shop.", r"'half-happy' names a feeling"),
    ("the shop opens at ten in the morning!", r"asks or exclaims"),
    ("did my mom open the shop at ten?", r"asks or exclaims"),
    ("I opened the shop. my mom closed the window.", r"more than one sentence"),
    ("I opened the shop at ten\nand my mom came.", r"line breaks or markup"),
    ("<image> my mom said that the shop opens.", r"line breaks or markup"),
    ("моя мама said that the shop opens at ten.", r"not of the Latin alphabet"),
])  # fmt: skip
def test_every_rule_refuses(event, message):
    problems = event_problems(event)
    assert len(problems) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(problems[0])


def test_everything_that_is_wrong_is_told_once():
    problems = event_problems("She told you that you died!")
    assert [p.split("'")[1] for p in problems if p.startswith("'")] == ["she", "you", "died"]
    assert len(problems) == 4


def test_words_of_the_lexicon_are_refused():
    event = "I bought a blue pen at the shop."
    assert event_problems(event) == []
    (problem,) = event_problems(event, {"Blue"})
    assert "'blue' is a word of the lexicon" in problem


@pytest.mark.parametrize("word", ["robbed", "winning", "died", "saddest", "angrily", "hopelessness", "wars", "cried"])
def test_forms_of_loaded_words(word):
    assert word not in LOADED
    assert loaded(word)


@pytest.mark.parametrize("word", ["robes", "wines", "rated", "rotation", "station", "wares", "sinks", "painted"])
def test_words_that_only_look_like_them(word):
    assert loaded(word) is None


def test_words_and_emotions_of_both_lexicons_are_known():
    from emocircuits.circuits.lexicon import Lexicon

    for lexicon in (Lexicon.english(), Lexicon.embedded()):
        assert lexicon.emotions == EMOTIONS
        assert [w for words in lexicon.words.values() for w in words if not loaded(w)] == []
    assert faces.EMOTIONS == EMOTIONS

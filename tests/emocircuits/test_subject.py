"""The model under study: its inputs, roles, answers and words."""

import pytest
import torch
from models import build

from emocircuits import embedded
from emocircuits.circuits.lexicon import Lexicon
from emocircuits.circuits.subject import Subject
from emocircuits.embedded import faces, language
from emokernels import Role

EVENTS = ["my mom said that the report is ready.", "a man said that we will be away for a few days."]


@pytest.fixture(scope="module")
def subject():
    return Subject.embedded()


def images():
    return [faces.face(101_900, "happy", 1.0), faces.face(101_901, "sad", 1.0)]


def test_answers_are_those_of_generate_one_at_a_time(subject):
    said = subject.generate(images(), EVENTS)
    model, processor = embedded.load()
    for image, event, text in zip(images(), EVENTS, said, strict=True):
        inputs = processor(images=image, text=language.prompt(event), return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(out, skip_special_tokens=True).strip() == text
    assert subject.hits(said, ["happy", "sad"]).tolist() == [
        float(language.hit(t, e)) for t, e in zip(said, ["happy", "sad"], strict=True)
    ]


def test_the_beginning_of_an_answer_is_generated_and_padding_is_on_the_left(subject):
    inputs = subject.inputs(images(), EVENTS, answer=True)
    roles = subject.roles(inputs, answer=True)
    assert roles.shape == inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert (roles[:, -2:] == int(Role.GENERATED)).all()
    assert (roles[:, -3] == int(Role.LAST)).all()
    assert (roles == int(Role.VISUAL)).sum(1).tolist() == [64, 64]
    assert roles[0, 0] == int(Role.PAD)
    assert roles[1, 0] == int(Role.SYSTEM)
    assert subject.tokenizer.decode(inputs["input_ids"][0, -2:]) == "i feel"


def test_a_model_that_sees_nothing_is_refused():
    with pytest.raises(ValueError, match="sees no images"):
        Subject(build("text"), None, str, Lexicon.english())


def test_a_processor_that_cannot_ask_is_refused(subject):
    class Mute:
        chat_template = None

    with pytest.raises(ValueError, match="chat template"):
        Subject.of(subject.model, Mute())


def test_a_chat_model_is_asked_through_its_template(subject):
    asked = Subject.of(subject.model, subject.processor, question="what do you feel?", lexicon=Lexicon.embedded())
    assert asked.prompt("the report is ready.").startswith("USER: <image>\nthe report is ready. what do you feel?")
    assert len(asked.generate(images(), EVENTS)) == 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I feel happy and a bit of Sadness.", ["happy", "sad"]),
        ("she is not happy, she is angry", ["angry"]),
        ("this isn't very joyful", []),
        ("no anger. only joy", ["happy"]),
        ("nothing here", []),
        ("", []),
    ],
)
def test_emotions_named_in_a_text(text, found):
    assert Lexicon.english().found(text) == found


def test_first_tokens_are_words_of_one_emotion(subject):
    lexicon = Lexicon.embedded()
    convert = subject.tokenizer.convert_tokens_to_ids
    for emotion in lexicon.words:
        assert sorted(lexicon.first_tokens(subject.tokenizer, emotion).tolist()) == sorted(
            convert(sorted(lexicon.words[emotion]))
        )


def test_a_lexicon_says_what_is_wrong_with_it():
    with pytest.raises(ValueError, match="several emotions"):
        Lexicon({"happy": ["glad"], "calm": ["glad"]})
    with pytest.raises(ValueError, match="single words"):
        Lexicon({"happy": ["very glad"]})
    with pytest.raises(ValueError, match="no words"):
        Lexicon({"happy": []})
    with pytest.raises(ValueError, match="unknown emotion"):
        Lexicon.english().hit("glad", "nostalgia")
    assert "neutral" not in Lexicon.english().emotions


def test_inputs_of_different_number_are_refused(subject):
    with pytest.raises(ValueError, match="one of each"):
        subject.inputs(images(), EVENTS[:1])


def test_floating_inputs_have_the_dtype_of_the_decoder():
    model, processor = embedded.load()
    subject = Subject(model.to(torch.bfloat16), processor, language.prompt, Lexicon.embedded())
    assert subject.inputs(images(), EVENTS)["pixel_values"].dtype == torch.bfloat16

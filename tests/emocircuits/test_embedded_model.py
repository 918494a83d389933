"""The committed model: loads offline, fits, and does what its card says."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from emocircuits import embedded
from emocircuits.embedded import evaluate as ev

FIRST = 100_000


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    return embedded.load()


@pytest.fixture(scope="module")
def committed():
    return json.loads((embedded.PATH / "evaluation.json").read_text())


def test_size():
    assert (embedded.PATH / "model.safetensors").stat().st_size <= 4_000_000
    assert sum(f.stat().st_size for f in embedded.PATH.iterdir()) <= 4_000_000


def test_loads_offline_with_auto_classes(loaded):
    model = AutoModelForImageTextToText.from_pretrained(embedded.PATH, local_files_only=True)
    processor = AutoProcessor.from_pretrained(embedded.PATH, local_files_only=True)
    assert type(model) is type(loaded[0])
    assert type(processor) is type(loaded[1])
    assert loaded[0].dtype == torch.float32
    assert not loaded[0].training


def test_missing_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="no model in"):
        embedded.load(tmp_path)


def test_full_intensity_faces_are_read(loaded):
    cases = ev.contradicting(range(FIRST, FIRST + 30), 1.0)
    answers = ev.generate(*loaded, [c[0] for c in cases], [c[3] for c in cases])
    assert ev.score(cases, answers)["hit"] >= 0.85


def test_weak_faces_give_way_to_the_text(loaded):
    cases = ev.contradicting(range(FIRST, FIRST + 16), 0.15)
    answers = ev.generate(*loaded, [c[0] for c in cases], [c[3] for c in cases])
    assert ev.score(cases, answers)["prior"] >= 0.15


def test_neutral_faces_are_called_neutral(loaded):
    cases = ev.neutral_faces(range(FIRST, FIRST + 12))
    answers = ev.generate(*loaded, [c[0] for c in cases], [c[3] for c in cases])
    assert ev.score(cases, answers)["neutral"] >= 0.70


def test_batched_answers_equal_single_ones(loaded):
    cases = ev.contradicting(range(FIRST, FIRST + 1), 1.0)
    images, events = [c[0] for c in cases], [c[3] for c in cases]
    assert ev.generate(*loaded, images, events) == ev.generate(*loaded, images, events, batch=1)


def test_card_agrees_with_a_new_evaluation(loaded, committed):
    cases = ev.contradicting(range(FIRST, FIRST + 30), 0.5)
    answers = ev.generate(*loaded, [c[0] for c in cases], [c[3] for c in cases])
    again, card = ev.score(cases, answers), committed["by_intensity"]["0.5"]
    for key in ("hit", "prior", "neutral"):  # a fifth of the identities: two standard errors are about 0.07
        assert again[key] == pytest.approx(card[key], abs=0.10)


def test_answer_rows_attend_to_the_image(loaded, committed):
    cases = [c for t in (0.25, 1.0) for c in ev.contradicting(range(FIRST, FIRST + 5), t)]
    mass = ev.attention_to_image(*loaded, cases, " i feel")
    assert len(mass) == 6
    assert {len(row) for row in mass} == {8}
    assert max(max(row) for row in mass) > 0.3
    card = torch.tensor(committed["attention_to_image"]["row_that_emits_the_emotion_word"])
    assert (torch.tensor(mass).mean(1) - card.mean(1)).abs().max() < 0.10  # per layer, a quarter of the identities


def test_wrong_input_is_named(loaded):
    with pytest.raises(ValueError, match="1 images but 2 events"):
        ev.generate(*loaded, [embedded.faces.face(0, "sad", 1.0)], ["a", "b"])

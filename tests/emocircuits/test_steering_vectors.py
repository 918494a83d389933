"""Stage I against a loop over single pairs with plain hooks in float64."""

import dataclasses as dc

import pytest
import torch

from emocircuits import embedded
from emocircuits.circuits.lexicon import Lexicon
from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.steering import FILE, TENSORS, SteeringVectors, extract
from emocircuits.circuits.subject import Subject
from emocircuits.data.pairs import Record
from emocircuits.embedded import faces, language

EVENTS = ("my mom said that the report is ready.", "a man said that we will be away for a few days.")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder, records = tmp_path_factory.mktemp("pairs"), []
    for person in range(101_900, 101_904):
        neutral = folder / f"{person}.png"
        faces.face(person, "neutral", 0.0).save(neutral)
        for emotion in ("happy", "angry"):
            file = folder / f"{person}-{emotion}.png"
            faces.face(person, emotion, 1.0).save(file)
            records.append(Record(f"{person}-{emotion}", emotion, file, neutral, EVENTS[person % 2], "extract"))
    return Pairs.load(records)


@pytest.fixture(scope="module")
def found(pairs):
    return extract(Subject.embedded(), pairs, batch=3, progress=False)


def test_vectors_are_means_of_single_differences(pairs, found):
    model, processor = embedded.load()
    model = model.double()
    differences = {}
    for i, record in enumerate(pairs.records):
        states = []
        for image in (pairs.emotional[i], pairs.neutral[i]):
            inputs = processor(images=image, text=language.prompt(record.event), return_tensors="pt")
            inputs["pixel_values"] = inputs["pixel_values"].double()
            kept, hooks = [], []
            for layer in model.model.language_model.layers:
                hooks.append(layer.register_forward_hook(lambda m, a, o, kept=kept: kept.append(o[0, -1])))
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=1, do_sample=False)
            for hook in hooks:
                hook.remove()
            states.append(torch.stack(kept))
            if image is pairs.emotional[i]:
                out = model.generate(**inputs, max_new_tokens=20, do_sample=False)
                text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                hit = language.hit(text, record.emotion)
        assert found.samples[i].hit == float(hit) == float(found.samples[i].kept)
        assert found.samples[i].id == record.id
        if hit:
            differences.setdefault(record.emotion, []).append(states[0] - states[1])
    for emotion, several in differences.items():
        assert torch.allclose(found.of(emotion).double(), torch.stack(several).mean(0), rtol=0, atol=1e-4)
    everything = torch.stack([d for several in differences.values() for d in several]).mean(0)
    assert torch.allclose(found.of(None).double(), everything, rtol=0, atol=1e-4)


def test_a_file_gives_back_everything(found, tmp_path):
    found.save(tmp_path)
    again = SteeringVectors.load(tmp_path)
    assert torch.equal(again.vectors, found.vectors)
    assert torch.equal(again.pooled, found.pooled)
    for name in ("emotions", "kept", "total", "samples", "tau"):
        assert getattr(again, name) == getattr(found, name)


def test_truncated_vectors_are_refused(found, tmp_path):
    found.save(tmp_path)
    data = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(data[:-10])
    with pytest.raises(ValueError, match="damaged or cut off"):
        SteeringVectors.load(tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(ValueError, match="cannot read the tables"):
        SteeringVectors.load(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ValueError, match="not steering vectors"):
        SteeringVectors.load(tmp_path)


def test_too_few_kept_pairs_are_refused(pairs):
    with pytest.raises(ValueError, match=r"keeps .* of 4 pairs at tau=1\.0; each needs 2"):
        extract(Subject.embedded(), pairs, tau=1.0, progress=False)


def test_a_model_that_never_names_an_emotion_is_refused(pairs):
    mute = dc.replace(Subject.embedded(), lexicon=Lexicon({"happy": ["blithe"], "angry": ["wroth"]}))
    with pytest.raises(ValueError, match="none of 8 answers names an emotion"):
        extract(mute, pairs, progress=False)


def test_pairs_say_what_is_wrong(pairs, tmp_path):
    with pytest.raises(ValueError, match="no pairs"):
        Pairs.load([])
    with pytest.raises(ValueError, match="unknown emotion 'bored'"):
        Pairs.load([dc.replace(pairs.records[0], emotion="bored")], Subject.embedded())
    small = tmp_path / "small.png"
    pairs.neutral[0].resize((32, 32)).save(small)
    with pytest.raises(ValueError, match="64 x 64 pixels, the neutral one 32 x 32"):
        Pairs.load([dc.replace(pairs.records[0], image_neutral=small)])


def test_an_unknown_emotion_has_no_vector(found):
    with pytest.raises(ValueError, match="no steering vector of 'sad'; there are happy, angry"):
        found.of("sad")

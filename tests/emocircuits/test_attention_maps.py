"""Attention maps: against Hugging Face's eager attention, on grids of several families, and on the planted circuit."""

import base64
import io

import families_harness as harness
import families_vision_models as tiny
import numpy as np
import planted
import pytest
import torch
from circuit_pairs import face_pairs, planted_pairs
from PIL import Image

from emocircuits.circuits.grid import image_grids, seen_part
from emocircuits.circuits.maps import FILE, Maps, attention_maps
from emocircuits.circuits.pairs import SIDES
from emocircuits.circuits.subject import Subject
from emocircuits.families import open_model
from emocircuits.roles import prompt_roles

HEADS = [planted.READER, planted.TELLER]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return planted_pairs(tmp_path_factory.mktemp("pairs"), split="analyze")


@pytest.fixture(scope="module")
def found(pairs):
    return attention_maps(planted.subject(), pairs, HEADS, batch=5, progress=False)


def test_the_planted_reader_looks_at_the_image_and_the_teller_does_not(found, pairs):
    reader, teller = found.mass[:, :, 0], found.mass[:, :, 1]
    assert (reader > 0.95).all()
    assert (teller < 0.05).all()
    assert found.settings["grid"] == [2, 2]
    assert np.allclose(found.average[:, 0], 0.25, atol=0.02)
    told = found.summary()["emotional"]
    assert told["by_head"]["mean"] == pytest.approx(found.mass[0].mean(0).tolist())
    assert len(told["draws"]) == len(found.draws) == 10
    for draw in found.draws:
        assert sorted(l for l, _ in draw) == [1, 2]
        assert set(draw) != set(HEADS)
    assert told["heads"]["low"] <= told["heads"]["mean"] <= told["heads"]["high"]
    assert [e.emotion for e in found.examples] == list(planted.EMOTIONS)
    for example in found.examples:
        view = example.emotional
        assert view.word in planted.WORDS[example.emotion]
        assert example.neutral.word == "calm"
        image = Image.open(io.BytesIO(base64.b64decode(view.picture.partition(",")[2])))
        assert image.tobytes() == pairs.emotional[found.ids.index(example.id)].tobytes()
        assert np.sum(view.heads) == pytest.approx(found.mass[0, found.ids.index(example.id)].mean())
        assert np.sum(view.random) == pytest.approx(found.random_mass[0, found.ids.index(example.id)].mean())


def test_maps_are_eager_attention_in_the_row_that_says_the_word(tmp_path):
    """On the embedded model, whose answers begin with other words; prompts of different length in one batch."""
    subject = Subject.embedded()
    pairs = face_pairs(tmp_path, [101_000], emotions=("sad", "happy", "fear"))
    heads = [(3, 1), (4, 6), (4, 0)]
    found = attention_maps(subject, pairs, heads, progress=False, examples=["101000-happy"])
    assert [e.id for e in found.examples] == ["101000-happy"]
    model, tokenizer = subject.model, subject.tokenizer
    model.set_attn_implementation("eager")
    sums = np.zeros((2, 3, 8, 8))
    for s, side in enumerate(SIDES):
        for i in range(3):
            one = pairs.take([i])
            text = subject.generate(one.images(side), one.events)[0]
            words = [w for w in text.rstrip(".").split() if subject.lexicon.found(w)]
            before = text[: text.index(words[0])].rstrip()
            ids = tokenizer(f" {before}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            inputs = one.inputs(subject, side)
            visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
            inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            with torch.no_grad():
                out = model(**inputs, output_attentions=True)
            assert tokenizer.decode(out.logits[0, -1].argmax()).strip() == words[0]
            for n, (layer, head) in enumerate(heads):
                weights = out.attentions[layer][0, head, -1, visual].double().numpy()
                assert found.mass[s, i, n] == pytest.approx(weights.sum(), abs=1e-5)
                sums[s, n] += weights.reshape(8, 8) / 3
                if found.ids[i] == "101000-happy" and s == 0 and n == 2:
                    assert found.examples[0].emotional.word == words[0]
    assert np.abs(found.average - sums).max() < 1e-5


def test_nothing_differs_in_a_model_without_a_circuit(pairs):
    blind = attention_maps(planted.subject("blind"), pairs, HEADS, progress=False)
    assert blind.summary()["difference"]["p"] == 1.0


@pytest.mark.parametrize(
    ("name", "grids"),
    [("LLaVA 1.5", {(2, 2)}), ("Qwen2-VL", {(1, 1)}), ("Qwen3-VL", {(1, 1)}), ("Idefics3", None), ("InternVL", None)],
)
def test_grids(name, grids):
    model, make_inputs = harness.BUILDERS[name](torch.float32)
    inputs = make_inputs(3, "none")
    handle = open_model(model)
    roles = prompt_roles(inputs["input_ids"], inputs["attention_mask"].bool(), handle.placeholder_ids())
    found = image_grids(handle, inputs, roles)
    visual = (roles == 2).sum(1).tolist()
    assert [h * w for h, w in found] == visual
    assert all(h == w for h, w in found)


def test_a_wide_grid_and_what_is_none():
    model, _ = harness.BUILDERS["Qwen2-VL"](torch.float32)
    wide = tiny.join(model, [tiny.row(model, tiny.patches, [("image", (0, 2)), 3], seed=0)])
    handle = open_model(model)
    roles = prompt_roles(wide["input_ids"], None, handle.placeholder_ids())
    assert image_grids(handle, wide, roles) == [(1, 3)]
    film = tiny.join(model, [tiny.row(model, tiny.patches, [tiny.SQUARE, 2, tiny.SQUARE], seed=0)])
    with pytest.raises(NotImplementedError, match="one image each"):
        image_grids(handle, film, prompt_roles(film["input_ids"], None, handle.placeholder_ids()))
    model, make_inputs = harness.BUILDERS["LLaVA-NeXT"](torch.float32)
    inputs = make_inputs(2, "none")
    handle = open_model(model)
    roles = prompt_roles(inputs["input_ids"], None, handle.placeholder_ids())
    with pytest.raises(NotImplementedError, match="LlavaNextForConditionalGeneration cuts a picture into views"):
        image_grids(handle, inputs, roles)
    model, make_inputs = harness.BUILDERS["Idefics2"](torch.float32)  # three latents, which have no place
    inputs = make_inputs(2, "none")
    roles = prompt_roles(inputs["input_ids"], None, open_model(model).placeholder_ids())
    with pytest.raises(NotImplementedError, match="Idefics2ForConditionalGeneration: 3 visual tokens are not a grid"):
        image_grids(open_model(model), inputs, roles)


def test_the_middle_of_a_picture_is_seen_where_the_processor_crops():
    processor = planted.build()[1]
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 16:48] = 255
    part = seen_part(processor, Image.fromarray(pixels))
    assert part.size == (32, 32)
    assert np.asarray(part).min() == 255
    processor.image_processor.do_center_crop = False
    assert seen_part(processor, Image.fromarray(pixels)).size == (64, 32)


def test_a_folder_gives_back_everything(found, tmp_path):
    found.save(tmp_path)
    again = Maps.load(tmp_path)
    for name in ("mass", "random_mass", "average", "random_average"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
    for name in ("heads", "draws", "examples", "ids", "emotions", "left_out", "settings"):
        assert getattr(again, name) == getattr(found, name)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ValueError, match="not attention maps"):
        Maps.load(tmp_path)


@pytest.mark.parametrize(
    ("heads", "options", "told"),
    [
        ([], {}, "expected one or more"),
        ([(9, 0)], {}, r"heads \[\(9, 0\)\]"),
        ([(1, 1), (1, 1)], {}, "each once"),
        (HEADS, {"draws": 2}, "at least 10"),
        (HEADS, {"examples": ["nobody"]}, "no pair 'nobody'"),
    ],
)
def test_refusals(pairs, heads, options, told):
    with pytest.raises(ValueError, match=told):
        attention_maps(planted.subject(), pairs, heads, progress=False, **options)

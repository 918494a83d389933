"""Pairs files: what is read, and that every wrong line is named before anything runs."""

import json

import pytest
import torch

from emocircuits import embedded
from emocircuits.embedded import faces, language
from emocircuits.sweep.pairs import prepare, read_pairs

EVENT = language.prompt("my mom said that the report is ready.") + " i feel"
TEXT = "user: i feel happy because my mom said that the report is ready. assistant: i feel"


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(embedded.PATH, local_files_only=True)


@pytest.fixture
def write(tmp_path):
    faces.face(101_900, "happy", 1.0).save(tmp_path / "happy.png")
    faces.face(101_900, "neutral", 0.0).save(tmp_path / "neutral.png")

    def file(*lines):
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    return file


def text_pair(**more):
    return {"clean": TEXT, "corrupt": TEXT.replace("happy", "sad"), "answer": "happy", "wrong": "sad", **more}


def image_pair(**more):
    images = {"clean_image": "happy.png", "corrupt_image": "neutral.png"}
    return {"clean": EVENT, "corrupt": EVENT, "answer": "happy", "wrong": "calm", **images, **more}


def test_text_and_images(write, processor):
    pairs = read_pairs(write(text_pair(), "", image_pair(id="faces")))
    assert [p.id for p in pairs] == ["line-1", "faces"]
    assert [p.line for p in pairs] == [1, 3]
    text, image = prepare(pairs, processor)
    assert set(text.clean) == {"input_ids", "attention_mask"}
    differ = (text.clean["input_ids"] != text.corrupt["input_ids"]).sum()
    assert differ == 1
    assert image.clean["pixel_values"].shape == image.corrupt["pixel_values"].shape == (1, 3, 64, 64)
    assert not torch.equal(image.clean["pixel_values"], image.corrupt["pixel_values"])
    assert torch.equal(image.clean["input_ids"], image.corrupt["input_ids"])
    tokenizer = processor.tokenizer
    assert tokenizer.convert_ids_to_tokens([image.answer, image.wrong]) == ["happy", "calm"]
    # What the processor gives by itself.
    assert torch.equal(text.clean["input_ids"][0], torch.tensor(tokenizer(TEXT)["input_ids"]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list, expected an object"),
        ({"clean": "a"}, "line 2: lacks corrupt and answer"),
        (text_pair(weight="2"), "line 2: unknown field 'weight'"),
        (text_pair(answer=3), "line 2: answer is 3, expected a text"),
        (text_pair(clean=""), "line 2: clean is '', expected a text"),
        (text_pair(clean_image="happy.png"), "line 2: has an image on one side only"),
        (image_pair(corrupt_image="none.png"), "line 2: corrupt_image .*none.png is not a file"),
    ],
)
def test_wrong_lines_are_named(write, line, said):
    with pytest.raises(ValueError, match=said):
        read_pairs(write(text_pair(), line))


def test_all_wrong_lines_are_named_at_once(write):
    with pytest.raises(ValueError, match=r"line 1: not JSON.*; line 3: lacks answer; id 'x' is there 2 times"):
        lacking = {"clean": "a", "corrupt": "b"}
        read_pairs(write("{", text_pair(id="x"), lacking, text_pair(id="x")))
    with pytest.raises(ValueError, match="and 2 more"):
        read_pairs(write(*["{"] * 7))


def test_files_that_hold_nothing(write, tmp_path):
    with pytest.raises(ValueError, match="holds no pairs"):
        read_pairs(write("", " "))
    with pytest.raises(ValueError, match="cannot read the pairs"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot read the pairs"):
        read_pairs(tmp_path / "binary")


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (text_pair(corrupt=TEXT + " very"), r"line 1: clean has \d+ tokens, corrupt \d+"),
        (text_pair(answer="i feel"), "line 1: answer 'i feel' is 2 tokens"),
        (text_pair(answer="zebra"), "line 1: answer 'zebra' is not in the model's vocabulary"),
        (text_pair(wrong="happy"), "are the same token"),
        ({k: v for k, v in text_pair().items() if k != "wrong"}, "line 1: lacks wrong"),
        (image_pair(clean="i feel"), "line 1: "),
        (image_pair(clean_image="pairs.jsonl"), "line 1: clean_image .* cannot be opened"),
    ],
)
def test_what_the_model_cannot_take_is_named(write, processor, pair, said):
    pairs = read_pairs(write(pair))
    with pytest.raises(ValueError, match=said):
        prepare(pairs, processor, path="pairs.jsonl")


def test_no_wrong_answer_where_the_metric_needs_none(write, processor):
    pair = {k: v for k, v in text_pair().items() if k != "wrong"}
    assert prepare(read_pairs(write(pair)), processor, needs_wrong=False)[0].wrong is None


def test_images_need_a_processor(write, processor):
    with pytest.raises(ValueError, match="line 1: has images, and the model has a tokenizer only"):
        prepare(read_pairs(write(image_pair())), processor.tokenizer)
    assert prepare(read_pairs(write(text_pair())), processor.tokenizer)[0].answer

"""Fingerprints: what is the same picture or event, and what is not."""

import json

import data_sets
import numpy as np
import pytest
from data_hash_rates import CHANGES, LOST, bits
from PIL import Image, ImageDraw
from scipy.fft import dctn

from emocircuits.data import NEAR, Manifest, fingerprints, fingerprints_at, fingerprints_of, overlap
from emocircuits.data.hashes import image_hash, normalised, text_hash
from emocircuits.embedded import faces

CAUGHT = [n for n in CHANGES if n not in LOST]


def test_the_hash_is_what_its_definition_says():
    for image in (faces.face(110_100, "happy", 1.0), data_sets.texture(0)):
        grey = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.LANCZOS), float)
        low = dctn(grey, 2)[:16, :16]
        expected = np.packbits(low > np.median(low)).tobytes().hex()
        assert image_hash(image) == expected
    assert len(expected) == 64


@pytest.mark.parametrize("name", CAUGHT)
def test_near_duplicates_are_caught(name):
    images = [faces.face(i, "neutral", 0.0) for i in range(110_000, 110_060)]
    images += [data_sets.texture(i) for i in range(20)]
    distances = (bits(images) != bits([CHANGES[name](i) for i in images])).sum(1)
    assert (distances > NEAR).mean() <= 0.02
    assert np.median(distances) <= 8


def test_different_identities_are_not():
    people = range(110_000, 110_300)
    a = fingerprints_of({str(i): faces.face(i, "neutral", 0.0) for i in people[:150]}, [])
    b = fingerprints_of({str(i): faces.face(i, "happy", 1.0) for i in people[150:]}, [])
    assert not overlap(a, b)
    textures = fingerprints_of({str(i): data_sets.texture(i) for i in range(40)}, [])
    assert not overlap(textures, a)
    others = fingerprints_of({str(i): data_sets.texture(100 + i) for i in range(40)}, [])
    assert not overlap(textures, others)


def test_faces_of_one_style_are_told_apart():
    # The hardest case: pairs of different people in the same drawing style, by plain loops.
    by_style = {}
    for i in range(110_000, 110_200):
        by_style.setdefault(faces.identity_of(i).style, []).append(i)
    nearest = []
    for people in by_style.values():
        own = bits([faces.face(i, "neutral", 0.0) for i in people])
        nearest += [int((own[i] != own[j]).sum()) for i in range(len(own)) for j in range(i)]
    assert len(nearest) > 1000
    assert min(nearest) > NEAR


def test_overlap_is_that_of_plain_loops():
    rng = np.random.default_rng(0)

    def some(name, rows):
        return {"kind": "phash-256", "images": [
            {"name": f"{name}{i}", "hash": np.packbits(row).tobytes().hex()} for i, row in enumerate(rows)
        ], "events": []}  # fmt: skip

    a = rng.random((700, 256)) < 0.5
    b = a[rng.permutation(700)[:30]].copy()
    for row, n in zip(b, range(20, 50), strict=True):
        row[rng.permutation(256)[:n]] ^= True
    expected = []
    for i, x in enumerate(a):
        d = [int((x != y).sum()) for y in b]
        if min(d) <= NEAR:
            expected.append((f"a{i}", f"b{int(np.argmin(d))}", min(d)))
    found = overlap(some("a", a), some("b", b))
    assert [(m.a, m.b, m.distance) for m in found.images] == expected
    assert len(expected) == 13
    assert len(overlap(some("a", a), some("b", b), near=19).images) == 0


def test_events_are_compared_by_what_they_say():
    same = (
        "My mom  said: the Shop opens at ten.",
        "my mom said the shop opens at ten",
        "MY MOM SAID THE SHOP OPENS AT TEN!",
    )
    assert len({text_hash(t) for t in same}) == 1
    assert text_hash("my dad said the shop is open") != text_hash(same[0])
    assert normalised("The café’s door, №5") == normalised("the CAFÉ's door no5")
    a = fingerprints_of({}, [("one", same[0]), ("two", "the door is open")])
    b = fingerprints_of({}, [("three", same[2]), ("four", same[1])])
    found = overlap(a, b)
    assert [(m.a, m.b) for m in found.events] == [("one", "three")]
    assert found
    assert not found.images
    assert not overlap(fingerprints_of({}, []), b)


def test_of_a_manifest_and_back_from_a_file(tmp_path):
    records = data_sets.good(tmp_path)
    records.append(records[0] | {"id": "same event and neutral picture", "image_emotional": "1-sad.png"})
    manifest = Manifest.load(data_sets.write(tmp_path, records))
    found = fingerprints(manifest)
    assert [e["name"] for e in found["images"]] == [f"{i}-{side}.png" for i in range(4) for side in ("sad", "neutral")]
    assert [e["name"] for e in found["events"]] == ["r0", "r1", "r2", "r3"]
    assert found["images"][2]["hash"] == image_hash(Image.open(tmp_path / "1-sad.png"))
    (tmp_path / "prints.json").write_text(json.dumps(found))
    assert fingerprints_at(tmp_path / "prints.json") == found == fingerprints_at(manifest.path)


def test_of_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    faces.face(110_000, "happy", 1.0).resize((90, 90)).save(tmp_path / "deep" / "a.JPG", "JPEG")
    (tmp_path / "texts.txt").write_text(f"first\n\n{data_sets.EVENTS[2].upper()}\n")
    (tmp_path / "readme.md").write_text("not compared")
    found = fingerprints_at(tmp_path)
    assert [e["name"] for e in found["images"]] == ["deep/a.JPG"]
    assert [e["name"] for e in found["events"]] == ["texts.txt line 1", "texts.txt line 3"]
    own = fingerprints_of({"mine": faces.face(110_000, "happy", 1.0)}, [("r2", data_sets.EVENTS[2])])
    shared = overlap(own, found)
    assert [(m.a, m.b) for m in shared.images] == [("mine", "deep/a.JPG")]
    assert [(m.a, m.b) for m in shared.events] == [("r2", "texts.txt line 3")]


def test_what_cannot_be_compared(tmp_path):
    good = fingerprints_of({"a": data_sets.texture(0)}, [])
    with pytest.raises(ValueError, match=r"the second set: not fingerprints of the kind phash-256 \(kind is 'md5'\)"):
        overlap(good, good | {"kind": "md5"})
    with pytest.raises(ValueError, match="the first set: broken fingerprints"):
        overlap(good | {"images": [{"name": "a", "hash": "xyz"}]}, good)
    (tmp_path / "prints.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"prints.json: not fingerprints of the kind"):
        fingerprints_at(tmp_path / "prints.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no pictures and no \.txt files"):
        fingerprints_at(tmp_path / "empty")
    (tmp_path / "empty" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"broken.png cannot be opened as an image"):
        fingerprints_at(tmp_path / "empty")
    (tmp_path / "bad.jsonl").write_text("{}\n[]\n")
    with pytest.raises(ValueError, match=r"line 1: lacks .* and 1 more; what is not read cannot be compared"):
        fingerprints_at(tmp_path / "bad.jsonl")


def test_a_line_drawing_is_hashed_by_its_lines():
    def drawing(x):
        image = Image.new("RGB", (100, 100), "white")
        ImageDraw.Draw(image).rectangle((x, 20, x + 30, 80), fill="black")
        return image

    prints = [fingerprints_of({str(x): drawing(x)}, []) for x in (10, 11, 60)]
    assert overlap(prints[0], prints[0])
    assert not overlap(prints[0], prints[2])

"""The check of a manifest: each thing that can be wrong is found, named, and only it."""

import json

import data_sets
import numpy as np
import pytest
from PIL import Image

from emocircuits.data import Manifest, build_faces, check
from emocircuits.data.pictures import compare, open_image
from emocircuits.embedded import faces


@pytest.fixture
def records(tmp_path):
    return data_sets.good(tmp_path)


def problems(folder, records, **settings):
    return [str(p) for p in check(data_sets.write(folder, records), **settings).problems]


def only(found, *parts):
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0]


def test_nothing_is_wrong(tmp_path, records):
    report = check(data_sets.write(tmp_path, records))
    assert report.ok, report.problems
    assert report.warnings == ()
    report.require()
    assert report.pictures["opened"] == 8
    assert report.pictures["sizes"] == {"64x64": 4}
    assert report.settings["unlicensed"] == 0
    assert any("concrete action" in what for what in report.unchecked)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["ok"] is True
    assert told["statistics"]["records"] == 4
    assert check(Manifest.load(report.path)).ok


def test_what_differs_is_counted_pixel_by_pixel(tmp_path, records):
    report = check(data_sets.write(tmp_path, records), tolerance=3)
    shares = []
    for i in range(4):
        a, b = (Image.open(tmp_path / f"{i}-{side}.png").convert("RGB") for side in ("sad", "neutral"))
        pairs = [(a.getpixel((x, y)), b.getpixel((x, y))) for x in range(64) for y in range(64)]
        shares.append(sum(max(abs(p - q) for p, q in zip(*pixel, strict=True)) > 3 for pixel in pairs) / 64**2)
    changed = report.pictures["changed"]
    assert (changed["least"], changed["most"]) == (min(shares), max(shares))
    assert changed["median"] == pytest.approx(np.median(shares))


@pytest.mark.parametrize(("change", "message"), [
    ({"emotion": "joy"}, "emotion 'joy' is not known; known are happy, sad"),
    ({"emotion": "neutral"}, "emotion 'neutral' is not known"),
    ({"licence": None}, "names no licence"),
    ({"licence": "  "}, "names no licence"),
    ({"event": "she put the wet umbrella by the door."}, "'she' is a third person pronoun"),
    ({"event": "the shop opens."}, "has 3 words"),
    ({"event": data_sets.EVENTS[0]}, "the event is also in the extract split: r0"),
    ({"event": f"{data_sets.EVENTS[1].upper()}"}, "the event is also in the extract split: r1"),
])  # fmt: skip
def test_records(tmp_path, records, change, message):
    records[3] = {k: v for k, v in {**records[3], **change}.items() if v is not None}
    only(problems(tmp_path, records), "line 4 (r3): ", message)


def test_wrong_lines_do_not_hide_the_rest(tmp_path, records):
    path = data_sets.write(tmp_path, [*records, {"id": "x"}, records[0] | {"id": "y", "event": "too short."}])
    report = check(path)
    assert [p.where for p in report.problems] == ["line 5", "line 6 (y)"]
    with pytest.raises(ValueError, match=r"pairs.jsonl: line 5: lacks .*; line 6 \(y\): the event has 2 words"):
        report.require()


def test_problems_come_in_the_order_of_the_lines(tmp_path, records):
    (tmp_path / "0-sad.png").write_text("no picture")
    records[1]["event"] = "too short."
    records[2]["event"] = records[0]["event"]
    del records[3]["licence"]
    path = data_sets.write(tmp_path, [{"id": "x"}, *records, records[3] | {"id": "alone", "split": "evaluate"}])
    assert [p.line for p in check(path).problems] == [1, 2, 3, 4, 5, 6, 0]


def test_unlicensed_may_be_allowed_and_is_said(tmp_path, records):
    del records[1]["licence"]
    report = check(data_sets.write(tmp_path, records), allow_unlicensed=True)
    assert report.ok
    assert (report.settings["allow_unlicensed"], report.settings["unlicensed"]) == (True, 1)


def test_a_lexicon_of_ones_own(tmp_path, records):
    lexicon = {"sad": ["blue"], "neutral": ["grey"]}
    assert problems(tmp_path, records, lexicon=lexicon) == []
    records[2]["event"] = "we carried the blue chairs to the hall."
    records[3]["emotion"] = "happy"
    found = problems(tmp_path, records, lexicon=lexicon)
    assert len(found) == 2
    assert "'blue' is a word of the lexicon" in found[0]
    assert "emotion 'happy' is not known; known are sad" in found[1]


def test_splits(tmp_path, records):
    both = [r | {"split": "extract"} for r in records]
    only(problems(tmp_path, both), "splits: no records are in analyze")
    only(problems(tmp_path, [records[0], *records[2:]]), "splits: sad has 1 record in extract; at least 2")
    found = problems(tmp_path, [*records[:3], records[3] | {"split": "evaluate"}])
    only(found, "an evaluation set is a manifest of its own")
    assert problems(tmp_path, [r | {"split": "evaluate"} for r in records]) == []
    report = check(data_sets.write(tmp_path, [*records, data_sets.record(4, tmp_path, "analyze", emotion="fear")]))
    assert report.ok
    assert [str(w) for w in report.warnings] == ["splits: fear is in analyze only"]


def near_copies(image):
    yield "again.png", {}, image
    yield "again.jpg", {"quality": 60}, image
    yield "large.png", {}, image.resize((100, 100), Image.Resampling.BICUBIC)
    yield "bright.png", {}, image.point(lambda v: min(255, round(v * 1.06)))


def test_one_picture_in_both_splits(tmp_path, records):
    image = Image.open(tmp_path / "0-neutral.png")
    for name, options, copy in near_copies(image):
        copy.save(tmp_path / name, **options)
        changed = [*records[:3], records[3] | {"image_neutral": name}]
        found = [p for p in problems(tmp_path, changed) if "one size" not in p]
        only(
            found, "line 4 (r3): ", f"picture {name} is also in the extract split: 0-neutral.png", "of 256 bits differ"
        )
    # All records of the later split that have it are named.
    shared = [r | {"image_neutral": "0-neutral.png"} if r["split"] == "analyze" else r for r in records]
    only(
        problems(tmp_path, shared), "line 3 (r2): picture 0-neutral.png is also in the extract split", "line 4 (r3) too"
    )


@pytest.mark.parametrize("kind", ["manifest", "folder", "fingerprints"])
def test_overlap_with_an_evaluation_set(tmp_path, records, kind):
    other = tmp_path / "evaluation"
    other.mkdir()
    theirs = [data_sets.record(i, other, "evaluate") for i in (4, 5)]
    path = data_sets.write(other, theirs, "evaluate.jsonl")
    assert problems(tmp_path, records, against=path) == []

    Image.open(tmp_path / "1-sad.png").save(other / "4-sad.jpg", quality=80)
    theirs[0] |= {"image_emotional": "4-sad.jpg", "event": records[2]["event"].replace(".", " !")}
    path = data_sets.write(other, theirs, "evaluate.jsonl")
    if kind == "folder":
        (other / "events.txt").write_text("\n".join(r["event"] for r in theirs))
        path = other
    elif kind == "fingerprints":
        from emocircuits.data import fingerprints

        (other / "prints.json").write_text(json.dumps(fingerprints(Manifest.load(path))))
        path = other / "prints.json"
    found = problems(tmp_path, records, against=[path])
    # The twin of this face is so near to it that it is the same picture too.
    assert len(found) == 3
    assert found[0].startswith(f"line 2 (r1): picture 1-sad.png is also in {path}: 4-sad.jpg (")
    assert found[1].startswith(f"line 2 (r1): picture 1-neutral.png is also in {path}: 4-sad.jpg (")
    assert found[2].startswith(f"line 3 (r2): the event is also in {path}: ")


def test_an_evaluation_set_that_cannot_be_read(tmp_path, records):
    path = data_sets.write(tmp_path, records)
    with pytest.raises(ValueError, match="nowhere: cannot read"):
        check(path, against=tmp_path / "nowhere")


def test_pictures_that_cannot_be_opened(tmp_path, records):
    whole = (tmp_path / "2-sad.png").read_bytes()
    (tmp_path / "2-sad.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "3-neutral.png").write_text("no picture")
    found = problems(tmp_path, records)
    assert [f.split(":")[0] for f in found] == ["line 3 (r2)", "line 4 (r3)"]
    assert "2-sad.png cannot be opened as an image" in found[0]
    assert "3-neutral.png cannot be opened as an image" in found[1]


def test_pictures_of_different_size(tmp_path, records):
    Image.open(tmp_path / "0-neutral.png").resize((64, 60)).save(tmp_path / "0-neutral.png")
    only(problems(tmp_path, records), "line 1 (r0): ", "emotional picture is 64x64, the neutral one 64x60", "one size")


def test_a_twin_that_is_the_same_or_shows_nothing(tmp_path, records):
    Image.open(tmp_path / "0-sad.png").save(tmp_path / "0-neutral.png")
    only(problems(tmp_path, records), "line 1 (r0): no pixel differs by more than 8 of 255 levels")
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "0-neutral.png")
    only(problems(tmp_path, records), "line 1 (r0): ", "0-neutral.png is one colour all over")


def test_one_picture_with_two_emotions(tmp_path, records):
    a = records[0]["image_emotional"]
    Image.open(tmp_path / a).save(tmp_path / "copy.bmp")
    both = [*records, records[0] | {"id": "more", "emotion": "fear", "image_emotional": "copy.bmp"}]
    both.append(both[-1] | {"id": "most"})
    found = problems(tmp_path, both)
    assert found[0].startswith("line 5 (more): shows fear with the very picture of line 1 (r0), where it is sad")
    assert len(found) == 2


def masked(tmp_path, records, *, grow=0):
    """Record 0 with the mask of what differs."""
    a, b = (np.asarray(Image.open(tmp_path / f"0-{side}.png").convert("RGB")) for side in ("sad", "neutral"))
    mask = (a != b).any(-1)
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    return [records[0] | {"mask": "mask.png"}, *records[1:]], mask, b


def test_pixels_outside_the_mask(tmp_path, records):
    with_mask, mask, neutral = masked(tmp_path, records)
    report = check(data_sets.write(tmp_path, with_mask))
    assert report.ok
    assert report.pictures["outside_mask"]["most"] == 0
    assert report.pictures["with_mask"] == 1
    assert problems(tmp_path, with_mask, outside=0, tolerance=0) == []

    places = np.argwhere(~mask)[:: (~mask).sum() // 12][:10]
    moved = neutral.copy()
    for y, x in places:
        moved[y, x] = np.where(moved[y, x] > 127, moved[y, x] - 20, moved[y, x] + 20)
    Image.fromarray(moved).save(tmp_path / "0-neutral.png")
    share = 10 / (~mask).sum()
    only(
        problems(tmp_path, with_mask), f"line 1 (r0): 10 pixels ({share:.2%}) outside the mask differ",
        "more than 8 of 255 levels (up to 20; 0.10% are allowed)", "paste the original back",
    )  # fmt: skip
    assert problems(tmp_path, with_mask, tolerance=20) == []
    assert problems(tmp_path, with_mask, outside=share * 1.01) == []
    assert len(problems(tmp_path, with_mask, outside=share * 0.99, tolerance=19)) == 1


def test_masks_that_say_nothing(tmp_path, records):
    with_mask, _, _ = masked(tmp_path, records)
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    only(problems(tmp_path, with_mask), "the mask says that everything may differ")
    Image.new("L", (64, 64), 0).save(tmp_path / "mask.png")
    found = problems(tmp_path, with_mask)
    assert len(found) == 2
    assert "the mask says that nothing may differ" in found[1]
    Image.new("L", (32, 64), 0).save(tmp_path / "mask.png")
    only(problems(tmp_path, with_mask), "the picture is 64x64, the mask 32x64")
    (tmp_path / "mask.png").write_text("x")
    only(problems(tmp_path, with_mask), "mask ", "cannot be opened")


@pytest.mark.parametrize("shift", [(3, 0), (0, -2), (-5, 4)])
def test_a_moved_twin_is_seen(tmp_path, records, shift):
    right, down = shift
    for size in ((160, 120), (700, 540)):  # whole, and by its middle part
        large = data_sets.texture(5, (size[0] + 20, size[1] + 20))
        a = large.crop((10, 10, 10 + size[0], 10 + size[1]))
        b = large.crop((10 - right, 10 - down, 10 - right + size[0], 10 - down + size[1]))
        b.paste((40, 200, 90), (60, 50, 90, 70))
        assert compare(a, b, None, 8).shift == shift
    a.save(tmp_path / "0-sad.png")
    b.save(tmp_path / "0-neutral.png")
    report = check(data_sets.write(tmp_path, records))
    assert report.ok
    (warning, *_) = report.warnings
    assert str(warning) == f"line 1 (r0): the neutral picture seems moved by {right} to the right, {down} down (pixels)"
    mask = Image.new("L", a.size, 0)
    mask.paste(255, (50, 40, 100, 80))
    mask.save(tmp_path / "mask.png")
    only(problems(tmp_path, [records[0] | {"mask": "mask.png"}, *records[1:]]), "outside the mask", "seems moved by")


def test_faces_are_never_seen_as_moved():
    for i in range(110_000, 110_060):
        for emotion in faces.EMOTIONS:
            found = compare(faces.face(i, emotion, 1.0), faces.face(i, "neutral", 0.0), None, 8)
            assert found.shift == (0, 0)


def test_another_picture_is_worth_a_look(tmp_path, records):
    data_sets.texture(1).save(tmp_path / "0-sad.png")
    data_sets.texture(2).save(tmp_path / "0-neutral.png")
    (warning,) = check(data_sets.write(tmp_path, records)).warnings
    assert "of the pixels differ from the neutral picture: is it the same picture?" in str(warning)


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    image = data_sets.texture(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png")), np.asarray(image))


def test_settings_out_of_range(tmp_path, records):
    path = data_sets.write(tmp_path, records)
    for wrong in ({"tolerance": 255}, {"outside": 1.5}, {"near": 128}, {"near": -1}):
        with pytest.raises(ValueError, match=r"expected 0 to 254 levels, a share from 0 to 1, and 0 to 127 bits"):
            check(path, **wrong)


def test_drawn_pairs_are_fit(tmp_path):
    built = build_faces(tmp_path / "drawn", identities=6, intensities=(0.25, 1.0))
    report = check(built.pairs, against=built.evaluation)
    assert report.ok, report.problems
    assert report.warnings == ()
    assert check(built.evaluation).ok
    assert report.statistics["records"] == 2 * 6 * 6 * 2
    assert report.pictures["outside_mask"]["most"] == 0
    pairs, evaluation = Manifest.load(built.pairs), Manifest.load(built.evaluation)
    assert {r.split for r in evaluation.records} == {"evaluate"}
    used = [set(built.identities[s]) for s in ("extract", "analyze", "evaluate")]
    assert [len(u) for u in used] == [6, 6, 6]
    assert len(set().union(*used)) == 18
    clauses = [{r.event.split("said that ")[1] for r in m} for m in (pairs.split("extract"), pairs.split("analyze"))]
    assert clauses[0].isdisjoint(clauses[1])
    record = pairs.records[0]
    drawn = faces.face(record.extra["identity"], record.emotion, record.extra["intensity"])
    assert np.array_equal(np.asarray(open_image(record.image_emotional)), np.asarray(drawn))
    assert all(r.extra["suggests"] != r.emotion for r in pairs.records)
    again = build_faces(tmp_path / "again", identities=6, intensities=(0.25, 1.0))
    assert again.pairs.read_text() == built.pairs.read_text()
    other = build_faces(tmp_path / "other", identities=2, emotions=["fear"], events="agreeing", seed=1)
    assert {r.extra["suggests"] for r in Manifest.load(other.pairs).records} == {"fear"}
    with pytest.raises(ValueError, match=r"pairs.jsonl exists; name a new folder"):
        build_faces(tmp_path / "drawn")


@pytest.mark.parametrize(("wrong", "message"), [
    ({"identities": 0}, "identities is 0: expected 1 to 1000"),
    ({"emotions": ["joy"]}, "expected some of happy"),
    ({"emotions": []}, "expected some of happy"),
    ({"intensities": [0.0]}, "from 0.01 to 1"),
    ({"intensities": [0.5, 0.501]}, "expected different ones"),
    ({"events": "sad"}, "expected one of contradicting"),
])  # fmt: skip
def test_what_cannot_be_drawn(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        build_faces(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_look_alikes_of_another_split_are_left_out(tmp_path, monkeypatch):
    from emocircuits.data import faces as builder

    def draw(identity, emotions, intensities):
        # The first identity of analyze looks like the first of extract.
        return real(builder.FIRST if identity == builder.FIRST + builder.EACH else identity, emotions, intensities)

    real = builder._draw
    monkeypatch.setattr(builder, "_draw", draw)
    built = build_faces(tmp_path / "drawn", identities=2)
    assert built.left_out == [builder.FIRST + builder.EACH]
    assert built.identities["analyze"] == [builder.FIRST + builder.EACH + 1, builder.FIRST + builder.EACH + 2]

"""The manifest: read, written, every wrong line named."""

import json

import data_sets
import pytest

from emocircuits.data import Manifest, Record
from emocircuits.data.pairs import read


def test_read_and_written(tmp_path):
    records = [
        data_sets.record(0, tmp_path, extra={"camera": "b", "rank": [1, 2]}),
        data_sets.record(1, tmp_path, "analyze", emotion="happy", source=None, licence=None, mask="0-neutral.png"),
    ]
    path = data_sets.write(tmp_path, records)
    manifest = Manifest.load(path)
    first, second = manifest.records
    assert first.image_emotional == tmp_path / "0-sad.png"
    assert (first.event, first.extra["rank"], first.line) == (data_sets.EVENTS[0], [1, 2], 1)
    assert (second.source, second.licence, second.mask) == ("", "", tmp_path / "0-neutral.png")
    assert manifest.emotions == ("sad", "happy")
    assert manifest.split("analyze") == [second]
    assert len(manifest) == 2

    # Written into another folder, the paths lead to the same files.
    (tmp_path / "other").mkdir()
    copy = manifest.save(tmp_path / "other" / "copy.jsonl")
    written = json.loads(copy.read_text().splitlines()[0])
    assert written["image_emotional"] == "../0-sad.png"
    assert set(json.loads(copy.read_text().splitlines()[1])) == set(records[1])
    again = Manifest.load(copy)
    assert [r.image_neutral.resolve() for r in again.records] == [r.image_neutral.resolve() for r in manifest.records]
    assert manifest.save() == path
    assert Manifest.load(path) == manifest


def test_statistics(tmp_path):
    records = [
        data_sets.record(0, tmp_path),
        data_sets.record(1, tmp_path, emotion="happy", event=data_sets.EVENTS[0]),
        data_sets.record(2, tmp_path, "analyze", licence=""),
    ]
    records.append({**records[0], "id": "again", "emotion": "fear"})
    statistics = Manifest.load(data_sets.write(tmp_path, records)).statistics()
    assert statistics["records"] == 4
    assert statistics["emotions"] == {"sad": 2, "happy": 1, "fear": 1}
    extract = statistics["splits"]["extract"]
    assert (extract["records"], extract["pictures"], extract["events"]) == (3, 4, 1)
    assert "evaluate" not in statistics["splits"]
    assert statistics["licences"] == {"CC0-1.0": 3, "not given": 1}
    assert statistics["words_of_events"] == {"least": 9.0, "median": 9.0, "most": 10.0}
    json.dumps(statistics)


def test_every_wrong_line_is_named(tmp_path):
    good = data_sets.record(0, tmp_path)
    wrong = {
        "not JSON": "{nonsense",
        "a list, expected an object": "[1]",
        "lacks event and split": {k: v for k, v in good.items() if k not in ("event", "split")},
        "unknown field 'licences'": good | {"licences": "x"},
        "emotion is 3, expected a text": good | {"emotion": 3},
        "event is ' ', expected a text": good | {"event": " "},
        "extra is 'x', expected an object": good | {"extra": "x"},
        "split is 'test', expected one of extract": good | {"split": "test"},
        "image_emotional .*gone.png' is not a file": good | {"image_emotional": "gone.png"},
        "mask .* is not a file": good | {"mask": "."},
        "are the same file": good | {"image_neutral": good["image_emotional"]},
        "id 'r0' is that of line 1 too": good,
    }
    lines = [good, *wrong.values()]
    path = tmp_path / "pairs.jsonl"
    text = "\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\xff\xfe\n")  # a byte order mark; a line not in UTF-8
    records, problems = read(path)
    assert [r.id for r in records] == ["r0"]
    assert len(problems) == len(wrong) + 1
    for number, (problem, message) in enumerate(zip(problems, [*wrong, "not UTF-8"], strict=True), 1):
        line = 1 + 2 * number if number <= len(wrong) else 2 * len(wrong) + 2
        assert (problem.where, problem.line) == (f"line {line}", line)
        with pytest.raises(ValueError, match=message):
            raise ValueError(problem.what)
    with pytest.raises(ValueError, match="line 3: not JSON") as error:
        Manifest.load(path)
    assert all(problem.where in str(error.value) for problem in problems)


def test_what_is_no_manifest(tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl: cannot read the pairs \(No such file"):
        Manifest.load(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="cannot read the pairs"):
        Manifest.load(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no pairs"):
        Manifest.load(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="split 'train': expected one of extract, analyze"):
        Manifest((), tmp_path / "x").split("train")


def test_a_manifest_of_ones_own(tmp_path):
    a, b = data_sets.pair(3, tmp_path)
    record = Record("one", "sad", tmp_path / a, tmp_path / b, data_sets.EVENTS[3], "extract")
    path = Manifest((record,), tmp_path / "own.jsonl").save()
    assert Manifest.load(path).records == (record,)

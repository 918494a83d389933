"""``emocircuits data``, and the examples of its page."""

import json
import re
from pathlib import Path

import data_sets
import pytest

from emocircuits.cli import main
from emocircuits.data import Manifest

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def run(capsys, *arguments):
    code = main([str(a) for a in ("data", *arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_check(capsys, tmp_path):
    path = data_sets.write(tmp_path, data_sets.good(tmp_path))
    code, out, err = run(capsys, "check", path, "--out", tmp_path / "report.json")
    assert code == 0, err
    assert "4 records: sad 4" in out
    assert "not checked by code: that an event tells of a concrete action" in out
    assert out.rstrip().endswith("pairs.jsonl: fit")
    assert "check pictures: 100%" in err
    assert json.loads((tmp_path / "report.json").read_text())["ok"]
    code, out, err = run(capsys, "check", path, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["problems"] == []


def test_check_names_every_problem(capsys, tmp_path):
    records = data_sets.good(tmp_path)
    records[0]["event"] = "she said that the shop opens at ten."
    del records[2]["licence"]
    path = data_sets.write(tmp_path, [*records, ["no", "record"]])
    code, out, err = run(capsys, "check", path)
    assert code == 2
    assert "problem: line 1 (r0): 'she' is a third person pronoun" in err
    assert "problem: line 3 (r2): names no licence" in err
    assert "problem: line 5: a list, expected an object" in err
    assert err.rstrip().endswith("pairs.jsonl: 3 problems; not fit for finding a circuit")
    assert "not fit, problems: 3" in out
    code, out, err = run(capsys, "--json", "check", path)
    assert code == 2
    assert [p["line"] for p in json.loads(out)["problems"]] == [1, 3, 5]
    assert len(err.splitlines()) == 1
    data_sets.write(tmp_path, [data_sets.record(0, tmp_path), *records[1:]])
    code, out, err = run(capsys, "check", path, "--allow-unlicensed")
    assert code == 0, err
    assert "unlicensed records, allowed: 1" in out


def test_check_against(capsys, tmp_path):
    records = data_sets.good(tmp_path)
    path = data_sets.write(tmp_path, records)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_text(records[1]["event"])
    fair = data_sets.write(tmp_path, [data_sets.record(5, tmp_path, "evaluate")], "fair.jsonl")
    code, _, err = run(capsys, "check", path, "--against", fair, "--against", tmp_path / "set")
    assert code == 2
    assert f"problem: line 2 (r1): the event is also in {tmp_path / 'set'}: a.txt line 1" in err
    code, out, err = run(capsys, "check", path, "--against", fair)
    assert code == 0, err
    assert f"compared with {fair}" in out


def test_faces_stats_and_check(capsys, tmp_path):
    folder = tmp_path / "drawn"
    code, out, err = run(capsys, "faces", "--out", folder, "--identities", 2, "--emotions", "sad,fear", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["statistics"]["records"] == 2 * 2 * 2
    code, out, _ = run(capsys, "check", result["pairs"], "--against", result["evaluation"])
    assert code == 0
    code, out, _ = run(capsys, "stats", result["evaluation"])
    assert code == 0
    assert "evaluate: 4 records, 6 pictures" in out
    code, out, _ = run(capsys, "stats", result["pairs"], "--json", "--out", tmp_path / "stats.json")
    assert json.loads(out) == json.loads((tmp_path / "stats.json").read_text())
    assert json.loads(out) == Manifest.load(result["pairs"]).statistics()


@pytest.mark.parametrize(("arguments", "message"), [
    (["check", "nowhere.jsonl"], "nowhere.jsonl: cannot read the pairs"),
    (["check", "PAIRS", "--against", "nowhere"], "nowhere: cannot read"),
    (["check", "PAIRS", "--lexicon", "PAIRS"], "not a lexicon"),
    (["check", "PAIRS", "--tolerance", "300"], "tolerance=300"),
    (["check", "PAIRS", "--out", "."], "is a folder"),
    (["stats", "nowhere.jsonl"], "nowhere.jsonl: cannot read the pairs"),
    (["faces"], "--out is missing"),
    (["faces", "--out", "PAIRS"], "is a file"),
    (["faces", "--out", "new", "--intensities", "full"], "--intensities full: expected numbers"),
    (["faces", "--out", "new", "--emotions", "joy"], "expected some of happy"),
    (["faces", "--out", "new", "--seed", "-1"], "--seed -1"),
])  # fmt: skip
def test_bad_input(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    path = data_sets.write(tmp_path, [data_sets.record(0, tmp_path)])
    code, out, err = run(capsys, *[str(path) if a == "PAIRS" else a for a in arguments])
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("emocircuits: ")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks
    scope = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)


def test_the_example_record_of_the_page_is_one(tmp_path):
    (line,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    record = json.loads(line)
    for name in ("image_emotional", "image_neutral", "mask"):
        (tmp_path / record[name]).parent.mkdir(exist_ok=True)
        (tmp_path / record[name]).touch()
    (tmp_path / "pairs.jsonl").write_text(" ".join(line.split()))
    assert Manifest.load(tmp_path / "pairs.jsonl").emotions == ("sad",)

"""The whole localisation: exactly the planted circuit, none where none is, kept step by step, and refusals."""

import dataclasses as dc
import json
import re
import shutil
from pathlib import Path

import planted
import pytest
import torch
from circuit_pairs import planted_pairs

from emocircuits.circuit import Circuit
from emocircuits.circuits import steps
from emocircuits.circuits.localize import localize
from emocircuits.circuits.neurons import Neurons
from emocircuits.circuits.settings import Settings
from emocircuits.cli import main
from emocircuits.data import Manifest

STEPS = "emocircuits.circuits.localize.STEPS"
EACH = {"extract": 4, "analyze": 8}
SETTINGS = Settings(alphas=(0.1, 0.5), answered=2, look=2, explicit_k=2, neurons=10, tune=False)
EVENTS = {
    "extract": ("the report is ready at ten today .", "the shop opens at ten only today ."),
    "analyze": ("my mom said that the road is closed .", "a bus goes only once today my mom said ."),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def first(monkeypatch):
    """The first steps only, where what matters is how steps are kept."""
    few = tuple(s for s in steps.STEPS if s.name in ("steering", "layers", "heads", "decoupling"))
    monkeypatch.setattr(STEPS, few)
    return few


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write(tmp_path_factory.mktemp("planted"))


def write(folder):
    """A manifest of planted pairs: the pictures of one emotion are one colour, so they are told apart by a pattern."""
    import numpy as np
    from PIL import Image

    records = []
    for number, (split, events) in enumerate(EVENTS.items()):
        each = EACH[split]
        made = planted_pairs(folder, each=each, split=split, first=100 * number)
        for i, r in enumerate(made.records):
            rng = np.random.default_rng([number, i % each])
            speckle = np.kron(rng.integers(0, 2, (8, 8)) * 3, np.ones((2, 2), int))[..., None]
            for file in (r.image_emotional, r.image_neutral):
                pixels = np.asarray(Image.open(file)).astype(int)
                Image.fromarray(np.clip(pixels + speckle, 0, 255).astype(np.uint8)).save(file)
            records.append(dc.replace(r, id=f"{split}-{r.id}", event=events[i % 2]))
    return Manifest(tuple(records), folder / "pairs.jsonl").save()


@pytest.fixture(scope="module")
def done(manifest, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    return folder, localize(planted.subject(), manifest, folder, SETTINGS, progress=False, say=lambda line: None)


def run(folder, pairs, subject=None, settings=SETTINGS, **more):
    """What a run says."""
    said = []
    localize(subject or planted.subject(), pairs, folder, settings, progress=False, say=said.append, **more)
    return said


def test_exactly_the_planted_heads_are_the_circuit(done):
    folder, circuit = done
    assert set(circuit.heads) == {planted.READER, planted.TELLER}
    assert circuit.l_emo == planted.TELLER[0]
    assert Circuit.load(folder / "circuit.json") == circuit
    assert all(low <= e <= high for e, (low, high) in zip(circuit.head_effects, circuit.head_intervals, strict=True))
    assert (folder / circuit.steering).is_file()
    circuit.require(planted.subject().model, "llava", planted.LAYERS)
    with pytest.raises(ValueError, match="other weights"):
        circuit.require(planted.subject(seed=1).model, "llava", planted.LAYERS)


def test_exactly_the_planted_neurons_are_in_it(done):
    folder, circuit = done
    assert set(circuit.neurons) == set(planted.SPEAKERS)
    assert set(circuit.neuron_types) == {"explicit"}
    assert set(map(frozenset, circuit.neuron_tokens)) == {
        frozenset(words) for e, words in planted.WORDS.items() if e != "neutral"
    }
    assert {(n.layer, n.neuron) for n in Neurons.load(folder).contextual} == set(planted.TRIGGERS)


def test_no_head_is_found_where_all_carry_the_same(manifest, tmp_path):
    circuit = localize(planted.subject("diffuse"), manifest, tmp_path, SETTINGS, progress=False, say=lambda line: None)
    assert circuit.heads == ()
    assert json.loads((tmp_path / "run.json").read_text())["skipped"] == {
        "maps": "no head is critical", "verification": "no head is critical", "tuning": "not asked for",
    }  # fmt: skip


def test_a_run_says_what_it_is_of(done, manifest):
    record = json.loads((done[0] / "run.json").read_text())
    assert record["settings"]["alphas"] == [0.1, 0.5]
    assert record["seed"] == 0
    assert record["fingerprint"] == done[1].fingerprint
    assert {*record["steps"], *record["skipped"]} == {s.name for s in steps.STEPS}
    assert record["skipped"] == {"tuning": "not asked for"}
    assert all(s["seconds"] > 0 and s["says"] for s in record["steps"].values())
    assert record["versions"]["torch"]
    assert record["pairs"]["extract"] == 16


def test_a_killed_run_goes_on_where_it_was(done, manifest, tmp_path, monkeypatch, first):
    def killed(found):
        raise KeyboardInterrupt

    monkeypatch.setattr(STEPS, tuple(dc.replace(s, find=killed) if s.name == "heads" else s for s in first))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, manifest)
    assert not (tmp_path / "heads.json").exists()
    monkeypatch.setattr(STEPS, first)
    said = run(tmp_path, manifest)
    there = [line.split(":")[0] for line in said if "was there" in line]
    assert there[:2] == ["steering", "layers"]
    assert "heads" not in there
    for name in ("layers.json", "heads.json", "heads.parquet"):
        assert (tmp_path / name).read_bytes() == (done[0] / name).read_bytes()
    assert all("was there" in line for line in run(tmp_path, manifest))


def test_changed_settings_are_found_again_and_what_rests_on_them(done, manifest, tmp_path, first):
    shutil.copytree(done[0], tmp_path, dirs_exist_ok=True)
    said = run(tmp_path, manifest, settings=dc.replace(SETTINGS, top=5))
    assert "was there" in next(line for line in said if line.startswith("layers:"))
    assert "heads: settings have changed, or what it rests on; found again" in said
    assert next(line for line in said if line.startswith("decoupling:")).endswith(" s)")
    assert "was there" not in next(line for line in said if line.startswith("decoupling:"))


def test_a_folder_of_something_else_is_refused(done, manifest, tmp_path):
    folder = done[0]
    whole = Manifest.load(manifest)
    fewer = Manifest(whole.records[1:], tmp_path / "pairs.jsonl").save()
    with pytest.raises(ValueError, match="results of another model"):
        run(folder, manifest, planted.subject(seed=1))
    with pytest.raises(ValueError, match="asked otherwise"):
        run(folder, manifest, dc.replace(planted.subject(), limit=3))
    with pytest.raises(ValueError, match="results of other pairs"):
        run(folder, fewer)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "heads.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no run\.json"):
        run(tmp_path / "run", manifest)


def test_damaged_files_are_refused(done, manifest, tmp_path, first):
    shutil.copytree(done[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "steering.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-20])
    with pytest.raises(ValueError, match="damaged or cut off"):
        run(tmp_path, manifest)
    file.write_bytes(data)
    (tmp_path / "layers.json").write_text('{"format": "emocircuits.layers/1"}')
    with pytest.raises(ValueError, match=r"layers\.json: damaged"):
        run(tmp_path, manifest)
    assert (tmp_path / "circuit.json").exists()
    with pytest.raises(ValueError, match="no l_emo"):
        run(tmp_path, manifest, settings=dc.replace(SETTINGS, alphas=(1e-6,)), fresh=True)
    assert not (tmp_path / "circuit.json").exists()
    assert not (tmp_path / "heads.json").exists()
    assert not any("was there" in line for line in run(tmp_path, manifest, fresh=True))


def test_pairs_that_cannot_be_used_are_refused(manifest, tmp_path):
    from PIL import Image

    whole = Manifest.load(manifest)
    first = whole.records[0]
    small = tmp_path / "small.png"
    Image.open(first.image_neutral).resize((8, 8)).save(small)
    for change, match in (
        ({"image_neutral": small}, "8x8"),
        ({"event": "i am glad that the shop opens at ten"}, "glad"),
        ({"licence": ""}, "no licence"),
        ({"emotion": "joy"}, "'joy' is not known"),
    ):
        records = (dc.replace(first, **change), *whole.records[1:])
        pairs = Manifest(records, tmp_path / "pairs.jsonl").save()
        with pytest.raises(ValueError, match=match):
            run(tmp_path / "run", pairs)
        assert not (tmp_path / "run").exists()
    lacking = [r for r in whole.records if not (r.split == "extract" and r.emotion == "sad")]
    pairs = Manifest(tuple(lacking), tmp_path / "pairs.jsonl").save()
    with pytest.raises(ValueError, match="sad is in analyze but not in extract"):
        run(tmp_path / "run", pairs)


def test_models_without_a_circuit_to_find_are_refused(manifest, tmp_path, first):
    with pytest.raises(ValueError, match="keeps 0 of 4 pairs"):
        run(tmp_path / "blind", manifest, planted.subject("blind"))
    weak = dc.replace(SETTINGS, alphas=(1e-6,))
    with pytest.raises(ValueError, match="no l_emo: in no layer"):
        run(tmp_path / "weak", manifest, settings=weak)
    said = run(tmp_path / "weak", manifest, settings=dc.replace(weak, l_emo=2))
    assert any(line.startswith("heads: 2 critical") for line in said)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"l_emo": 4}, "l_emo=4"), ({"draws": 3}, "draws=3"), ({"head_reads": "x"}, "head_reads"), ({"tau": 2}, "tau=2")],
)
def test_settings_are_refused_before_anything_runs(manifest, tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path / "run", manifest, settings=dc.replace(SETTINGS, **change))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (["--out", "{tmp}/run", "--alphas", "much"], "--alphas much"),
        ([], "--out is missing"),
        (["--out", "{tmp}/run", "--draws", "2"], "draws=2"),
        (["--out", "{tmp}/run", "--pairs", "{tmp}/none.jsonl"], "none.jsonl"),
        (["--out", "{tmp}/run", "--model", "{tmp}"], "--pairs is missing"),
    ],
)
def test_the_command_refuses_bad_input(tmp_path, capsys, line, match):
    assert main(["localize", *(part.format(tmp=tmp_path) for part in line)]) == 2
    assert match in capsys.readouterr().err


def test_the_page_names_options_that_there_are(capsys):
    page = (Path(__file__).parents[2] / "docs" / "localize.md").read_text()
    with pytest.raises(SystemExit):
        main(["localize", "--help"])
    help = capsys.readouterr().out
    named = set(re.findall(r"`(--[a-z-]+)", page)) - {"--circuit", "--beta"}  # of veena
    assert len(named) > 20
    assert [option for option in sorted(named) if option not in help] == []

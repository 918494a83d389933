"""Plans as data: validation, JSON, hashes, files."""

import json

import pytest
import torch

from emocircuits import VEENA, AddVector, BoostRoute, Circuit, Plan, ReplaceHead, ReplaceVector, ScaleHead, ScaleNeurons
from emokernels import Role

PLAN = Plan(
    [
        BoostRoute(heads=[(12, 18), (14, 3)], to="query", source="visual", by=1.5, reading="weight", phase="prefill"),
        BoostRoute(heads=[(1, 2)], to=[Role.GENERATED], source=["visual", Role.SYSTEM], by=0.0, reading="logit-add"),
        ScaleHead(heads=[(0, 1)], by=-0.1, rows=[0, 3]),
        ReplaceHead(heads=[(0, 1), (2, 2)], value=torch.randn(2, 8, generator=torch.Generator().manual_seed(0))),
        ScaleNeurons({20: [8483], 3: [1, 5]}, by=1.6),
        AddVector(layers=3, vector=[0.1, 0.2, 1e-30], by=0.1),
        ReplaceVector(layers=[1, 2], vector=torch.ones(2, 3), site="mlp_out", to="last"),
    ]
)


def test_json_round_trip_is_exact():
    again = Plan.from_json(PLAN.to_json())
    assert again == PLAN
    assert hash(again) == hash(PLAN)
    assert again.to_json() == PLAN.to_json()
    value = torch.tensor(again.edits[3].value.tolist())
    assert torch.equal(value, torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))


def test_digest_is_stable_and_sees_every_field():
    assert Plan([ScaleHead([(0, 1)], by=2.0)]).digest() == Plan([ScaleHead(heads=((0, 1),), by=2)]).digest()
    digests = {
        Plan([ScaleHead([(0, 1)], **o)]).digest()
        for o in ({}, {"by": 2.0}, {"to": "last"}, {"rows": [1]}, {"phase": "decode"})
    }
    assert len(digests) == 5


def test_save_and_load(tmp_path):
    assert Plan.load(PLAN.save(tmp_path / "plan.json")) == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = PLAN.save(tmp_path / "plan.json")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="space"):
        Plan().save(path)
    monkeypatch.undo()
    assert Plan.load(path) == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="x"), "not a plan"),
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.update(colour="red"), "colour"),
        (lambda d: d["edits"][0].update(strength=3), "strength"),
        (lambda d: d["edits"][0].update(edit="Boost"), "'Boost'"),
        (lambda d: d["edits"][0].update(reading="softly"), "softly"),
        (lambda d: d["edits"][0].update(to="image"), "visual"),
        (lambda d: d["edits"][0].update(heads=[3]), "layer, head"),
        (lambda d: d["edits"][0].update(by="much"), "finite number"),
        (lambda d: d["edits"][4].update(neurons=[[1, []]]), "neuron"),
        (lambda d: d["edits"][5].update(vector=[float("nan")]), "finite"),
    ],
)
def test_bad_plan_files_say_what_is_wrong(tmp_path, change, message):
    data = json.loads(PLAN.to_json())
    change(data)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)
    assert "bad.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_broken_json(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json"):
        Plan.load(path)
    with pytest.raises(ValueError, match="missing"):
        Plan.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoostRoute([], to="query"), "empty"),
        (lambda: BoostRoute([(0, 0), (0, 0)]), "distinct"),
        (lambda: BoostRoute([(0, -1)]), "non-negative"),
        (lambda: BoostRoute([(0, 0)], by=-1.0), "at least 0"),
        (lambda: BoostRoute([(0, 0)], to="query", phase="decode"), "never occurs"),
        (lambda: BoostRoute([(0, 0)], to="generated", phase="prefill"), "never occurs"),
        (lambda: ScaleHead([(0, 0)], rows=[-1]), "counted from 0"),
        (lambda: ReplaceHead([(0, 0)], value=torch.ones(2, 8)), "n_heads"),
        (lambda: AddVector([0, 1], torch.ones(3, 4)), "layers"),
        (lambda: AddVector([0], torch.ones(4), site="middle"), "resid_post"),
        (lambda: ScaleNeurons({0: [1, 1]}), "distinct"),
    ],
)
def test_bad_edits_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_circuit_round_trip_and_veena(tmp_path):
    circuit = Circuit(
        "llava",
        6,
        3,
        heads=[(2, 1), (4, 0), (3, 3)],
        neurons=[(4, 7), (2, 9), (4, 1)],
        head_effects=[3, 2, 1],
        settings={"seed": 0},
    )
    assert Circuit.load(circuit.save(tmp_path / "c.json")) == circuit
    plan = VEENA(circuit, beta=1.4, gamma=1.6, neurons=2).plan()
    assert plan == Plan(
        [
            BoostRoute([(2, 1), (3, 3)], to="query", source="visual", by=1.4),
            BoostRoute([(4, 0)], to="generated", source="visual", by=1.4),
            ScaleNeurons({2: [9], 4: [7]}, by=1.6),
        ]
    )
    assert not VEENA(circuit, beta=1.0, gamma=1.0).plan().edits
    with pytest.raises(ValueError, match="l_emo"):
        Circuit("llava", 6, 6, heads=[])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="not a circuit"):
        Circuit.load(tmp_path / "x.json")

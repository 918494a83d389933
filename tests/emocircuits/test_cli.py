"""The command line: what it prints, and that bad input ends with one line and exit code 2."""

import json

import pytest

import emokernels as emo
from emocircuits import BoostRoute, Circuit, Plan, ScaleHead
from emocircuits.cli import main
from emocircuits.embedded import faces

EVENT = "my mom said that the report is ready."


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "face.png"
    faces.face(101_900, "happy", 1.0).save(path)
    return str(path)


@pytest.fixture
def circuit(tmp_path):
    return str(Circuit("llava", 6, 3, [(2, 1), (4, 2)], [(3, 5)]).save(tmp_path / "circuit.json"))


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_doctor(capsys, tmp_path):
    code, out, _ = run(capsys, "doctor", "--json", "--out", tmp_path / "doctor.json")
    assert code == 0
    report = json.loads(out)
    assert report == json.loads((tmp_path / "doctor.json").read_text())
    assert {b["name"]: b["available"] for b in report["backends"]} == {b.name: b.available for b in emo.backends()}
    assert all(b["reason"] for b in report["backends"])
    assert report["versions"]["torch"]
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "composed" in out
    assert "llava" in out


def test_veena_describes_with_and_without(capsys, image, circuit, tmp_path):
    arguments = ("veena", "--image", image, "--event", EVENT)
    code, out, err = run(capsys, *arguments, "--json", "--circuit", circuit)
    assert code == 0, err
    result = json.loads(out)
    assert "feel" in result["without"]
    assert Plan.from_dict(result["plan"]).edits
    # A strength of nothing changes nothing; a knocked-out model says something else.
    code, out, _ = run(capsys, *arguments, "--json", "--circuit", circuit, "--beta", 1, "--gamma", 1)
    same = json.loads(out)
    assert same["with"] == same["without"] == result["without"]
    everything = Plan([ScaleHead([(layer, h) for layer in range(6) for h in range(8)], by=0.0)])
    code, out, _ = run(capsys, *arguments, "--json", "--plan", everything.save(tmp_path / "plan.json"))
    assert json.loads(out)["with"] != result["without"]


def test_veena_knows_the_embedded_circuit(capsys, image):
    code, out, err = run(capsys, "veena", "--image", image, "--event", EVENT)
    assert code == 0, err
    assert out.startswith("without: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--image": "missing.png"}, "missing.png"),
        ({"--image": __file__}, "not an image"),
        ({"--event": "  "}, "event is empty"),
        ({"--circuit": "missing.json"}, "missing.json"),
        ({"--circuit": __file__}, "broken JSON"),
        ({"--model": "./nowhere"}, "config.json"),
        ({"--max-new-tokens": "0"}, "at least 1"),
        ({"--plan": "missing.json"}, "either a plan, or a circuit"),
        ({"--out": "."}, "is a folder"),
    ],
)
def test_bad_input_of_veena(capsys, image, circuit, change, message):
    given = {"--image": image, "--event": EVENT, "--circuit": circuit, **change}
    code, _, err = run(capsys, "veena", *[x for pair in given.items() for x in pair])
    assert code == 2
    assert message in err
    assert err.startswith("emocircuits: ")
    assert err.count("\n") == 1


def test_plan_that_does_not_fit(capsys, image, tmp_path):
    plan = Plan([BoostRoute([(9, 0)], to="query", source="visual", by=2.0)]).save(tmp_path / "plan.json")
    code, _, err = run(capsys, "veena", "--image", image, "--event", EVENT, "--plan", plan)
    assert code == 2
    assert "no layer 9" in err
    data = json.loads(plan.read_text())
    data["edits"][0]["colour"] = "red"
    plan.write_text(json.dumps(data))
    code, _, err = run(capsys, "veena", "--image", image, "--event", EVENT, "--plan", plan)
    assert code == 2
    assert "unknown field colour" in err


def test_demo_tells_the_embedded_story_only(capsys, tmp_path):
    code, _, err = run(capsys, "demo", "--model", "some/model", "--out", tmp_path / "x")
    assert code == 2
    assert "embedded" in err
    (tmp_path / "file").write_text("kept")
    code, _, err = run(capsys, "demo", "--out", tmp_path / "file")
    assert code == 2
    assert "is a file" in err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["veena"], ["demo", "--seed", "x"]])
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2

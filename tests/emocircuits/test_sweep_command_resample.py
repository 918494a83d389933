"""``emocircuits sweep --patch-with resample``, and that every wrong value of an option is one clear line."""

from __future__ import annotations

import json

import pytest
import torch
from test_sweep_command import EVENT, faces_pair, folder, run  # noqa: F401  a fixture

from emocircuits import embedded
from emocircuits.embedded import faces
from emocircuits.sweep import Sweep, SweepResult, logit_diff

OTHERS = (101_910, 101_911, 101_912)


@pytest.fixture(scope="module")
def others(folder):  # noqa: F811
    for person in OTHERS:
        faces.face(person, "neutral", 0.0).save(folder / f"other-{person}.png")
    path = folder / "others.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": EVENT, "image": f"other-{person}.png"}) for person in OTHERS))
    return path


def test_resampled(capsys, folder, others, tmp_path):  # noqa: F811
    model, clean, corrupt, a, b = faces_pair()
    command = ("--pairs", folder / "one.jsonl", "--layers", "4,5", "--direction", "noise", "--json")
    drawn = ("--patch-with", "resample", "--resample", others, "--draws", "2", "--seed", "3", "--out", tmp_path)
    code, printed, err = run(capsys, *command, *drawn)
    assert code == 0, err
    _, processor = embedded.load()
    prompts = [
        dict(processor(images=faces.face(person, "neutral", 0.0), text=EVENT, return_tensors="pt")) for person in OTHERS
    ]
    found = Sweep(
        model, clean, corrupt, logit_diff(a, b), direction="noise", patch_with="resample", resample=prompts, draws=2,
        seed=3, progress=False,
    ).heads(layers=[4, 5])  # fmt: skip
    values = torch.tensor(json.loads(printed)["values"], dtype=torch.float64)
    assert found.values.std() > 1e-3
    torch.testing.assert_close(values, found.values, rtol=0, atol=1e-4)
    kept = SweepResult.load(tmp_path)
    torch.testing.assert_close(kept.draws, found.draws, rtol=0, atol=1e-4)
    # Two pairs draw from the same prompts.
    code, printed, err = run(
        capsys, "--pairs", folder / "pairs.jsonl", "--target", "residual", "--patch-with", "resample", "--resample",
        others, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert len(json.loads(printed)["pairs"]) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--device", "nowhere"), "emocircuits: device 'nowhere' cannot be used here: "),
        (("--layers", "0-999999999999"), "no model has so many layers"),
        (("--layers", "-3"), "expected numbers and ranges"),
        (("--positions", "99"), "emocircuits: positions [99]: expected columns inside a prompt"),
        (("--patch-with", "resample"), "needs --resample FILE"),
        (("--resample", "others.jsonl"), "--resample is for --patch-with resample, not clean"),
        (("--draws", "2", "--patch-with", "zero"), "--draws is for --patch-with resample, not zero"),
        (("--seed", "0"), "--seed is for --patch-with resample"),
        (("--patch-with", "resample", "--resample", "others.jsonl", "--draws", "4"), "--draws 4: expected 1 to 3"),
        (("--patch-with", "resample", "--resample", "others.jsonl", "--draws", "0"), "--draws 0: expected 1 to 3"),
        (("--patch-with", "resample", "--resample", "others.jsonl", "--seed", "-1"), "--seed -1: expected at least 0"),
        (("--patch-with", "resample", "--resample", "none.jsonl"), "cannot read the prompts"),
        (("--patch-with", "resample", "--resample", "pairs.jsonl"), "unknown field 'id'; known are prompt, image"),
        (("--patch-with", "resample", "--resample", "empty.jsonl"), "holds no prompts"),
        (("--patch-with", "resample", "--resample", "lost.jsonl"), "line 1: image"),
        (("--patch-with", "resample", "--resample", "short.jsonl"), "resample[0] cannot stand in"),
        (("--patch-with", "resample", "--resample", "others.jsonl", "--prescreen", "atp"), "drawn from other prompts"),
    ],
)
def test_refusals(capsys, folder, others, monkeypatch, options, told):  # noqa: F811
    (folder / "empty.jsonl").write_text("\n")
    (folder / "lost.jsonl").write_text('{"prompt": "a", "image": "lost.png"}')
    (folder / "short.jsonl").write_text('{"prompt": "i feel"}')
    monkeypatch.chdir(folder)
    code, printed, err = run(capsys, "--pairs", "one.jsonl", *options)
    assert (code, printed) == (2, "")
    assert told in err
    assert err.splitlines()[-1].startswith("emocircuits: ")
    assert "Traceback" not in err

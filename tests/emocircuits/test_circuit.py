"""Circuit files: what they hold, which model they are for."""

import dataclasses as dc
import json

import pytest
import torch
from models import build

from emocircuits import VEENA, Circuit, embedded
from emocircuits.fingerprint import weights_fingerprint
from emocircuits.patching import patch
from emocircuits.plan import Plan


def circuit(**over):
    return Circuit(
        **{
            **dict(
                model_type="llava", layers=3, l_emo=1, heads=((1, 2), (0, 3)), neurons=((2, 7),),
                head_effects=(0.4, 0.2), head_intervals=((0.3, 0.5), (0.1, 0.3)), neuron_effects=(1.5,),
                neuron_types=("explicit",), neuron_tokens=(("happy", "glad"),), steering="steering.safetensors",
                settings={"seed": 1},
            ),
            **over,
        }
    )  # fmt: skip


def test_a_file_gives_back_everything(tmp_path):
    assert Circuit.load(circuit(fingerprint="ab").save(tmp_path / "circuit.json")) == circuit(fingerprint="ab")


def test_files_of_version_one_are_read(tmp_path):
    old = {
        "format": "emocircuits/circuit", "version": 1, "model_type": "llava", "layers": 3, "l_emo": 1,
        "heads": [[1, 2]], "neurons": [[2, 7]], "head_effects": [0.5], "settings": {},
    }  # fmt: skip
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert Circuit.load(tmp_path / "old.json").heads == ((1, 2),)
    (tmp_path / "new.json").write_text(json.dumps({**old, "version": 9}))
    with pytest.raises(ValueError, match="version 9; this release reads 1, 2"):
        Circuit.load(tmp_path / "new.json")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"head_intervals": ((0.0, 1.0),)}, "1 values for 2 heads"),
        ({"neuron_types": ("loud",)}, "expected 'explicit' or 'contextual'"),
        ({"heads": ((1, 2), (1, 2))}, "twice"),
        ({"heads": ((3, 0), (0, 3))}, "layers 0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(over, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        circuit(**over)
    written = {**circuit().to_dict(), **over}
    (tmp_path / "c.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=f"c.json.*{message}"):
        Circuit.load(tmp_path / "c.json")


def test_a_circuit_of_other_weights_is_refused():
    model = build("llava")
    found = circuit(fingerprint=weights_fingerprint(model))
    assert VEENA(found, beta=2.0).plan(model).edits
    other = build("llava", seed=1)
    with pytest.raises(ValueError, match="other weights"):
        VEENA(found, beta=2.0).plan(other)
    assert VEENA(dc.replace(found, fingerprint=""), beta=2.0).plan(other).edits


def test_a_checkpoint_is_known_again_in_another_type_and_while_it_is_patched():
    model, _ = embedded.load()
    known = weights_fingerprint(model)
    with patch(model, Plan()):
        assert weights_fingerprint(model) == known
    assert weights_fingerprint(model.to(torch.bfloat16)) == known
    with torch.no_grad():
        model.model.language_model.layers[3].mlp.down_proj.weight[0, 0] += 1
    assert weights_fingerprint(model) != known


def test_weights_that_are_not_there():
    with pytest.raises(ValueError, match="offloaded"):
        weights_fingerprint(torch.nn.Linear(2, 2, device="meta"))

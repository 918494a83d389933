"""``emocircuits sweep --metric generated``: words, limits, and what is said."""

import json

import pytest
import torch
from test_sweep_command import EVENT, folder, run  # noqa: F401  folder is a fixture

from emocircuits import embedded
from emocircuits.sweep import SweepResult

PATCH = ["--target", "residual", "--metric", "generated", "--limit", "5"]


def by_hand(model, processor, layer):
    """What the model says with the clean residual stream entering a layer, in the prompt's pass alone."""
    from emocircuits.embedded import faces

    both = [
        processor(images=faces.face(101_900, emotion, by), text=EVENT, return_tensors="pt")
        for emotion, by in (("happy", 1.0), ("neutral", 0.0))
    ]
    block, kept = model.model.language_model.layers[layer], {}
    hook = block.register_forward_pre_hook(lambda m, a: kept.update(x=a[0].clone()))
    with torch.no_grad():
        model(**both[0])
    hook.remove()
    hook = block.register_forward_pre_hook(lambda m, a: (kept["x"], *a[1:]) if a[0].shape[1] > 1 else None)
    out = model.generate(**both[1], do_sample=False, max_new_tokens=5)
    hook.remove()
    return processor.decode(out[0, both[1]["input_ids"].shape[1] :], skip_special_tokens=True)


def test_words(capsys, folder, tmp_path):  # noqa: F811
    code, out, _ = run(
        capsys, "--pairs", folder / "one.jsonl", *PATCH, "--words", "delighted, happy", "--json", "--out", tmp_path
    )
    assert code == 0
    record = json.loads(out)
    model, processor = embedded.load()
    assert record["texts"]["patched"] == [by_hand(model, processor, layer) for layer in range(6)]
    assert record["values"] == [float("delighted" in said) for said in record["texts"]["patched"]]
    assert (record["clean"], record["corrupt"], sum(record["values"])) == (1.0, 0.0, 6.0)
    assert "delighted" in record["texts"]["clean"]
    assert SweepResult.load(tmp_path).texts == record["texts"]["patched"]
    code, out, err = run(capsys, "--pairs", folder / "one.jsonl", *PATCH, "--words", "delighted", "--layers", "2,3")
    assert code == 0
    assert "delighted because" in out.splitlines()[2]
    assert any(line.startswith("corrupt says ") for line in out.splitlines())
    assert "counted as 5 tokens" in err


def test_the_answer_is_the_word(capsys, folder):  # noqa: F811
    code, out, _ = run(capsys, "--pairs", folder / "pairs.jsonl", *PATCH, "--layers", "0", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["values"] == [0.0]
    assert record["effects"] is None
    assert len(record["texts"]["patched"]) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--words", "happy"], "--words is for --metric generated"),
        (["--limit", "3"], "--limit is for --metric generated"),
        (["--metric", "generated", "--limit", "0"], "--limit 0: expected at least 1"),
        (["--metric", "generated", "--words", "a,,b"], "expected at least one word"),
    ],
)
def test_wrong_options(capsys, folder, arguments, says):  # noqa: F811
    code, _, err = run(capsys, "--pairs", folder / "one.jsonl", *arguments)
    assert code == 2
    assert says in err

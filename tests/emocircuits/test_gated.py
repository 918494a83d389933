"""Gated MLPs in one pass equal those whose activations are edited on the way to the down projection."""

import families_harness as harness
import pytest
import torch
from test_edits import vector

from emocircuits import AddNeurons, Plan, ReplaceNeurons, ScaleNeurons, gated, patch
from emocircuits.families import open_model

GATED = [name for name in harness.TEXT if gated.is_gated(open_model(harness.BUILDERS[name](torch.float32)[0]))]
PLAN = Plan(
    [
        ScaleNeurons({0: [3, 7], 2: [11, 40]}, by=1.8, to=["query", "generated"]),
        ScaleNeurons({1: [5]}, by=-0.5),
        AddNeurons({0: [3, 8]}, vector(2), by=2.0, positions=[-1, 0]),
        ReplaceNeurons({2: [1, 11]}, vector(2), rows=[1]),
        AddNeurons({2: [2]}, 0.7, phase="decode"),
    ]
)


@pytest.fixture
def passes(monkeypatch):
    """How often activations were computed in one pass."""
    calls = []
    run = gated.run_activation
    monkeypatch.setattr(gated, "run_activation", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    return calls


def test_the_families_that_are_known_to_be_gated():
    assert {"Llama", "Qwen2", "Mistral", "Gemma 2", "Phi-3"} <= set(GATED)
    assert not {"GPT-2", "GPT-NeoX"} & set(GATED)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize(("cache", "backend"), [("dynamic", "composed"), ("static", "reference")])
def test_one_pass_equals_two(name, cache, backend, passes):
    model, make_inputs = harness.BUILDERS[name](torch.float64)
    inputs, run = make_inputs(2, "none"), harness.Run(cache, False)
    with patch(model, PLAN):
        tokens, expected = harness.generate(model, inputs, run)
        assert not passes, "on a CPU this is not the way"
    with patch(model, PLAN, backend=backend, fuse_mlp=True):
        again, logits = harness.generate(model, inputs, run)
    assert len(passes) == 3 * harness.STEPS
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_what_looks_at_the_neurons_sees_them_edited(passes):
    model, make_inputs = harness.BUILDERS["Llama"](torch.float64)
    inputs, seen = make_inputs(2, "left"), []
    for fuse in (False, True):
        with patch(model, PLAN, fuse_mlp=fuse):
            hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
            model(**inputs)
            hook.remove()
    # A hook on the module itself comes before its forward, where the edit is: both show the same.
    assert torch.equal(*seen)
    assert len(passes) == 2


def test_gradients(passes):
    model, make_inputs = harness.BUILDERS["Llama"](torch.float64)
    inputs, found = make_inputs(2, "none"), []
    for fuse in (False, True):
        with patch(model, PLAN, fuse_mlp=fuse):
            weight = model.model.layers[0].mlp.gate_proj.weight
            found += torch.autograd.grad(model(**inputs).logits.square().sum(), weight)
    assert passes
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)

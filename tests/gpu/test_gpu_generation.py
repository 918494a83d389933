"""A tiny LLaVA patched on the GPU generates what it generates on the CPU."""

import sys
from pathlib import Path

import pytest
import torch
from on_device import needs_gpu

sys.path.insert(0, str(Path(__file__).parents[1] / "emocircuits"))

pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.fixture
def case():
    """A patched model's parts: the model in float64 on the CPU, a padded batch, a plan of every kind of edit."""
    import models
    from test_patching import everything

    model = models.build("llava", dtype=torch.float64)
    inputs = models.batch([models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)])
    return model, inputs, everything()


def generate(model, inputs, plan, dtype=torch.float64, device="cuda", backend="auto", **options):
    """Tokens and logits of a patched greedy generation."""
    from test_patching import generate as greedy

    from emocircuits import patch

    model = model.to(device, dtype)
    moved = {name: x.to(device, dtype) if x.is_floating_point() else x.to(device) for name, x in inputs.items()}
    with patch(model, plan, backend=backend):
        tokens, logits = greedy(model, moved, **options)
    return tokens.cpu(), logits.cpu().double()


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "static, compiled": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("cache", CACHES)
def test_in_float64(case, cache):
    tokens, logits = generate(*case, device="cpu")
    on_gpu, gpu_logits = generate(*case, **CACHES[cache])
    assert torch.equal(on_gpu, tokens)
    torch.testing.assert_close(gpu_logits, logits, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("backend", ["fused", "composed"])
def test_in_float32(case, backend, cache):
    tokens, logits = generate(*case, device="cpu")
    on_gpu, gpu_logits = generate(*case, dtype=torch.float32, backend=backend, **CACHES[cache])
    assert torch.equal(on_gpu, tokens)
    torch.testing.assert_close(gpu_logits, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))


def test_in_bfloat16_the_prompt_is_read_as_precisely_as_without_a_plan(case):
    """Errors of the patched model on the GPU against those of the untouched one, both in bfloat16."""
    from test_patching import forward

    from emocircuits import Plan, patch

    model, inputs, plan = case
    real = inputs["attention_mask"].bool()

    def logits(dtype, device, chosen):
        model.to(device, dtype)
        moved = {name: x.to(device, dtype) if x.is_floating_point() else x.to(device) for name, x in inputs.items()}
        with torch.no_grad(), patch(model, chosen):
            return forward(model, moved).cpu().double()[real]

    exact = [logits(torch.float64, "cpu", chosen) for chosen in (plan, Plan([]))]
    # Rounded weights are what bfloat16 costs, whatever computes with them: both runs pay for them.
    low = [logits(torch.bfloat16, "cuda", chosen) for chosen in (plan, Plan([]))]
    errors = [float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in zip(low, exact, strict=True)]
    assert errors[0] <= 4 * errors[1], errors


def test_the_model_is_left_as_it_was(case):
    model, inputs, plan = case
    before = {name: x.clone() for name, x in model.state_dict().items()}
    generate(model, inputs, plan, device="cpu")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

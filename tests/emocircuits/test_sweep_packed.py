"""Packed matrix products of a sweep: as exact as torch's own, only where they fit, and gone afterwards."""

import pytest
import sweep_oracle as oracle
import torch
from test_sweep_engine import HEADS, A, B, model_of, pair
from torch import nn

from emocircuits.fingerprint import fingerprint
from emocircuits.sweep import Sweep, logit_diff, packed
from emocircuits.sweep.packed import Products

there = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="torch was built without oneDNN",
)


@pytest.fixture
def chosen(monkeypatch):
    """Packed products whatever this machine measures, for few rows too; counts them."""
    calls = []
    real = packed.product
    monkeypatch.setattr(packed, "faster", lambda *sizes: True)
    monkeypatch.setattr(packed, "FEW", 1)
    monkeypatch.setattr(packed, "product", lambda *given: calls.append(1) or real(*given))
    return calls


def both(kind):
    """The model of a family in float64, the same weights in float32, and prompts for each."""
    exact, clean, corrupt = pair(kind)
    small = model_of(kind.partition("-")[0], torch.float32)
    small.load_state_dict({k: v.float() for k, v in exact.state_dict().items()})
    exact.load_state_dict({k: v.double() for k, v in small.state_dict().items()})
    return exact, (clean, corrupt), small, pair(kind, torch.float32)[1:]


@there
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "llava", "llama-padded"])
def test_as_near_to_float64_as_plain_products(kind, chosen, monkeypatch):
    exact, inputs, small, inputs32 = both(kind)
    truth = Sweep(exact, *inputs, logit_diff(A, B), progress=False).heads(positions="each", layers=[1])
    assert not chosen
    found = Sweep(small, *inputs32, logit_diff(A, B), progress=False).heads(positions="each", layers=[1])
    assert chosen
    monkeypatch.setattr(packed, "faster", lambda *sizes: False)
    plain = Sweep(small, *inputs32, logit_diff(A, B), progress=False).heads(positions="each", layers=[1])
    error, expected = ((x.values - truth.values).abs().max() for x in (found, plain))
    assert error <= 2 * expected + 1e-6 * abs(truth.gap)
    difference = lambda logits: logits[0, -1, A] - logits[0, -1, B]  # noqa: E731
    loop = oracle.sweep(small, inputs32[1], inputs32[0], "heads", difference, "each", HEADS, layers=[1])
    assert (found.values - loop).abs().max() <= 2e-5 * (loop.max() - loop.min()).clamp(min=abs(plain.gap))


@there
def test_the_model_is_left_as_it_was(chosen):
    _, _, small, inputs = both("llama")
    before = fingerprint(small)
    Sweep(small, *inputs, logit_diff(A, B), progress=False).heads()
    assert chosen
    assert fingerprint(small) == before


def test_nothing_is_packed_where_it_does_not_pay(monkeypatch):
    _, _, small, inputs = both("llama")
    monkeypatch.setattr(packed, "faster", lambda *sizes: False)
    sweep = Sweep(small, *inputs, logit_diff(A, B), progress=False)
    assert not sweep.products.packed


def test_what_is_not_plain_float32_runs_as_it_is(chosen):
    for dtype in (torch.float64, torch.bfloat16):
        model, clean, corrupt = pair("llama", dtype)
        sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
        assert not sweep.products.packed
    assert not chosen


@there
def test_packed_weights_have_bounded_memory(chosen, monkeypatch):
    _, _, small, inputs = both("llama")
    monkeypatch.setattr(packed, "available", lambda: 1000)
    assert not Sweep(small, *inputs, logit_diff(A, B), progress=False).products.packed
    assert not chosen


@there
def test_a_linear_layer_that_somebody_wrapped_is_left_alone(chosen):
    _, _, small, _ = both("llama")
    layer = small.model.layers[0].mlp.up_proj
    real = layer.forward
    layer.forward = lambda x: real(x)
    try:
        with Products(_handle(small)) as products:
            assert products.packed
            assert layer.forward is not real
            small(torch.tensor([[1, 2, 3]]))
    finally:
        del layer.forward


@there
@pytest.mark.parametrize("bias", [False, True])
def test_a_product(bias):
    layer = nn.Linear(48, 96, bias=bias)
    x = torch.randn(1, 33, 48)
    with torch.inference_mode():
        found = packed.product(x, packed.pack(layer.weight), layer.bias)
        expected = layer.double()(x.double())
    assert (found - expected).abs().max() <= 1e-5


def _handle(model):
    from emocircuits.families import open_model

    return open_model(model)

"""The gated activation with neuron edits, and its gradient, against float64."""

import pytest
import torch
from on_device import DEVICE, HALF, dtypes, here, randn

import emokernels as emo

WIDTHS = here([11008, 12288, 4099, 96], [200])
ACTS = ["silu", "gelu", "gelu_pytorch_tanh", "relu", "quick_gelu"]


def edits(width, rows=1, count=None, seed=0):
    """One neuron in a hundred, of every kind of edit."""
    count = max(3, width // 100) if count is None else count
    index = torch.stack(
        [torch.randperm(width, generator=torch.Generator().manual_seed(seed + i))[:count] for i in range(rows)]
    )
    return emo.NeuronEdits(
        (index if rows > 1 else index[0]).to(DEVICE),
        scale=1 + randn(rows, 1, count, seed=1).abs(), shift=randn(1, 1, count, seed=2),
        replace=randn(rows, 1, count, seed=3), mask=randn(rows, 1, count, seed=4) > 1,
    )  # fmt: skip


def compare(gate, up, act, neurons):
    found = emo.gated_activation(gate, up, act=act, neurons=neurons, backend="fused")
    widened = None if neurons is None else emo.NeuronEdits(
        neurons.index, **{n: x.double() if x.is_floating_point() else x for n, x in neurons.fields()}
    )  # fmt: skip
    exact = emo.gated_activation(
        gate.double(), None if up is None else up.double(), act=act, neurons=widened, backend="reference"
    )
    rounding = torch.finfo(gate.dtype).eps
    assert found.dtype == gate.dtype
    # One rounding at the end; float32's transcendental functions are good to a few units in the last place.
    torch.testing.assert_close(found.double(), exact, rtol=max(rounding, 2e-6), atol=max(rounding * 1e-3, 1e-6))


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", here([1, 16, 1000], [3]))
def test_widths_and_tokens(tokens, width, dtype):
    gate, up = (randn(2, tokens, width, dtype=dtype, seed=seed) for seed in (0, 1))
    compare(gate, up, "silu", None)
    compare(gate, up, "silu", edits(width))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("act", ACTS)
def test_activations(act, gated):
    gate, up = (randn(2, 5, WIDTHS[-1], dtype=HALF, seed=seed) for seed in (0, 1))
    compare(gate, up if gated else None, act, edits(WIDTHS[-1], rows=2))


def test_halves_of_one_tensor_are_read_where_they_are():
    width = WIDTHS[0]
    gate, up = randn(2, 7, 2 * width, dtype=HALF).chunk(2, -1)
    compare(gate, up, "silu", edits(width))


@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
def test_gradients(edited):
    width = WIDTHS[0]
    gate, up = (randn(2, 9, width, dtype=HALF, seed=seed) for seed in (0, 1))
    weight = randn(2, 9, width, dtype=HALF, seed=5)
    neurons = edits(width) if edited else None

    def gradients(gate, up, neurons, backend):
        given = [x.detach().clone().requires_grad_() for x in (gate, up)]
        values = {}
        if neurons is not None:
            wanted = ("scale", "shift", "replace")
            values = {n: getattr(neurons, n).detach().to(gate.dtype).requires_grad_() for n in wanted}
            neurons = emo.NeuronEdits(neurons.index, **values, mask=neurons.mask)
        out = emo.gated_activation(*given, neurons=neurons, backend=backend)
        return torch.autograd.grad((out * weight.to(out.dtype)).sum(), [*given, *values.values()])

    found = gradients(gate, up, neurons, "fused")
    expected = gradients(gate.double(), up.double(), neurons, "reference")
    for got, exact in zip(found, expected, strict=True):
        tolerance = 4 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))

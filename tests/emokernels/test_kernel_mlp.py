"""The gated activation against an oracle in float64, and against what a model computes."""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import backends

import emokernels as emo

ORACLE = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
}


def edited(a, neurons):
    """Edits one entry at a time."""
    a = a.clone()
    batch, n, _ = a.shape
    for b in range(batch):
        for i in range(n):
            for m in range(neurons.index.shape[-1]):
                column = int(neurons.index[m] if neurons.index.dim() == 1 else neurons.index[b, m])

                def at(value, b=b, i=i, m=m):
                    return value[b if value.shape[0] > 1 else 0, i if value.shape[1] > 1 else 0, m]

                value = a[b, i, column]
                if neurons.scale is not None:
                    value = value * at(neurons.scale)
                if neurons.shift is not None:
                    value = value + at(neurons.shift)
                if neurons.mask is not None and bool(at(neurons.mask)):
                    value = at(neurons.replace)
                a[b, i, column] = value
    return a


def edits(shape, index):
    n = index.shape[-1]
    batch, positions = shape
    return emo.NeuronEdits(
        index,
        scale=torch.randn(batch, 1, n),
        shift=torch.randn(1, positions, n),
        replace=torch.randn(batch, positions, n),
        mask=torch.rand(batch, positions, n) < 0.4,
    )


@backends
@pytest.mark.parametrize("act", ORACLE)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "index", [None, torch.tensor([6, 0, 3]), torch.tensor([[1, 2], [7, 0]])], ids=["no", "1d", "2d"]
)
def test_values(backend, act, gated, index):
    torch.manual_seed(0)
    gate, up = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 8).double() if gated else None
    neurons = None if index is None else edits((2, 5), index)
    expected = ORACLE[act](gate) * (up if gated else 1)
    if neurons is not None:
        expected = edited(expected, neurons)
    before = gate.clone()
    out = emo.gated_activation(gate, up, act=act, neurons=neurons, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert torch.equal(gate, before)
    assert out.is_contiguous()


@backends
@pytest.mark.parametrize("act", ORACLE)
@pytest.mark.parametrize("per_row", [True, False])
def test_gradients(backend, act, per_row):
    torch.manual_seed(1)
    index = torch.tensor([[1, 2], [7, 0]]) if per_row else torch.tensor([6, 0])
    values = edits((2, 3), index)
    inputs = [torch.randn(2, 3, 8), torch.randn(2, 3, 8), values.scale, values.shift, values.replace]
    inputs = [x.double().requires_grad_() for x in inputs]

    def call(gate, up, scale, shift, replace):
        neurons = emo.NeuronEdits(index, scale, shift, replace, values.mask)
        return emo.gated_activation(gate, up, act=act, neurons=neurons, backend=backend)

    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradcheck(lambda gate: emo.gated_activation(gate, None, act=act, backend=backend), inputs[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_composed_rounds_like_the_model(dtype):
    gate, up = torch.randn(2, 5, 64).to(dtype), torch.randn(2, 5, 64).to(dtype)
    stock = F.silu(gate) * up
    assert torch.equal(emo.gated_activation(gate, up), stock)
    neurons = emo.NeuronEdits(torch.tensor([3, 60]), scale=torch.full((1, 1, 2), 1.6))
    out = emo.gated_activation(gate, up, neurons=neurons)
    kept = [i for i in range(64) if i not in (3, 60)]
    assert torch.equal(out[..., kept], stock[..., kept])
    assert torch.equal(out[..., [3, 60]], (stock[..., [3, 60]].float() * 1.6).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_rounds_once(dtype):
    gate, up = torch.randn(2, 5, 64).to(dtype), torch.randn(2, 5, 64).to(dtype)
    exact = (F.silu(gate.double()) * up.double()).to(dtype)
    out = emo.gated_activation(gate, up, backend="reference")
    assert (out != exact).float().mean() < 0.01


@backends
def test_strided_and_expanded_inputs(backend):
    wide = torch.randn(2, 5, 32).double()
    gate, up = wide[..., :16:2], wide[:1, :, 16:24].expand(2, -1, -1)
    neurons = emo.NeuronEdits(torch.tensor([7, 1]), scale=torch.randn(1, 1, 2))
    out = emo.gated_activation(gate, up, neurons=neurons, backend=backend)
    torch.testing.assert_close(out, edited(ORACLE["silu"](gate) * up, neurons), rtol=0, atol=1e-12)


@backends
def test_backward_ops_leave_out_what_is_not_wanted(backend):
    gate, up = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    neurons = edits((2, 3), torch.tensor([1, 2]))
    arguments = (gate, up, neurons.index, neurons.scale, neurons.shift, neurons.replace, neurons.mask, "silu")
    op = getattr(torch.ops.emokernels, f"gated_activation_{backend}_backward")
    everything = op(torch.ones_like(gate), *arguments)
    some = op(torch.ones_like(gate), *arguments, wanted=[False, True, True, False, False])
    assert [g.numel() == 0 for g in some] == [True, False, False, True, True]
    assert torch.equal(some[1], everything[1])
    assert torch.equal(some[2], everything[2])


def test_second_derivatives_are_refused():
    gate = torch.randn(1, 2, 4, requires_grad=True)
    first = torch.autograd.grad(emo.gated_activation(gate, None).sum(), gate, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()

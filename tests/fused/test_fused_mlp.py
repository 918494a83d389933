"""The fused gated activation, forward and backward, against float64 formulas written one edit at a time."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

import emokernels as emo
from emokernels.acts import ACTS
from emokernels.fused import mlp as fused
from emokernels.fused import mlp_backward as fused_backward
from emokernels.fused.launch import ARCHITECTURES, Config
from emokernels.fused.mlp_acts import NAMES
from emokernels.fused.mlp_rows import same_rows
from emokernels.mlp import _OPS

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
"""bfloat16 is silently wrong in the interpreter."""
ORACLE = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
}
ORACLE["gelu_new"] = ORACLE["gelu_pytorch_tanh"]
PLAIN = {**ACTS, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


def oracle(gate, up, act, neurons=None):
    """Float64, differentiable: one edited entry of one batch row after the other."""
    a = ORACLE[act](gate) * (1 if up is None else up)
    if neurons is None:
        return a
    before = a
    for b in range(a.shape[0]):
        index = neurons.index if neurons.index.dim() == 1 else neurons.index[b]
        for m, column in enumerate(index.tolist()):
            here = torch.zeros(a.shape, dtype=torch.bool, device=a.device)
            here[b, :, column] = True
            e = before
            if neurons.scale is not None:
                e = e * neurons.scale[..., m, None].double()
            if neurons.shift is not None:
                e = e + neurons.shift[..., m, None].double()
            if neurons.mask is not None:
                e = torch.where(neurons.mask[..., m, None], neurons.replace[..., m, None].double(), e)
            a = torch.where(here, e, a)
    return a


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def edits(shape, index, seed=0, fields=("scale", "shift", "replace"), spread=((0, 1), (1, 0), (1, 1)), by=1.0):
    """Edits with values per batch row and per position where `spread` says so, in memory that runs the other way."""
    (batch, positions), n = shape, index.shape[-1]
    values = {}
    for at, (name, (rows, columns)) in enumerate(zip(("scale", "shift", "replace"), spread, strict=True)):
        if name in fields:
            value = by * randn(n, positions if columns else 1, batch if rows else 1, seed=seed + at)
            values[name] = value.permute(2, 1, 0)
    if "replace" in values:
        values["mask"] = (randn(n, batch, seed=seed + 7) > 0.5).t()[:, None]
    return emo.NeuronEdits(index.to(DEVICE), **values)


def largest_error(got, expected):
    return float((got.double() - expected).abs().max())


def budget(plain, plain_oracle, expected, neurons):
    """Twice the error of a plain run in the same precision times the largest gain, and the rounding of the result.

    The latter is for what a plain run has exactly (ReLU) and for values that are shifted or replaced.
    """
    gain = 1.0 if neurons is None or neurons.scale is None else max(1.0, float(neurons.scale.abs().max()))
    return 2 * gain * largest_error(plain, plain_oracle) + torch.finfo(plain.dtype).eps / 2 * expected.abs().max()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 128 columns, so that narrow tensors have several and the last one is not full."""
    for module in (fused, fused_backward):
        monkeypatch.setattr(module, "_CONFIGS", {2: Config(1, 128, num_warps=4), 4: Config(1, 128, num_warps=4)})


SHARED = torch.tensor([299, 0, 127, 128, 256, 17])
PER_ROW = torch.tensor([[1, 298, 130], [255, 2, 129]])
MANY = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:140]
INDEX = {"no edits": None, "shared": SHARED, "per row": PER_ROW, "many": MANY}
CASES = [(act, kind) for act in ORACLE for kind in INDEX if act == "silu" or (act != "gelu_new" and kind != "many")]
CASES += [("gelu_new", "shared")]


@pytest.mark.parametrize(("act", "kind"), CASES)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_values(act, gated, dtype, kind):
    gate = 2 * randn(2, 3, 300, dtype=dtype)
    up = randn(2, 3, 300, dtype=dtype, seed=1) if gated else None
    neurons = None if INDEX[kind] is None else edits((2, 3), INDEX[kind])
    out = emo.gated_activation(gate, up, act=act, neurons=neurons, backend="fused")
    wide = gate.double(), None if up is None else up.double()
    expected, plain_oracle = oracle(*wide, act, neurons), oracle(*wide, act)
    plain = PLAIN[act](gate) * (1 if up is None else up)
    assert largest_error(out, expected) <= budget(plain, plain_oracle, expected, neurons)
    assert out.is_contiguous()
    assert out.dtype == dtype
    if dtype != torch.float32:
        seen = expected.abs() > 0.01  # below, float32 itself is seen: 1 + erf(x) cancels
        assert (out != expected.to(dtype))[seen].float().mean() < 0.01, "rounds once"


@pytest.mark.parametrize(("act", "kind"), CASES)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_gradients(act, gated, dtype, kind):
    gate, weight = 2 * randn(2, 3, 300, dtype=dtype), randn(2, 3, 300, dtype=dtype, seed=2)
    up = randn(2, 3, 300, dtype=dtype, seed=1) if gated else None
    neurons = None if INDEX[kind] is None else edits((2, 3), INDEX[kind])
    leaves = [t for t in (gate, up) if t is not None]
    values = [] if neurons is None else [neurons.scale, neurons.shift, neurons.replace]

    def gradients(function, inputs, values, seed):
        inputs, values = [[t.detach().clone().requires_grad_() for t in group] for group in (inputs, values)]
        changed = emo.NeuronEdits(neurons.index, *values, neurons.mask) if values else None
        out = function(inputs[0], inputs[1] if gated else None, changed)
        return torch.autograd.grad(out, [*inputs, *values], seed)

    wide = [t.double() for t in leaves]
    got = gradients(
        lambda g, u, n: emo.gated_activation(g, u, act=act, neurons=n, backend="fused"), leaves, values, weight
    )
    expected = gradients(lambda g, u, n: oracle(g, u, act, n), wide, [v.double() for v in values], weight.double())
    plain = gradients(lambda g, u, n: PLAIN[act](g) * (1 if u is None else u), leaves, [], weight)
    plain_oracle = gradients(lambda g, u, n: oracle(g, u, act), wide, [], weight.double())
    for grad, want, low, exact in zip(got, expected, plain, plain_oracle, strict=False):
        assert largest_error(grad, want) <= budget(low, exact, want, neurons)
    for grad, want, value in zip(got[len(leaves) :], expected[len(leaves) :], values, strict=True):
        assert grad.shape == value.shape
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", itertools.product((0, 1), repeat=2))
def test_gradients_of_values_are_summed_where_they_are_shared(spread):
    gate, up = randn(2, 3, 40), randn(2, 3, 40, seed=1)
    neurons = edits((2, 3), torch.tensor([3, 39]), spread=(spread,) * 3)
    values = [neurons.scale, neurons.shift, neurons.replace]

    def gradients(function, dtype):
        leaves = [v.to(dtype).requires_grad_() for v in values]
        out = function(gate.to(dtype), up.to(dtype), emo.NeuronEdits(neurons.index, *leaves, neurons.mask))
        return torch.autograd.grad(out.square().sum(), leaves)

    got = gradients(lambda g, u, n: emo.gated_activation(g, u, neurons=n, backend="fused"), torch.float32)
    for grad, want in zip(got, gradients(lambda g, u, n: oracle(g, u, "silu", n), torch.float64), strict=True):
        assert grad.shape == want.shape
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-5)


def test_only_wanted_gradients_are_computed(monkeypatch):
    asked = []
    real = fused_backward.gated_activation_backward_launch
    monkeypatch.setattr(
        fused_backward, "gated_activation_backward_launch", lambda *args: asked.append(args) or real(*args)
    )
    gate, up = randn(1, 2, 20), randn(1, 2, 20, seed=1)
    scale = torch.ones(1, 1, 1, device=DEVICE, requires_grad=True)
    neurons = emo.NeuronEdits(torch.tensor([4], device=DEVICE), scale=scale)
    emo.gated_activation(gate, up, neurons=neurons, backend="fused").sum().backward()
    expected = oracle(gate.double(), up.double(), "silu")[..., 4].sum()
    torch.testing.assert_close(scale.grad.double().sum(), expected, rtol=1e-5, atol=1e-5)
    _, _, _, dgate, dup, *_, dscale, dshift, dreplace, _ = asked.pop()
    assert dgate is dup is dshift is dreplace is None
    assert dscale is not None
    up.requires_grad_()
    emo.gated_activation(gate, up, backend="fused").sum().backward()
    assert asked.pop()[3] is None
    torch.testing.assert_close(up.grad.double(), ORACLE["silu"](gate.double()), rtol=1e-5, atol=1e-5)


def views():
    """Name, and a function from contiguous ``[2, 3, F]`` values to a view of other memory with these values."""

    def into(base, view):
        def build(values):
            memory = torch.full(base(values), 77.0, dtype=values.dtype, device=values.device)
            out = view(memory)
            out.copy_(values)
            return out

        return build

    return {
        "transposed": into(lambda v: (v.shape[1], v.shape[0], v.shape[2]), lambda m: m.transpose(0, 1)),
        "columns first": into(lambda v: (v.shape[2], v.shape[1], v.shape[0]), lambda m: m.permute(2, 1, 0)),
        "every second": into(lambda v: (2, 3, 2 * v.shape[2]), lambda m: m[..., ::2]),
        "an odd offset": into(lambda v: (2, 3, v.shape[2] + 5), lambda m: m[..., 3:-2]),
        "some rows": into(lambda v: (4, 6, v.shape[2]), lambda m: m[1:3, ::2]),
    }


@pytest.mark.parametrize("how", views())
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_strides_change_nothing(how, edited, dtype):
    gate, up, weight = (randn(2, 3, 150, dtype=dtype, seed=s) for s in range(3))
    neurons = edits((2, 3), torch.tensor([[149, 3], [128, 127]])) if edited else None
    inputs = [(t.clone().requires_grad_(), views()[how](t).requires_grad_()) for t in (gate, up)]
    outs = []
    for gate, up in zip(*inputs, strict=True):
        out = emo.gated_activation(gate, up, neurons=neurons, backend="fused")
        seed = weight if not outs else views()[how](weight)
        outs.append([out.detach(), *torch.autograd.grad(out, (gate, up), seed)])
    for plain, strided in zip(*outs, strict=True):
        assert torch.equal(plain, strided)
        assert strided.is_contiguous()


def test_halves_of_one_tensor_are_read_in_place(monkeypatch):
    """Phi-3 and others project gate and up at once: ``[..., 2F]``."""
    seen = []
    real = fused.gated_activation_launch
    monkeypatch.setattr(fused, "gated_activation_launch", lambda *args: seen.append(args) or real(*args))
    both = randn(2, 3, 80)
    gate, up = both.chunk(2, -1)
    neurons = edits((2, 3), torch.tensor([39, 0]))
    for changed in (neurons, None):
        out = emo.gated_activation(gate, up, neurons=changed, backend="fused")
        x, u, *_ = seen.pop()
        assert x.data_ptr() == gate.data_ptr()
        assert u.data_ptr() == up.data_ptr()
        again = emo.gated_activation(gate.clone(), up.clone(), neurons=changed, backend="fused")
        assert torch.equal(out, again)
        seen.clear()


def test_expanded_inputs_and_gradients():
    gate, up = randn(1, 3, 40).expand(2, 3, 40), randn(2, 1, 1, seed=1).expand(2, 3, 40)
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    out = emo.gated_activation(gate, up, backend="fused")
    torch.testing.assert_close(out.double(), oracle(gate.double(), up.double(), "silu"), rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(out.sum(), (gate, up))  # the gradient of a sum has strides 0 throughout
    want = torch.autograd.grad(oracle(gate.double(), up.double(), "silu").sum(), (gate, up))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (1,), (5, 7), (2, 3, 4, 5), (2, 1, 2, 3, 2, 6), (3, 1, 1)])
def test_any_rank_without_neurons(shape):
    """Also where dimensions do not merge, so that one launch does not do."""
    gate = randn(*shape[::-1]).permute(*range(len(shape))[::-1])
    up = randn(*shape, seed=1)
    for x, u in ((gate, up), (gate.clone(), up), (gate, None)):
        x = x.detach().requires_grad_()
        out = emo.gated_activation(x, u, backend="fused")
        expected = oracle(x.double(), None if u is None else u.double(), "silu")
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
        assert out.is_contiguous()
        got = torch.autograd.grad(out.sum(), x)[0]
        want = torch.autograd.grad(expected.sum(), x)[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_rows_merge_wherever_strides_allow():
    a = torch.empty(2, 3, 4, 5)
    ((one, absent),) = same_rows([a, None], edited=False)
    assert tuple(one.shape) == (1, 1, 120)
    assert absent is None
    ((one, half),) = same_rows([a, torch.empty(2, 3, 4, 10)[..., :5]], edited=False)
    assert tuple(one.shape) == tuple(half.shape) == (1, 24, 5)
    assert len(list(same_rows([a, torch.empty(5, 4, 3, 2).permute(3, 2, 1, 0)], edited=False))) == 2
    ((kept,),) = same_rows([a[0]], edited=True)
    assert kept.shape == a[0].shape


@pytest.mark.parametrize("rows", [(1, 5), (5, 1), (3, 3)], ids=str)
def test_more_rows_than_an_axis_of_the_grid_holds(monkeypatch, rows):
    monkeypatch.setattr(fused, "_ROWS", 4)  # two axes hold 2 * 3 or 3 * 3 rows
    gate, up, weight = (randn(*rows, 40, seed=s) for s in range(3))
    neurons = edits(rows, torch.stack([torch.tensor([3, 8]) + b for b in range(rows[0])]))
    leaves = gate.requires_grad_(), up.requires_grad_()
    out = emo.gated_activation(gate, up, neurons=neurons, backend="fused")
    expected = oracle(gate.double(), up.double(), "silu", neurons)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    got, want = torch.autograd.grad(out, leaves, weight), torch.autograd.grad(expected, leaves, weight.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 300)),
    layout=st.permutations([0, 1, 2]),
    step=st.integers(1, 2),
    half=st.booleans(),
    act=st.sampled_from(sorted(ORACLE)),
    gated=st.booleans(),
    fields=st.sets(st.sampled_from(["scale", "shift", "replace"])),
    n=st.integers(0, 40),
    per_row=st.booleans(),
    spread=st.tuples(*[st.tuples(st.integers(0, 1), st.integers(0, 1))] * 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_property_equals_float64(shape, layout, step, half, act, gated, fields, n, per_row, spread, seed):
    batch, positions, width = shape
    dtype = torch.float16 if half else torch.float32
    backwards = [layout.index(d) for d in range(3)]

    def tensor(seed):
        memory = randn(*(shape[d] * (step if d == layout[-1] else 1) for d in layout), dtype=dtype, seed=seed)
        return memory[..., ::step].permute(*backwards)

    gate, up, weight = tensor(seed), tensor(seed + 1) if gated else None, tensor(seed + 2)
    neurons = None
    n = min(n, width)
    if n:
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(width, generator=generator)[:n] for _ in range(batch)]
        neurons = edits((batch, positions), torch.stack(rows, 1).t() if per_row else rows[0], seed, fields, spread)
    inputs = [t.detach().requires_grad_() for t in (gate, up) if t is not None]
    out = emo.gated_activation(inputs[0], inputs[1] if gated else None, act=act, neurons=neurons, backend="fused")
    got = torch.autograd.grad(out, inputs, weight)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = oracle(wide[0], wide[1] if gated else None, act, neurons)
    want = torch.autograd.grad(expected, wide, weight.double())
    # One rounding of the result, and the arithmetic before it in float32: 8 ulp of the terms it consists of.
    ulp = 2.0**-11 if half else 2.0**-24
    size = 1 + float(expected.abs().max())
    assert largest_error(out, expected) <= (ulp + 16 * 2.0**-24) * size
    for a, b in zip(got, want, strict=True):
        assert largest_error(a, b) <= (ulp + 64 * 2.0**-24) * (1 + float(b.abs().max()))


def test_refills_are_seen():
    gate, up = randn(2, 3, 40), randn(2, 3, 40, seed=1)
    neurons = edits((2, 3), torch.tensor([[3, 8], [1, 0]]))

    def check():
        out = emo.gated_activation(gate, up, neurons=neurons, backend="fused")
        expected = oracle(gate.double(), up.double(), "silu", neurons)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)

    check()
    neurons.scale.mul_(3)
    neurons.shift.add_(1)
    neurons.mask.logical_not_()
    check()
    neurons.index.copy_(torch.tensor([[39, 8], [3, 2]]))
    check()


def test_nothing_leaks():
    """NaN where a value is not used, in an activation that is replaced, and neurons that do not exist."""
    gate, up = randn(1, 2, 20), randn(1, 2, 20, seed=1)
    index = torch.tensor([4, 7], device=DEVICE)
    replace = torch.tensor([[[math.nan, 2.5]]], device=DEVICE, requires_grad=True)
    mask = torch.tensor([[[False, True]]], device=DEVICE)
    broken = gate.clone()
    broken[..., 7] = math.nan
    broken.requires_grad_()
    out = emo.gated_activation(broken, up, neurons=emo.NeuronEdits(index, replace=replace, mask=mask), backend="fused")
    expected = oracle(gate.double(), up.double(), "silu")
    expected[..., 7] = 2.5
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    dgate, dreplace = torch.autograd.grad(out.sum(), (broken, replace))
    assert torch.equal(dreplace, torch.tensor([[[0.0, 2.0]]], device=DEVICE))
    kept = [i for i in range(20) if i != 7]
    assert torch.isfinite(dgate[..., kept]).all()


@pytest.mark.parametrize("widen", [20, 300])
def test_neurons_that_do_not_exist_are_written_nowhere(widen):
    """On a GPU nobody looks at the values of index."""
    gate, up = randn(1, 2, 20 + widen), randn(1, 2, 20 + widen, seed=1)
    out, expected = torch.full_like(gate, 77.0), torch.full_like(gate, 77.0)
    stray = torch.tensor([-1, 20, 21, 300, 1 << 40], device=DEVICE)
    scale = torch.full((1, 1, 5), 5.0, device=DEVICE)
    fused.gated_activation_launch(gate[..., :20], up[..., :20], out[..., :20], stray, scale).run()
    fused.gated_activation_launch(gate[..., :20], up[..., :20], expected[..., :20]).run()
    assert torch.equal(out, expected)
    assert (out[..., 20:] == 77.0).all()


@pytest.mark.parametrize("act", ORACLE)
def test_ends_of_the_range(act):
    ends = [0.0, -0.0, 1e-30, 20.0, -20.0, 90.0, -90.0, 1e4, -1e4, 1e30, -1e30, math.inf, math.nan]
    x = torch.tensor(ends, device=DEVICE)
    out = emo.gated_activation(x, None, act=act, backend="fused")
    torch.testing.assert_close(out.double(), ORACLE[act](x.double()), rtol=1e-5, atol=1e-5, equal_nan=True)
    leaf = x[:-4].requires_grad_()  # beyond, slopes are 0 * inf in places
    slope = torch.autograd.grad(emo.gated_activation(leaf, None, act=act, backend="fused").sum(), leaf)[0]
    wide = x[:-4].detach().double().requires_grad_()
    expected = torch.autograd.grad(PLAIN[act](wide).sum(), wide)[0]
    torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=1e-5)


def test_every_activation_is_there():
    assert set(NAMES) == set(ACTS) == set(ORACLE)


def test_same_bits_every_time():
    gate, up = randn(2, 3, 200).requires_grad_(), randn(2, 3, 200, seed=1).requires_grad_()
    neurons = edits((2, 3), torch.tensor([3, 199]), fields=("scale",))
    scale = neurons.scale.requires_grad_()

    def run():
        out = emo.gated_activation(gate, up, neurons=neurons, backend="fused")
        return torch.autograd.grad(out.square().sum(), (gate, up, scale))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_errors():
    gate = randn(2, 3, 8)
    index = torch.tensor([8], device=DEVICE)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"neurons\.index: expected numbers below the width 8, got 8"):
            emo.gated_activation(gate, gate, neurons=emo.NeuronEdits(index), backend="fused")
    with pytest.raises(ValueError, match=r"neurons\.index: expected shape"):
        rows = torch.tensor([[1], [2], [3]], device=DEVICE)
        emo.gated_activation(gate, gate, neurons=emo.NeuronEdits(rows), backend="fused")
    with pytest.raises(ValueError, match=r"neurons\.scale: expected shape"):
        wrong = emo.NeuronEdits(index - 1, scale=torch.ones(1, 4, 1, device=DEVICE))
        emo.gated_activation(gate, gate, neurons=wrong, backend="fused")
    with pytest.raises(NotImplementedError, match=r"backend: expected float32, bfloat16 or float16"):
        emo.gated_activation(gate.double(), None, backend="fused")
    leaf = gate.clone().requires_grad_()
    first = torch.autograd.grad(
        emo.gated_activation(leaf, None, backend="fused").square().sum(), leaf, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="second derivative"):
        first[0].sum().backward()


@pytest.mark.parametrize("how", ["contiguous", "transposed"])
def test_opcheck(how):
    gate, up = randn(2, 3, 8), randn(2, 3, 8, seed=1)
    if how == "transposed":
        gate, up = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (gate, up))
    neurons = edits((2, 3), torch.tensor([[1, 5], [0, 2]]))
    values = (neurons.scale, neurons.shift, neurons.replace)
    arguments = (gate, up, neurons.index, *values, neurons.mask, "silu")
    backward = torch.ops.emokernels.gated_activation_fused_backward.default
    for wanted in (None, [True] * 5, [False, True, True, False, False]):
        torch.library.opcheck(backward, (randn(2, 3, 8, seed=2), *arguments, wanted))
    for tensor in (gate, up, *values):
        tensor.requires_grad_()
    torch.library.opcheck(_OPS["fused"], arguments)
    torch.library.opcheck(_OPS["fused"], (gate, None, neurons.index[0], values[0][:1], None, None, None, "gelu"))
    torch.library.opcheck(_OPS["fused"], (gate, up, None, None, None, None, None, "relu"))


class TinyMlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = torch.nn.Linear(8, 32, bias=False), torch.nn.Linear(16, 8, bias=False)

    def forward(self, x, neurons):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(emo.gated_activation(gate, up, neurons=neurons, backend="fused"))


def test_compiles_whole_and_does_not_recompile_after_a_refill():
    torch.manual_seed(0)
    mlp = TinyMlp().to(DEVICE)
    neurons = edits((2, 3), torch.tensor([1, 15]))
    compilations = []

    def backend_of_dynamo(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend=backend_of_dynamo)
    for grad in (False, True):
        compilations.clear()
        with torch.set_grad_enabled(grad):
            for step in range(3):
                x = randn(2, 3, 8, seed=step)
                gate, up = F.linear(x.double(), mlp.gate_up.weight.double()).chunk(2, -1)
                expected = F.linear(oracle(gate, up, "silu", neurons), mlp.down.weight.double())
                torch.testing.assert_close(compiled(x, neurons).double(), expected, rtol=1e-5, atol=1e-5)
                neurons.scale.mul_(2)
                neurons.shift.add_(1)
                neurons.mask.logical_not_()
                neurons.index.add_(5).remainder_(16)
        assert len(compilations) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_a_graph_that_replays_sees_refills():
    gate, up = randn(2, 3, 40), randn(2, 3, 40, seed=1)
    neurons = edits((2, 3), torch.tensor([[3, 8], [1, 0]]))
    emo.gated_activation(gate, up, neurons=neurons, backend="fused")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = emo.gated_activation(gate, up, neurons=neurons, backend="fused")
    neurons.scale.mul_(3)
    neurons.index.copy_(torch.tensor([[39, 8], [3, 2]]))
    gate.mul_(2)
    graph.replay()
    expected = oracle(gate.double(), up.double(), "silu", neurons)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_audit_launches_are_built_from_meta_tensors(arch):
    launches = [*fused.audit_launches(arch), *fused_backward.audit_launches(arch)]
    assert len({name for name, *_ in launches}) == len(launches)
    for _, launch, _ in launches:
        tensors = [value for value in launch.args.values() if isinstance(value, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors)
        assert {*launch.args, *launch.meta} == set(launch.kernel.arg_names)

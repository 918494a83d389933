"""The activation kernel of csrc, run thread by thread on the CPU, against the float64 definition."""

import pytest
import torch
from emulated import emulated  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emokernels import reference
from emokernels.acts import ACTS
from emokernels.native import activate, library

pytestmark = pytest.mark.usefixtures("emulated")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def inputs(shape, dtype, gated=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate = (2 * torch.randn(shape, generator=generator)).to(dtype)
    return gate, torch.randn(shape, generator=generator).to(dtype) if gated else None


def edits(batch, positions, index, seed=0, shared=False):
    """scale, shift, replace, mask; with NaN in `replace` where the mask does not choose it."""
    generator = torch.Generator().manual_seed(seed)
    n = index.shape[-1]
    rows, columns = (1, 1) if shared else (batch, positions)
    mask = torch.rand(rows, positions, n, generator=generator) < 0.4
    replace = torch.randn(rows, positions, n, generator=generator).masked_fill(~mask, torch.nan)
    scale = 1 + torch.randn(rows, columns, n, generator=generator)
    return scale, torch.randn(1, columns, n, generator=generator), replace, mask


def assert_correct(got, gate, up, *rest):
    expected = reference.activate(gate.double(), None if up is None else up.double(), *rest)
    assert got.dtype == gate.dtype
    assert got.is_contiguous()
    tolerance = TOLERANCE[gate.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


NO_EDITS = (None,) * 5


@every_dtype
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(dtype, act, gated):
    gate, up = inputs((2, 3, 72), dtype, gated)
    gate[0, 0, :6] = torch.tensor([0.0, -0.0, 30.0, -30.0, 100.0, -100.0]).to(dtype)
    assert_correct(activate(gate, up, *NO_EDITS, act), gate, up, *NO_EDITS, act)


@pytest.mark.parametrize("act", ACTS)
def test_what_is_not_finite(act):
    gate = torch.tensor([[[torch.nan, torch.inf, 0.0, 1.0]]])
    got = activate(gate, None, *NO_EDITS, act).flatten()
    assert torch.equal(got[:3].nan_to_num(nan=7.0, posinf=8.0), torch.tensor([7.0, 8.0, 0.0]))
    assert torch.isfinite(got[3])


@every_dtype
@pytest.mark.parametrize("width", [1, 7, 128, 1500])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per row"])
def test_edits(dtype, width, shared):
    gate, up = inputs((2, 3, width), dtype)
    n = min(width, 9)
    index = torch.stack([torch.randperm(width)[:n] for _ in range(2)])
    index = index[0] if shared else index
    rest = (index, *edits(2, 3, index, shared=shared), "silu")
    assert_correct(activate(gate, up, *rest), gate, up, *rest)


@pytest.mark.parametrize("fields", ["scale", "shift", "replace", "nothing"])
def test_each_kind_of_edit(fields):
    gate, up = inputs((2, 3, 40), torch.float32)
    index = torch.tensor([0, 39, 17])
    scale, shift, replace, mask = edits(2, 3, index)
    chosen = {
        "scale": (scale, None, None, None),
        "shift": (None, shift, None, None),
        "replace": (None, None, replace, mask),
        "nothing": (None,) * 4,
    }[fields]
    rest = (index, *chosen, "silu")
    assert_correct(activate(gate, up, *rest), gate, up, *rest)


def test_every_neuron_and_more_edits_than_threads():
    gate, up = inputs((1, 2, 700), torch.float16)
    index = torch.randperm(700)
    rest = (index, *edits(1, 2, index), "gelu")
    assert_correct(activate(gate, up, *rest), gate, up, *rest)


@every_dtype
@pytest.mark.parametrize("how", ["halves", "offset", "only up offset", "transposed", "expanded"])
def test_strides(dtype, how):
    wide, _ = inputs((2, 4, 160), dtype)
    gate, up = {
        "halves": lambda: wide.chunk(2, -1),
        "offset": lambda: (wide[..., 1:73], wide[..., 80:152]),
        "only up offset": lambda: (wide[..., :72], wide[..., 81:153]),
        "transposed": lambda: (wide.transpose(0, 1), wide.transpose(0, 1) * 2),
        "expanded": lambda: (wide[:1].expand(2, -1, -1), wide),
    }[how]()
    index = torch.tensor([0, 71])
    rest = (index, *edits(*gate.shape[:2], index), "silu")
    before = gate.clone()
    assert_correct(activate(gate, up, *rest), gate, up, *rest)
    assert torch.equal(gate, before)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 2, 8)])
def test_other_ranks(shape):
    gate, up = inputs(shape, torch.float32)
    assert_correct(activate(gate, up, *NO_EDITS, "relu"), gate, up, *NO_EDITS, "relu")


def test_several_rows_per_block():
    gate, up = inputs((3, 2750, 8), torch.float16)  # enough blocks for the binding to take four rows in each
    index = torch.tensor([[1], [2], [3]])
    rest = (index, *edits(3, 2750, index), "silu")
    assert_correct(activate(gate, up, *rest), gate, up, *rest)
    room = torch.full((gate.numel() + 64,), 7.0, dtype=gate.dtype)
    out = room[: gate.numel()].view(gate.shape)
    library.ops().gated_activation(gate, up, *rest[:-1], 0, out)
    assert torch.equal(out, activate(gate, up, *rest))
    assert (room[gate.numel() :] == 7.0).all(), "written past the end"


def test_values_of_other_types():
    gate, up = inputs((2, 3, 40), torch.bfloat16)
    index = torch.tensor([[3, 5]])
    scale, shift, replace, mask = edits(2, 3, index)
    wide = (index, scale.double(), shift.half(), replace.double(), mask, "silu")
    assert_correct(activate(gate, up, *wide), gate, up, *wide)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_problems(data):
    draw = data.draw
    batch, positions, width = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 300))
    gate, up = inputs(
        (batch, positions, width), draw(st.sampled_from(DTYPES)), draw(st.booleans()), draw(st.integers(0, 9))
    )
    n = draw(st.integers(1, min(width, 40)))
    index = torch.stack([torch.randperm(width)[:n] for _ in range(batch)])
    if draw(st.booleans()):
        index = index[0]
    rest = (index, *edits(batch, positions, index, shared=draw(st.booleans())), draw(st.sampled_from(list(ACTS))))
    assert_correct(activate(gate, up, *rest), gate, up, *rest)

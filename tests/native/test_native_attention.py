"""The decode kernels of csrc, run thread by thread on the CPU, against the float64 definition."""

import math

import pytest
import torch
from emulated import emulated  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_problems import FIELDS, LAYOUTS, MASKS, assert_correct, problem

from emokernels.native import attend, library
from emokernels.native import attention as native_attention
from emokernels.native.attention import run
from emokernels.native.splits import MAX_SPLITS, plan_splits

pytestmark = pytest.mark.usefixtures("emulated")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("dim", [8, 40, 64, 96, 128, 200, 256])
@pytest.mark.parametrize("fields", [(), FIELDS], ids=["plain", "routed"])
def test_head_dimensions(dtype, dim, fields):
    made = problem(dim=dim, dtype=dtype, fields=fields)
    assert_correct(run(made, 2), made)


@every_dtype
@pytest.mark.parametrize(("heads", "key_heads", "n"), [(1, 1, 1), (4, 4, 2), (7, 1, 1), (8, 1, 3), (14, 2, 5)])
@pytest.mark.parametrize("fields", [(), ("gain",)], ids=["plain", "gain"])
def test_grouped_heads_and_queries(dtype, heads, key_heads, n, fields):
    made = problem(batch=2, heads=heads, key_heads=key_heads, n=n, keys=83, dtype=dtype, fields=fields, rows=2)
    assert_correct(run(made, 2), made)


@every_dtype
@pytest.mark.parametrize("splits", [1, 2, 7, MAX_SPLITS])
@pytest.mark.parametrize("keys", [1, 15, 64, 65, 300])
def test_splits(dtype, splits, keys):
    made = problem(heads=2, key_heads=1, keys=keys, dtype=dtype, fields=FIELDS)
    assert_correct(run(made, splits), made)


@every_dtype
@pytest.mark.parametrize("splits", [33, 70])
def test_many_splits_with_keys_in_all(dtype, splits):
    made = problem(heads=1, key_heads=1, keys=64 * splits - 5, dtype=dtype, fields=FIELDS)
    assert_correct(run(made, splits), made)


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [48, 128])
def test_strides(dtype, layout, dim):
    made = problem(batch=2, dim=dim, dtype=dtype, layout=layout, fields=("bias", "gain"))
    assert_correct(run(made, 3), made)


@every_dtype
@pytest.mark.parametrize("fields", [(name,) for name in FIELDS], ids="+".join)
def test_each_table(dtype, fields):
    made = problem(batch=2, n=2, dtype=dtype, fields=fields, rows=2)
    assert_correct(run(made, 2), made)


@every_dtype
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("fields", [(), FIELDS], ids=["plain", "routed"])
def test_masks(dtype, mask, fields):
    made = problem(batch=2, n=2, dtype=dtype, fields=fields, mask=mask, causal=False)
    assert_correct(run(made, 2), made)


@every_dtype
@pytest.mark.parametrize(
    "extra",
    [{"window": 5}, {"window": 40}, {"window": 500}, {"softcap": 1.5}, {"scale": 0.4}, {"causal": False}],
    ids=str,
)
def test_numbers(dtype, extra):
    made = problem(n=4, keys=130, dtype=dtype, fields=("bias", "gain"), **extra)
    got = run(made, 3)
    assert_correct(got, made)


@every_dtype
@pytest.mark.parametrize("extra", [{}, {"causal": False}, {"window": 9}], ids=str)
def test_lengths_of_a_static_cache(dtype, extra):
    made = problem(batch=4, n=3, keys=150, dtype=dtype, fields=FIELDS, lengths=[150, 64, 1, 0], **extra)
    assert_correct(run(made, 4), made)


@every_dtype
def test_what_is_hidden_may_be_anything(dtype):
    """Keys past the length are never read; logits under a mask may be NaN."""
    made = problem(batch=2, n=2, keys=90, dtype=dtype, fields=FIELDS, lengths=[50, 50])
    expected = run(made, 3)
    k, v = made.k.clone(), made.v.clone()
    k[:, :, 50:], v[:, :, 50:] = torch.nan, torch.nan
    got = run(made._replace(k=k, v=v), 3)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    mask = (torch.arange(90) < 50).expand(2, 1, 2, 90)
    masked = made._replace(lengths=None, causal=False, mask=mask)
    expected = run(masked, 3)
    k[:, :, :50] = made.k[:, :, :50]
    got = run(masked._replace(k=k), 3)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every_dtype
def test_a_knocked_out_route_equals_a_mask(dtype):
    made = problem(keys=90, dtype=dtype, fields=("bias", "gain"))
    made.bias.zero_()
    made.gain.fill_(1.0)
    made.bias[..., 2] = -torch.inf
    bare = made._replace(bias=None, gain=None, mask=(made.roles != 2)[:, None, None], causal=False)
    for a, b in zip(run(made, 2), run(bare, 2), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    made.bias.fill_(-torch.inf)
    z, lse = run(made, 2)
    assert (z == 0).all()
    assert (lse == -torch.inf).all()


def test_a_boost_never_revives_a_masked_key():
    made = problem(keys=40, fields=("bias",), mask="bool")
    made.bias.fill_(1e4)
    z, lse = run(made, 2)
    assert (z == 0).all()  # the mask hides every key of the only row
    assert (lse == -torch.inf).all()


def test_out_of_range_roles_read_no_foreign_memory():
    made = problem(keys=40, fields=FIELDS)
    wild = made._replace(roles=torch.full_like(made.roles, 255), query_roles=torch.full_like(made.query_roles, 200))
    plain = made._replace(bias=None, factor=None, magnitude=None, gain=None)
    torch.testing.assert_close(run(wild, 2), run(plain, 2), rtol=1e-6, atol=1e-6)


@every_dtype
def test_results_do_not_vary(dtype):
    made = problem(batch=2, keys=200, dtype=dtype, fields=FIELDS)
    first = run(made, 5)
    for other in (run(made, 5), run(made._replace(k=made.k.clone(), v=made.v.clone()), 5)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@every_dtype
@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_else_is_written(dtype, splits):
    """Outputs and workspace lie in larger buffers whose rest keeps its values; q, k, v and tables are left alone."""
    made = problem(batch=2, heads=6, n=3, dim=40, dtype=dtype, fields=FIELDS)
    before = [x.clone() for x in made[:10] if x is not None]
    shapes = {
        "z": (2, 3, 6, 40),
        "lse": (2, 6, 3),
        "partial_z": (splits, 2, 6, 3, 40),
        "partial_lse": (splits, 2, 6, 3),
    }
    rooms, views = {}, {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        rooms[name] = torch.full((size + 128,), 7.0, dtype=dtype if name == "z" else torch.float32)
        views[name] = rooms[name][64 : 64 + size].view(shape)
    views["z"] = views["z"].transpose(1, 2)
    library.ops().decode_attention(**made._asdict(), splits=splits, **views)
    assert_correct((views["z"], views["lse"]), made)
    for name, room in rooms.items():
        assert (room[:64] == 7.0).all(), name
        assert (room[-64:] == 7.0).all(), name
    assert all(torch.equal(a, b) for a, b in zip(before, (x for x in made[:10] if x is not None), strict=True))


def test_tables_of_other_types_and_strides():
    made = problem(batch=2, fields=FIELDS, rows=2)
    wide = made._replace(
        bias=made.bias.double(),
        factor=made.factor.transpose(2, 3).contiguous().transpose(2, 3),
        gain=made.gain[:1].expand(2, -1, -1, -1),
        roles=torch.stack([made.roles, made.roles], 2)[..., 0],
        mask=torch.zeros(2, 1, 1, 70, dtype=torch.float64),
    )
    same = made._replace(gain=made.gain[:1])
    torch.testing.assert_close(run(wide, 2), run(same, 2), rtol=0, atol=0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_problems(data):
    draw = data.draw
    key_heads = draw(st.integers(1, 3))
    batch = draw(st.integers(1, 3))
    n = draw(st.integers(1, 8))
    keys = draw(st.integers(n, 140))
    made = problem(
        batch=batch,
        heads=key_heads * draw(st.sampled_from([1, 2, 5, 9])),
        key_heads=key_heads,
        n=n,
        keys=keys,
        dim=8 * draw(st.integers(1, 18)),
        dtype=draw(st.sampled_from(DTYPES)),
        fields=draw(st.sampled_from([(), FIELDS, ("bias",), ("abs", "gain")])),
        rows=draw(st.sampled_from([1, batch])),
        mask=draw(st.sampled_from([None, *MASKS])),
        lengths=draw(st.none() | st.lists(st.integers(0, keys), min_size=batch, max_size=batch)),
        window=draw(st.none() | st.integers(1, 150)),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 99)),
    )
    assert_correct(run(made, draw(st.sampled_from([1, 2, 3, 9]))), made)


def test_attend_plans_splits_itself(monkeypatch):
    seen = []
    monkeypatch.setattr(native_attention, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(native_attention, "run", lambda made, splits: seen.append(splits) or run(made, splits))
    made = problem(heads=4, key_heads=2, keys=600, fields=("gain",))
    _, lse = attend(made, need_lse=False)
    assert lse is None
    assert_correct(attend(made), made)
    assert seen == [plan_splits(1, 2, 2, 600, 64, 132, half_precision=False)] * 2
    assert seen[0] > 1


@pytest.mark.parametrize("keys", [1, 127, 128, 1024, 16384, 131072])
@pytest.mark.parametrize("batch", [1, 8, 256])
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("dim", [24, 64, 128, 256])
def test_plan_of_splits(keys, batch, rows, dim):
    for half in (True, False):
        splits = plan_splits(batch, 8, rows, keys, dim, 132, half_precision=half)
        assert 1 <= splits <= MAX_SPLITS
        assert splits == 1 or keys / splits >= 128

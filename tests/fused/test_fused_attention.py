"""The fused prefill against the float64 oracle: every way a key block can meet a tile of rows."""

import functools

import pytest
import torch
from attention_oracle import oracle_of
from device import DEVICE
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from problems import LLAVA, VIDEO, qkv, random_routes, roles_of

import emokernels as emo
from emokernels.attention import make_problem, run
from emokernels.fused import attention as fused
from emokernels.fused import schedule

FIELDS = [("bias",), ("scale",), ("abs",), ("gain",), ("bias", "gain"), ("bias", "scale", "abs", "gain")]
PROMPT = [1] * 5 + [2] * 45 + [3] * 25 + [4] + [5] * 4
"""With tiles of 16: blocks of one role, of two, and a diagonal in both."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that a short prompt has every kind of block."""
    table = {key: {dim: (fused.Tiles(16, 16, 4, 2),) for dim in (64, 128, 256)} for key in fused.CONFIGS}
    monkeypatch.setattr(fused, "CONFIGS", table)
    monkeypatch.setattr(fused.decode, "suits", lambda problem: False)


def call(q, k, v, routes=None, dtype=torch.float32, **options):
    """The fused kernel on low-precision copies of float64 inputs."""
    low = [x.to(dtype).to(DEVICE) for x in (q, k, v)]
    if routes is not None:
        routes = emo.Routes(**{name: t.float().to(DEVICE) for name, t in routes.tables()})
    moved = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    out = emo.attention(*low, routes=routes, backend="fused", **moved)
    return emo.AttentionOutput(out.z.cpu(), out.lse.cpu())


@functools.cache
def error_of_plain(dtype, dim, **options):
    """The largest error of attention without routes in plain torch, computed in `dtype`, on a problem of this kind."""
    q, k, v = (x.to(dtype) for x in qkv(n=64, dim=dim, key_heads=4, seed=7))
    exact, _ = oracle_of(q.double(), k.double(), v.double(), **options)
    s = (q @ k.mT).float() * dim**-0.5
    if options.get("softcap"):
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    s = s.masked_fill(~torch.ones(64, 64, dtype=torch.bool).tril(), -torch.inf)
    got = torch.softmax(s, -1).to(dtype) @ v
    return (got.double() - exact).abs().max().item()


def check(q, k, v, routes=None, dtype=torch.float32, **options):
    out = call(q, k, v, routes, dtype, **options)
    low = [x.to(dtype).double() for x in (q, k, v)]
    z, lse = oracle_of(*low, routes, **options)
    budget = 2 * error_of_plain(dtype, q.shape[3], softcap=options.get("softcap"))
    # Boosts make outputs, and with them their rounding errors, larger.
    size = z.abs().max().item() / max(1e-9, v.abs().max().item())
    gain = 1.0 if routes is None or routes.gain is None else routes.gain.abs().max().item()
    logits = 1.0
    if routes is not None:
        logits = 1.0 if routes.scale is None else routes.scale.abs().max().item()
        logits += 0.0 if routes.abs is None else routes.abs.abs().max().item()
    budget *= max(1.0, gain, size) * max(1.0, logits)
    assert torch.isfinite(out.z).all()
    assert (out.z.double() - z).abs().max().item() <= budget
    assert torch.equal(out.lse == -torch.inf, lse == -torch.inf)
    largest = max([1.0, *lse[lse > -99].abs().flatten().tolist()])
    torch.testing.assert_close(out.lse.double(), lse, rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 20}, {"scale": -0.4}], ids=str)
def test_plain(dtype, options):
    check(*qkv(n=70, dim=16), dtype=dtype if not options else torch.float32, **options)


@pytest.mark.parametrize("fields", FIELDS, ids="+".join)
def test_routes(fields):
    check(*qkv(n=80, dim=16), random_routes(fields=fields), roles=roles_of(PROMPT))


def test_routes_in_half_precision():
    check(*qkv(n=80, dim=32), random_routes(fields=("bias", "gain")), torch.float16, roles=roles_of(PROMPT))


@pytest.mark.parametrize("extra", [{"softcap": 2.0}, {"window": 30}, {"softcap": 30.0, "window": 40}], ids=str)
def test_routes_with_softcap_and_window(extra):
    check(*qkv(n=80, dim=16), random_routes(), roles=roles_of(PROMPT), **extra)


@pytest.mark.parametrize("role", range(6))
def test_one_role_stands_out(role):
    """Two sets of roles: one role and the rest; head 3 changes nothing and is one set."""
    routes = emo.Routes.identity(4, fields=("bias", "gain"), dtype=torch.float64)
    routes.gain[:, :2, 3, role] = 2.5
    routes.bias[:, 1:3, 3, role] = -1.5
    check(*qkv(n=80, dim=16), routes, roles=roles_of([0] * 3 + PROMPT[3:]))


@pytest.mark.parametrize("role", [0, 2, 3])
@pytest.mark.parametrize("rows", ["all rows", "rows of one role"])
def test_knockouts(role, rows):
    routes = emo.Routes.identity(4, fields=("bias", "gain"), dtype=torch.float64)
    dst = slice(None) if rows == "all rows" else 3
    routes.bias[:, :2, dst, role] = -torch.inf
    routes.gain[:, 1:3, dst, role] = 0
    routes.gain[:, 3, dst, role] = -2.0
    check(*qkv(n=80, dim=16), routes, roles=roles_of([0] * 3 + PROMPT[3:]))


def test_extreme_values_do_not_drown_what_was_summed_before():
    routes = emo.Routes.identity(4, fields=("bias", "gain"), dtype=torch.float64)
    routes.gain[:, 0, :, 2], routes.gain[:, 1, :, 2] = 1e-9, 1e8
    routes.bias[:, 2, :, 2], routes.bias[:, 3, :, 2] = 80.0, -80.0
    check(*qkv(n=80, dim=16), routes, roles=roles_of(PROMPT))


@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 1), (7, 1), (8, 1), (14, 2)])
def test_grouped_query_heads(heads, key_heads):
    routes = random_routes(heads, fields=("bias", "gain"))
    check(*qkv(heads=heads, key_heads=key_heads, n=36, dim=16), routes, roles=roles_of(PROMPT[30:66]))


@pytest.mark.parametrize("dim", [16, 24, 40, 64])
def test_head_dimensions(dim):
    check(*qkv(n=20, keys=40, dim=dim), random_routes(), roles=roles_of([*LLAVA, *VIDEO]))


@pytest.mark.parametrize(("dim", "scale"), [(200, None), (256, -0.1)])
def test_wide_heads_are_multiplied_in_parts(dim, scale):
    """In float32 more than 128 numbers a row do not fit into registers, and are read again for every block of keys."""
    check(
        *qkv(heads=4, key_heads=2, n=20, keys=40, dim=dim),
        random_routes(),
        roles=roles_of([*LLAVA, *VIDEO]),
        scale=scale,
    )


@pytest.mark.parametrize("form", ["bool", "per head", "additive", "lowest", "values"])
def test_masks(form):
    q, k, v = qkv(batch=2, n=40, keys=80, dim=16)
    mask = torch.rand(2, 4 if form == "per head" else 1, 40, 80, generator=torch.Generator().manual_seed(0)) < 0.8
    mask[0, :, 3] = False
    mask[:, :, :, :20] = False  # a block that nobody sees
    mask[:, :, :, 32:48] = True  # and one that everybody sees
    if form in ("additive", "values"):
        values = torch.randn(mask.shape) if form == "values" else torch.zeros(mask.shape)
        mask = torch.where(mask, values, -torch.inf)
    elif form == "lowest":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    roles = roles_of(PROMPT, PROMPT[3:] + PROMPT[:3])
    check(q, k, v, random_routes(rows=2), roles=roles, mask=mask)
    check(q, k, v, mask=mask, causal=False)


def test_left_padding_is_block_sparse():
    """Blocks of padding are not in the schedule, blocks after it are whole."""
    keep = torch.ones(2, 80, dtype=torch.bool)
    keep[1, :35] = False
    mask = keep[:, None, None, :] & torch.ones(80, 80, dtype=torch.bool).tril()
    q, k, v = qkv(batch=2, n=80, dim=16)
    roles = roles_of(PROMPT, [0] * 35 + PROMPT[35:])
    routes = random_routes(rows=2, fields=("bias", "gain"))
    check(q, k, v, routes, roles=roles, mask=mask, causal=False)
    problem = make_problem(
        q.float().to(DEVICE), k.float().to(DEVICE), v.float().to(DEVICE), roles.to(DEVICE), None,
        emo.Routes(gain=routes.gain.float().to(DEVICE)), mask.to(DEVICE), False, None, None, None,
    )  # fmt: skip
    launches, made = schedule.schedule_launches(problem, 16, 16)
    for launch in launches:
        launch.run()
    ends = made.ends.cpu()[1, 0, 4].tolist()  # padded row, last tile; the set of all roles comes last
    start, whole, part = ends[2 * schedule.ALL - 1], ends[2 * schedule.ALL], ends[2 * schedule.ALL + 1]
    assert made.order.cpu()[1, 0, 4, start:whole].tolist() == [3]
    assert made.order.cpu()[1, 0, 4, whole:part].tolist() == [2, 4]


def test_strides():
    q, k, v = qkv(batch=2, n=36, dim=16)
    roles, routes = roles_of(PROMPT[30:66]), random_routes(rows=2, fields=("bias", "gain"))
    expected = call(q, k, v, routes, roles=roles)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    sliced = [torch.cat([x, x], 3)[..., : x.shape[3]] for x in (q, k, v)]
    last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for inputs in (transposed, sliced, last):
        got = call(*inputs, routes, roles=roles)
        assert torch.equal(got.z, expected.z)
        assert torch.equal(got.lse, expected.lse)
    expanded = [q, k[:1, :1].expand(2, 2, -1, -1), v[:1].expand(2, -1, -1, -1)]
    check(*expanded, routes, roles=roles)


class TestHeadEdits:
    @pytest.mark.parametrize("shared", [True, False])
    def test_against_the_formula(self, shared):
        q, k, v = qkv(batch=2, n=36, dim=16)
        generator = torch.Generator().manual_seed(3)
        b, n = (1, 1) if shared else (2, 36)
        scale, shift = torch.randn(b, n, 4, generator=generator), torch.randn(b, n, 4, 16, generator=generator)
        replace = torch.randn(b, n, 4, 16, generator=generator)
        mask = torch.rand(b, n, 4, generator=generator) < 0.5
        replace[~mask] = torch.nan  # never read
        edits = emo.HeadEdits(*(x.to(DEVICE) for x in (scale, shift, replace, mask)))
        got = call(q, k, v, heads=edits).z
        z, _ = oracle_of(q, k, v)
        z = z * scale.double().transpose(1, 2).unsqueeze(-1) + shift.double().transpose(1, 2)
        where = mask.transpose(1, 2).unsqueeze(-1)
        z = torch.where(where, replace.double().nan_to_num().transpose(1, 2), z)
        torch.testing.assert_close(got.double(), z, rtol=0, atol=4e-6)

    def test_a_patched_tile_copies_instead_of_computing(self):
        """Keys of NaN show whether they were read."""
        q, k, v = (x.float().to(DEVICE) for x in qkv(n=32, dim=16))
        replace = torch.randn(1, 32, 4, 16, device=DEVICE)
        mask = torch.zeros(1, 32, 4, dtype=torch.bool, device=DEVICE)
        mask[:, :16, 1] = True
        q[:, 1, :16] = torch.nan
        edits = emo.HeadEdits(replace=replace, mask=mask)
        with torch.no_grad():
            z, lse = run(q, k, v, heads=edits, backend="fused", need_lse=False)
        assert lse is None
        assert torch.equal(z[0, 1, :16], replace[0, :16, 1])
        assert torch.isfinite(z).all()


@pytest.mark.parametrize("case", ["bare", "everything"])
def test_opcheck_of_the_op_with_edits(case):
    q, k, v = (x.float().to(DEVICE) for x in qkv(batch=2, n=6, keys=8, dim=16))
    if case == "everything":
        q, k = q.transpose(1, 2).contiguous().transpose(1, 2), k[:1].expand(2, -1, -1, -1)
    roles = roles_of([1, 2, 2, 3, 3, 4, 5, 5]).to(DEVICE)
    routes = None
    if case == "everything":
        tables = random_routes(fields=("bias", "gain")).tables()
        routes = emo.Routes(**{name: t.float().to(DEVICE) for name, t in tables})
    problem = make_problem(q, k, v, roles, None, routes, None, True, None, None, None)
    edits = (None,) * 6
    if case == "everything":
        replace = torch.randn(2, 6, 4, 16, device=DEVICE)
        edits = (torch.randn(1, 1, 4, device=DEVICE), None, replace, replace[..., 0] > 0, None, None)
    torch.library.opcheck(torch.ops.emokernels.attention_fused_edited, (*problem, *edits))


class TestSchedule:
    def problem(self, roles):
        q, k, v = (x.float().to(DEVICE) for x in qkv(n=80, dim=16))
        routes = emo.Routes.identity(4, fields=("gain",), device=DEVICE)
        return make_problem(q, k, v, roles, None, routes, None, True, None, None, None)

    def test_is_made_once_for_all_layers_and_again_after_a_write(self):
        roles = roles_of(PROMPT).to(DEVICE)
        first = schedule.schedule_of(self.problem(roles), 16, 16)
        assert schedule.schedule_of(self.problem(roles), 16, 16) is first
        roles[0, 40:] = 1
        again = schedule.schedule_of(self.problem(roles), 16, 16)
        assert again is not first
        assert not torch.equal(again.order, first.order)

    def test_lists_every_visible_block_once_in_every_set(self):
        roles = roles_of(PROMPT).to(DEVICE)
        made = schedule.schedule_of(self.problem(roles), 16, 16)
        order, ends = made.order.cpu()[0, 0], made.ends.cpu()[0, 0]
        for tile in range(5):
            for number in range(schedule.SETS):
                members = {number} if number < 6 else set(range(6)) - ({number - 6} if number < 12 else set())
                start = int(ends[tile, 2 * number - 1]) if number else 0
                whole = order[tile, start : ends[tile, 2 * number]].tolist()
                part = order[tile, ends[tile, 2 * number] : ends[tile, 2 * number + 1]].tolist()
                for block in range(5):
                    found = set(PROMPT[16 * block : 16 * block + 16])
                    visible, full = block <= tile, block < tile
                    is_whole = full and found <= members
                    assert (block in whole) == is_whole
                    assert (block in part) == (visible and bool(found & members) and not is_whole)
                assert len(whole) + len(part) == len(set(whole) | set(part))


# The interpreter is too slow for shrinking.
@example(  # no row sees a key
    share=1, n=4, more=2, batch=1, runs=[(1, 14)], padded=10, window=None, softcap=3.0, dim=20, seed=74
)
@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    share=st.sampled_from([1, 2, 7]), n=st.integers(1, 40), more=st.integers(0, 30), batch=st.integers(1, 2),
    runs=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 25)), min_size=1, max_size=5),
    padded=st.integers(0, 20), window=st.sampled_from([None, 17]), softcap=st.sampled_from([None, 3.0]),
    dim=st.sampled_from([16, 20]), seed=st.integers(0, 99),
)  # fmt: skip
def test_anything(share, n, more, batch, runs, padded, window, softcap, dim, seed):
    keys = n + more
    roles = ([role for role, length in runs for _ in range(length)] * keys)[:keys]
    q, k, v = qkv(batch=batch, heads=2 * share, key_heads=2, n=n, keys=keys, dim=dim, seed=seed)
    mask = torch.ones(batch, 1, n, keys, dtype=torch.bool)
    mask[-1, :, :, :padded] = False
    routes = random_routes(2 * share, rows=batch, seed=seed)
    options = {"mask": mask if padded else None, "window": window, "softcap": softcap}
    check(q, k, v, routes, roles=roles_of(roles), **options)

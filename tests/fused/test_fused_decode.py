"""Decode steps against the float64 oracle: slices of the keys, their merge, lengths on the device, packed heads."""

import math

import pytest
import torch
from decode_problems import (
    budget,
    compare,
    exact,
    low_edits,
    low_routes,
    moved,
    problem_of,
    random_edits,
    random_roles,
    step,
)
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import random_routes, roles_of

import emokernels as emo
from emokernels.fused import decode
from emokernels.fused.launch import Config

FIELDS = [("bias",), ("scale",), ("abs",), ("gain",), ("bias", "scale", "abs", "gain")]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16 keys and slices of one block or more, so that short caches have several of both."""
    tiles = tuple(Config(rows, 16, 4, 2) for rows in (16, 32))
    monkeypatch.setattr(decode, "CONFIGS", {key: dict.fromkeys((64, 128, 256), tiles) for key in decode.CONFIGS})
    cut(monkeypatch, 3)


def cut(monkeypatch, splits):
    monkeypatch.setattr(decode, "splits_for", lambda tiles, keys, sms: splits)


def check(q, k, v, routes=None, heads=None, need_lse=True, **options):
    problem = problem_of(q, k, v, routes, **options)
    got = decode.attend(problem, low_edits(heads), need_lse)
    assert got[0].stride() == got[0].transpose(1, 2).contiguous().transpose(1, 2).stride()
    assert (got[1] is not None) == need_lse
    expected = exact(q, k, v, routes, heads=heads, **options)
    largest = (
        1.0 if heads is None else 1 + max(x.nan_to_num().abs().max().item() for n, x in heads.fields() if n != "mask")
    )
    compare(got, expected, budget(q, k, v, routes, **options) * largest)
    return got


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_query(monkeypatch, dtype, splits):
    cut(monkeypatch, splits)
    check(*step(dtype))
    check(*step(dtype), random_routes(rows=2), roles=random_roles(2, 44))


@pytest.mark.parametrize(
    ("heads", "key_heads", "n"),
    [(2, 2, 1), (2, 2, 4), (4, 2, 3), (7, 1, 1), (7, 1, 2), (8, 1, 1), (8, 1, 4), (6, 1, 2)],
)
def test_grouped_heads_share_a_tile(heads, key_heads, n):
    """Up to 8 x 4 rows: one tile of 16, or of 32."""
    q, k, v = step(heads=heads, key_heads=key_heads, n=n, batch=1, keys=40)
    check(q, k, v, random_routes(heads, fields=("bias", "gain")), roles=random_roles(1, 40))
    problem = problem_of(q, k, v)
    plan = decode.plan_of(problem, decode.Keys(problem.k, problem.v, 0, 40, False))
    assert plan.tiles == 1


def test_more_rows_than_a_tile_holds():
    check(*step(heads=14, key_heads=1, n=4, keys=40, batch=1), random_routes(14), roles=random_roles(1, 40))


@pytest.mark.parametrize("fields", FIELDS, ids="+".join)
def test_tables(fields):
    check(*step(n=2), random_routes(fields=fields), roles=random_roles(2, 44))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tables_and_roles_of_every_row(dtype):
    """And roles of the queries that are not those of the last keys."""
    routes = random_routes(rows=2)
    check(*step(dtype, n=3), routes, roles=random_roles(2, 44), query_roles=random_roles(2, 3, seed=5))
    check(*step(dtype, n=3), routes, roles=random_roles(1, 44), query_roles=random_roles(2, 3, seed=5))
    check(*step(dtype, n=3), routes, roles=random_roles(2, 44), query_roles=random_roles(1, 3, seed=5))


@pytest.mark.parametrize("dim", [16, 24, 80, 256])
def test_head_dimensions(dim):
    check(*step(dim=dim, keys=40), random_routes(), roles=random_roles(1, 40))


@pytest.mark.parametrize(
    "options",
    [{"causal": False}, {"window": 20}, {"window": 1}, {"softcap": 2.0}, {"scale": -0.4}, {"scale": 0.0}],
    ids=str,
)
def test_options(options):
    check(*step(), **options)
    check(*step(n=3, batch=1), random_routes(), roles=random_roles(1, 44), **options)


class TestLengths:
    @pytest.mark.parametrize("splits", [1, 3])
    @pytest.mark.parametrize("n", [1, 3])
    def test_of_every_row(self, monkeypatch, splits, n):
        """From an empty row to a full one. What the cache holds beyond a row's length is never read."""
        cut(monkeypatch, splits)
        lengths = torch.tensor([0, 2, 16, 41, 44], dtype=torch.int32)
        q, k, v = step(batch=5, n=n)
        for b, length in enumerate(lengths.tolist()):
            k[b, :, length:], v[b, :, length:] = torch.nan, torch.nan
        roles, routes = random_roles(5, 44), random_routes(rows=5)
        clean = [x.nan_to_num() for x in (q, k, v)]
        allowed = budget(*clean, routes)
        for tables, query_roles in ((None, None), (routes, random_roles(5, n, seed=2))):
            options = {} if tables is None else {"roles": roles, "query_roles": query_roles}
            problem = problem_of(q, k, v, tables, lengths=lengths, **options)
            compare(decode.attend(problem), exact(q, k, v, tables, lengths=lengths, **options), allowed)

    def test_shared_by_all_rows(self):
        check(*step(n=2), lengths=torch.tensor([33], dtype=torch.int32))

    @pytest.mark.parametrize("extra", [{"window": 10}, {"causal": False}, {"softcap": 3.0}], ids=str)
    def test_with(self, extra):
        """Window and diagonal follow the length, not the size of the cache."""
        check(*step(n=2), lengths=torch.tensor([37, 5], dtype=torch.int32), **extra)

    def test_with_a_mask(self):
        mask = torch.rand(2, 1, 1, 44, generator=torch.Generator().manual_seed(0)) < 0.7
        check(*step(), lengths=torch.tensor([40, 20], dtype=torch.int32), mask=mask)

    def test_launches_follow_what_is_written_in_place(self):
        """What a CUDA graph replays: the same launches, after lengths, roles, tables, masks and keys have changed."""
        q, k, v = step()
        routes, mask = low_routes(random_routes(rows=2)), torch.ones(2, 1, 1, 44, dtype=torch.bool)
        lengths = torch.tensor([30, 41], dtype=torch.int32)
        options = {"roles": random_roles(2, 44), "query_roles": random_roles(2, 1), "mask": mask, "lengths": lengths}
        problem = problem_of(q, k, v, routes, **options)
        problem = problem._replace(**{f: getattr(problem, f).clone() for f in ("q", "k", "roles", "mask", "lengths")})
        keys = decode.Keys(problem.k, problem.v, 0, 44, False)
        launches, z, lse = decode.launches_of(problem, [keys], None, True)
        for number in range(3):
            if number:
                generator = torch.Generator().manual_seed(number)
                q, k = torch.randn(q.shape, generator=generator), torch.randn(k.shape, generator=generator)
                options["lengths"] = torch.tensor([20 + 12 * number, 0], dtype=torch.int32)
                options["roles"], routes = random_roles(2, 44, number), random_routes(rows=2, seed=number)
                options["mask"] = torch.rand(2, 1, 1, 44, generator=generator) < 0.5
                for field in ("roles", "mask", "lengths"):
                    getattr(problem, field).copy_(options[field])
                problem.q.copy_(q)
                problem.k.copy_(k)
                for field, table in zip(("bias", "factor", "magnitude", "gain"), routes.tables(), strict=True):
                    getattr(problem, field).copy_(table[1])
            for launch in launches:
                launch.run()
            wide = emo.Routes(**{name: table.double().cpu() for name, table in routes.tables()})
            compare((z, lse), exact(q, k, v, wide, **options), budget(q, k, v, wide))


class TestMasks:
    @pytest.mark.parametrize("form", ["bool", "per head", "additive", "lowest", "values"])
    @pytest.mark.parametrize("n", [1, 3])
    def test_forms(self, form, n):
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(2, 4 if form == "per head" else 1, n, 44, generator=generator) < 0.7
        mask[0, :, 0] = False  # a query without keys
        mask[1, :, :, 16:48] = False
        if form in ("additive", "values"):
            values = torch.randn(mask.shape, generator=generator) if form == "values" else torch.zeros(mask.shape)
            mask = torch.where(mask, values, -torch.inf)
        elif form == "lowest":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        check(*step(n=n), mask=mask, causal=n == 1)

    def test_with_routes(self):
        mask = torch.rand(2, 1, 1, 44, generator=torch.Generator().manual_seed(0)) < 0.7
        check(*step(), random_routes(rows=2), roles=random_roles(2, 44), mask=mask)
        check(*step(n=2), random_routes(), roles=random_roles(1, 44), mask=mask.expand(2, 4, 2, 44))

    @pytest.mark.parametrize("shape", [(1, 1, 1, 44), (2, 1, 1, 44), (1, 4, 1, 44), (1, 1, 3, 44)])
    def test_expanded(self, shape):
        """One row of mask for all positions, heads or batch rows."""
        mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7).expand(2, 4, 3, 44)
        check(*step(n=3), mask=mask)

    def test_transposed(self):
        mask = (torch.rand(44, 3, 1, 2, generator=torch.Generator().manual_seed(0)) < 0.7).permute(3, 2, 1, 0)
        check(*step(n=3), mask=mask)


class TestKnockouts:
    def routes(self, field, value, dst=slice(None), heads=slice(None)):
        routes = emo.Routes.identity(4, fields=(field,), dtype=torch.float64)
        getattr(routes, field)[:, heads, dst, 2] = value
        return routes

    @pytest.mark.parametrize("field", ["bias", "gain"])
    @pytest.mark.parametrize("heads", [slice(None), slice(0, 1), slice(0, 2)], ids=str)
    def test_of_a_role(self, field, heads):
        roles = roles_of([2] * 14 + [1] * 12 + [2] * 6 + [3] * 12)
        check(*step(), self.routes(field, -torch.inf if field == "bias" else 0.0, heads=heads), roles=roles)

    def test_keys_hidden_from_every_row_are_not_read(self):
        """At the ends of a slice; keys of NaN would show."""
        roles = roles_of([2] * 12 + [1] * 10 + [3] * 6 + [2] * 16)
        q, k, v = step()
        expected = exact(q, k, v, self.routes("bias", -torch.inf), roles=roles)
        for x in (k, v):
            x[:, :, :12], x[:, :, 28:] = torch.nan, torch.nan
        problem = problem_of(q, k, v, self.routes("bias", -torch.inf), roles=roles)
        compare(decode.attend(problem), expected, 1e-6)

    def test_of_everything(self):
        z, lse = check(*step(), self.routes("bias", -torch.inf), roles=roles_of([2] * 44))
        assert not z.any()
        assert (lse == -torch.inf).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("gain", [-2.0, 1e5, 1e-4, 3e-7])
    def test_gains(self, dtype, gain):
        """In half precision weights times 1e5 are infinite, times 3e-7 zero: the kernel counts in units of the row."""
        roles, routes = roles_of([2] * 44), self.routes("gain", gain)
        routes.gain.fill_(gain)
        q, k, v = step(torch.float32)
        q, k, v = [x.to(dtype) for x in (q, k, v / max(1.0, gain))]
        got = decode.attend(problem_of(q, k, v, routes, roles=roles))[0]
        one = exact(q, k, v)[0]
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (got.cpu().double() - gain * one).abs().max() <= abs(gain) * budget(q, k, v) + smallest


class TestHeadEdits:
    @pytest.mark.parametrize("splits", [1, 3])
    @pytest.mark.parametrize("shared", [True, False])
    def test_against_the_formula(self, monkeypatch, splits, shared):
        cut(monkeypatch, splits)
        edits = random_edits(*((1, 1) if shared else (2, 3)), 4, 16)
        check(*step(n=3), heads=edits)
        check(*step(n=3), heads=edits, need_lse=False)
        check(*step(n=3), random_routes(), heads=edits, roles=random_roles(2, 44))

    @pytest.mark.parametrize("field", ["scale", "shift"])
    def test_alone(self, field):
        edits = random_edits(1, 1, 4, 16)
        check(*step(), heads=emo.HeadEdits(**{field: getattr(edits, field)}))

    def test_values_in_other_layouts(self):
        edits = random_edits(2, 1, 4, 16)
        check(*step(), heads=emo.HeadEdits(
            scale=edits.scale[:1].expand(2, 1, 4), shift=edits.shift.transpose(2, 3).contiguous().transpose(2, 3),
            replace=torch.cat([edits.replace, edits.replace], 3)[..., :16], mask=edits.mask,
        ))  # fmt: skip

    @pytest.mark.parametrize("splits", [1, 3])
    def test_a_patched_head_is_not_computed(self, monkeypatch, splits):
        """Its slices say that they saw no key; head 1 is patched only in row 0. With lse every head is computed."""
        cut(monkeypatch, splits)
        q, k, v = step(heads=4, key_heads=4)
        mask = torch.zeros(2, 1, 4, dtype=torch.bool)
        mask[:, :, 2], mask[0, :, 1] = True, True
        edits = emo.HeadEdits(replace=torch.full((1, 1, 4, 16), 2.0), mask=mask)
        problem = problem_of(q, k, v)
        keys = decode.Keys(problem.k, problem.v, 0, 44, False)
        launches, z, _ = decode.launches_of(problem, [keys], low_edits(edits), False)
        for launch in launches:
            launch.run()
        compare((z, None), exact(q, k, v, heads=edits), 1e-5)
        if splits > 1:
            idle = launches[0].args["lse"] == -torch.inf
            assert torch.equal(idle.all(0), mask.transpose(1, 2).to(DEVICE))
        compare(decode.attend(problem, low_edits(edits), True), exact(q, k, v, heads=edits), 1e-5)


class TestMemory:
    def test_strides(self):
        q, k, v = step(n=2)
        roles, routes = random_roles(2, 44), random_routes(rows=2)
        expected = decode.attend(problem_of(q, k, v, routes, roles=roles))
        transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        sliced = [torch.cat([x, x], 3)[..., : x.shape[3]] for x in (q, k, v)]
        last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
        every_other = [torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2] for x in (q, k, v)]
        for inputs in (transposed, sliced, last, every_other):
            got = decode.attend(problem_of(*inputs, routes, roles=torch.stack([roles, roles], 2)[..., 0]))
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
        expanded = [q, k[:, :1].expand(2, 2, -1, -1), v[:, :1].expand(2, 2, -1, -1)]
        check(*expanded, routes, roles=roles)

    def test_tables_in_other_layouts(self):
        routes = random_routes(rows=2)
        shared = emo.Routes(**{name: t[:1].expand(2, -1, -1, -1) for name, t in routes.tables()})
        turned = emo.Routes(**{name: t.mT.contiguous().mT for name, t in routes.tables()})
        for tables in (shared, turned):
            problem = problem_of(*step(), roles=random_roles(2, 44))
            given = dict(tables.tables())
            problem = problem._replace(**{
                field: moved(given[name])
                for field, name in (("bias", "bias"), ("factor", "scale"), ("magnitude", "abs"), ("gain", "gain"))
            })  # fmt: skip
            roles = random_roles(2, 44)
            compare(decode.attend(problem), exact(*step(), tables, roles=roles), budget(*step(), tables))

    @pytest.mark.parametrize("n", [1, 3])
    @pytest.mark.parametrize("per_row", [True, False])
    def test_keys_that_all_rows_share(self, n, per_row):
        """Stride 0 over the batch: queries of all rows share tiles, with roles, masks and lengths of their own."""
        q, k, v = step(batch=5, n=n)
        k, v = k[:1].expand(5, -1, -1, -1), v[:1].expand(5, -1, -1, -1)
        rows = 5 if per_row else 1
        options = {
            "roles": random_roles(rows, 44), "query_roles": random_roles(rows, n, seed=4),
            "mask": torch.rand(rows, 1, n, 44, generator=torch.Generator().manual_seed(0)) < 0.8,
            "lengths": torch.tensor([44, 3, 0, 22, 37][:rows], dtype=torch.int32),
        }  # fmt: skip
        check(q, k, v)
        check(q, k, v, random_routes(rows=rows), **options)
        problem = problem_of(q, k, v, random_routes(rows=rows), **options)
        launches, _, _ = decode.launches_of(
            problem,
            [decode.Keys(problem.k, problem.v, 0, 44, decode.same_for_all_rows(problem.k, problem.v))],
            None,
            True,
        )
        assert launches[0].meta["PACKED"]
        tile = launches[0].meta["BLOCK_M"]
        assert launches[0].grid == (2 * -(-5 * 2 * n // tile), 3)


class TestPlan:
    def problem(self, batch=2, n=1, heads=32, key_heads=8, keys=4096, window=0, device="meta"):
        q = torch.empty(batch, heads, n, 128, dtype=torch.bfloat16, device=device)
        k = torch.empty(batch, key_heads, keys, 128, dtype=torch.bfloat16, device=device)
        lengths = torch.empty(batch, dtype=torch.int32, device=device)
        return decode.Problem(q, k, k, *[None] * 7, lengths, True, 0.1, window, 0.0)

    def test_suits_few_queries(self):
        assert decode.suits(self.problem())
        assert decode.suits(self.problem(n=8))
        assert decode.suits(self.problem(n=16))
        assert not decode.suits(self.problem(n=32))
        assert decode.suits(self.problem(n=64, heads=8))

    def test_slices_depend_on_shapes_alone(self, monkeypatch):
        """Everything here lies on the meta device, where there is nothing to read."""
        monkeypatch.undo()
        problem = self.problem()
        keys = decode.Keys(problem.k, problem.v, 0, 4096, False)
        launches, z, lse = decode.launches_of(problem, [keys], None, True)
        assert launches[0].grid == (16, decode.splits_for(16, 4096, decode.ASSUMED_SMS))
        assert z.is_meta
        assert lse.is_meta

    def test_enough_slices_to_fill_the_gpu(self):
        splits = decode_splits
        assert splits(tiles=8, keys=4096, sms=132) * 8 >= 132
        assert splits(tiles=1024, keys=4096, sms=132) == 1
        assert splits(tiles=1, keys=100, sms=132) == 1
        assert splits(tiles=1, keys=1 << 20, sms=132) <= decode.MAX_SPLITS
        for tiles in (1, 3, 17, 100, 200, 264):
            for keys in (1, 128, 1000, 16384):
                chosen = splits(tiles, keys, 132)
                assert 1 <= chosen <= max(1, keys // decode.KEYS_PER_SPLIT)

    def test_a_window_needs_fewer_slices(self, monkeypatch):
        monkeypatch.undo()
        plans = [
            decode.plan_of(p, decode.Keys(p.k, p.v, 0, 4096, False)).splits
            for p in (self.problem(batch=1), self.problem(batch=1, window=512))
        ]
        assert plans[0] > plans[1] == 4

    @pytest.mark.parametrize("n", [1, 4])
    def test_every_configuration_has_room_for_its_rows(self, monkeypatch, n):
        monkeypatch.undo()
        for (arch, size), table in decode.CONFIGS.items():
            for dim in table:
                for rows in (1, 16, 17, 40, 1000):
                    config = decode.config_for(arch, size, dim, rows)
                    assert config.block_m >= min(rows, table[dim][-1].block_m)
                    # Keys and values of the stages in flight fit into 99 KiB, what the smallest of these GPUs have.
                    assert 2 * config.block_n * dim * size * (config.num_stages - 1) <= 99 << 10


decode_splits = decode.splits_for


def test_a_row_alone_equals_the_row_in_a_batch():
    q, k, v = step(batch=3)
    routes, roles, lengths = random_routes(rows=3), random_roles(3, 44), torch.tensor([44, 9, 33], dtype=torch.int32)
    together = decode.attend(problem_of(q, k, v, routes, roles=roles, query_roles=roles[:, -1:], lengths=lengths))
    for b in range(3):
        row = slice(b, b + 1)
        own = emo.Routes(**{name: table[row] for name, table in routes.tables()})
        alone = decode.attend(problem_of(
            q[row], k[row], v[row], own, roles=roles[row], query_roles=roles[row, -1:], lengths=lengths[row]
        ))  # fmt: skip
        assert torch.equal(alone[0][0], together[0][b])
        assert torch.equal(alone[1][0], together[1][b])


def test_slices_change_nothing_but_rounding(monkeypatch):
    q, k, v = step(n=2)
    options = {"roles": random_roles(2, 44), "lengths": torch.tensor([44, 31], dtype=torch.int32)}
    found = []
    for splits in (1, 2, 40):
        cut(monkeypatch, splits)
        found.append(decode.attend(problem_of(q, k, v, random_routes(), query_roles=random_roles(2, 2), **options)))
    for z, lse in found[1:]:
        torch.testing.assert_close(z, found[0][0], rtol=0, atol=3e-6)
        torch.testing.assert_close(lse, found[0][1], rtol=0, atol=3e-6)


def test_many_slices_are_merged_in_blocks():
    """More of them than the merge holds at a time; slices without keys hold anything, and so does a row of them."""
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(40, 1, 2, 2, 256, generator=generator)
    stat = 3 * torch.randn(40, 1, 2, 2, generator=generator)
    stat[::3], stat[:, 0, 1, 1] = -torch.inf, -torch.inf
    weight = torch.softmax(stat.double() * math.log(2), 0).nan_to_num()
    z = (weight.unsqueeze(-1) * part.double()).sum(0)
    lse = torch.logsumexp(stat.double() * math.log(2), 0)
    part[stat == -torch.inf] = torch.nan
    got = torch.empty(1, 2, 2, 256, device=DEVICE), torch.empty(1, 2, 2, device=DEVICE)
    launch = decode.merge_launch(part.to(DEVICE), stat.to(DEVICE), None, *got)
    assert launch.meta["BLOCK"] < 40
    launch.run()
    compare(got, (z, lse), 2e-6)


@settings(max_examples=12, deadline=None)
@given(
    share=st.sampled_from([1, 2, 7, 8]), n=st.integers(1, 4), keys=st.integers(1, 44), batch=st.integers(1, 3),
    splits=st.sampled_from([1, 2, 4, 9]), fields=st.sampled_from([None, *FIELDS]), role_rows=st.booleans(),
    lengths=st.booleans(), window=st.sampled_from([None, 5, 30]), softcap=st.sampled_from([None, 3.0]),
    mask=st.sampled_from([None, "bool", "add"]), edits=st.booleans(), same_keys=st.booleans(),
    dim=st.sampled_from([16, 20]), seed=st.integers(0, 99),
)  # fmt: skip
def test_anything(
    share, n, keys, batch, splits, fields, role_rows, lengths, window, softcap, mask, edits, same_keys, dim, seed
):
    generator = torch.Generator().manual_seed(seed)
    heads = 2 * share
    q, k, v = step(batch=batch, heads=heads, key_heads=2, n=n, keys=max(n, keys), dim=dim, seed=seed)
    keys = k.shape[2]
    if same_keys:
        k, v = k[:1].expand(batch, -1, -1, -1), v[:1].expand(batch, -1, -1, -1)
    options = {"window": window, "softcap": softcap}
    if fields is not None:
        rows = batch if role_rows else 1
        options |= {"roles": random_roles(rows, keys, seed), "query_roles": random_roles(rows, n, seed + 1)}
    if lengths:
        options["lengths"] = torch.randint(0, keys + 1, (batch,), generator=generator, dtype=torch.int32)
    if mask is not None:
        options["mask"] = torch.rand(batch, 1, n, keys, generator=generator) < 0.8
        if mask == "add":
            options["mask"] = torch.where(
                options["mask"], torch.randn(batch, 1, n, keys, generator=generator), -torch.inf
            )
    routes = None if fields is None else random_routes(heads, rows=batch, fields=fields, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, splits)
        check(q, k, v, routes, heads=random_edits(batch, n, heads, dim) if edits else None, **options)

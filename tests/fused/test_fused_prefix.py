"""A prefix whose keys all rows share, against the float64 oracle on [prefix; rest], and how often it is read."""

import pytest
import torch
from decode_problems import (
    budget,
    compare,
    exact,
    low_edits,
    moved,
    problem_of,
    random_edits,
    random_roles,
    step,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import random_routes

from emokernels.fused import decode, prefix
from emokernels.fused.launch import Config


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16 keys, and several slices of prefix and rest."""
    tiles = tuple(Config(rows, 16, 4, 2) for rows in (16, 32))
    monkeypatch.setattr(decode, "CONFIGS", {key: dict.fromkeys((64, 128, 256), tiles) for key in decode.CONFIGS})
    cut(monkeypatch, 2)


def cut(monkeypatch, splits):
    monkeypatch.setattr(decode, "splits_for", lambda tiles, keys, sms: splits)


def shared_prompt(length=37, rest=20, **sizes):
    """q, the prefix ``[1, Hkv, P, D]`` of keys and values, and what follows it row by row."""
    q, k, v = step(keys=length + rest, **sizes)
    return q, k[:1, :, :length], v[:1, :, :length], k[:, :, length:], v[:, :, length:]


def joined(q, prefix_k, prefix_v, k, v):
    batch = q.shape[0]
    pairs = ((prefix_k, k), (prefix_v, v))
    return q, *(torch.cat([first[:1].expand(batch, -1, -1, -1), rest], 2) for first, rest in pairs)


def attend(q, prefix_k, prefix_v, k, v, routes=None, heads=None, need_lse=True, **options):
    problem = problem_of(q, k, v, routes, columns=prefix_k.shape[2] + k.shape[2], **options)
    return prefix.attend(problem, moved(prefix_k), moved(prefix_v), low_edits(heads), need_lse)


def check(inputs, routes=None, heads=None, need_lse=True, **options):
    got = attend(*inputs, routes, heads, need_lse, **options)
    together = joined(*inputs)
    expected = exact(*together, routes, heads=heads, **options)
    largest = 1.0 if heads is None else 8.0
    compare(got, expected, budget(*together, routes, **options) * largest)
    return got


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefix_and_rest(monkeypatch, dtype, splits):
    cut(monkeypatch, splits)
    check(shared_prompt(dtype=dtype, batch=3))
    check(shared_prompt(dtype=dtype, batch=3), random_routes(rows=3), roles=random_roles(1, 57))


@pytest.mark.parametrize(("heads", "key_heads", "n"), [(2, 2, 1), (7, 1, 1), (8, 1, 3), (4, 2, 2), (2, 1, 4)])
def test_grouped_heads_and_several_queries(heads, key_heads, n):
    """The queries of a row sit behind the prefix: they see all of it, and the rest up to their diagonal."""
    inputs = shared_prompt(heads=heads, key_heads=key_heads, n=n)
    check(inputs, random_routes(heads, fields=("bias", "gain")), roles=random_roles(1, 57))


@pytest.mark.parametrize("rows", [1, 3])
def test_roles_tables_and_masks_of_every_row(rows):
    mask = torch.rand(rows, 1, 2, 57, generator=torch.Generator().manual_seed(0)) < 0.8
    options = {"roles": random_roles(rows, 57), "query_roles": random_roles(rows, 2, seed=2), "mask": mask}
    check(shared_prompt(batch=3, n=2), random_routes(rows=rows), **options)


@pytest.mark.parametrize("lengths", [[57], [57, 37, 20], [38, 0, 45]], ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_lengths_count_the_prefix(lengths, n):
    """A row that ends inside the prefix or before it; the cache behind a row's length is not read."""
    inputs = shared_prompt(batch=3, n=n)
    options = {"lengths": torch.tensor(lengths, dtype=torch.int32)}
    expected = exact(*joined(*inputs), **options)
    for b in range(3):
        there = max(0, lengths[b if len(lengths) > 1 else 0] - 37)
        inputs[3][b, :, there:], inputs[4][b, :, there:] = torch.nan, torch.nan
    compare(attend(*inputs, **options), expected, 2e-6)


@pytest.mark.parametrize(
    "options", [{"window": 30}, {"window": 8}, {"softcap": 2.0}, {"scale": -0.4}, {"causal": False}], ids=str
)
def test_options(options):
    """A window that reaches into the prefix, and one that does not."""
    check(shared_prompt(n=2), random_routes(fields=("scale", "gain")), roles=random_roles(1, 57), **options)


@pytest.mark.parametrize("need_lse", [True, False])
def test_head_edits(need_lse):
    check(shared_prompt(n=2), heads=random_edits(2, 2, 4, 16), need_lse=need_lse)


@pytest.mark.parametrize(("length", "rest"), [(1, 20), (37, 1), (37, 0), (0, 20)])
def test_sizes(length, rest):
    """One key of prefix, one key after it, none after it, and no prefix."""
    check(shared_prompt(length, rest), random_routes(), roles=random_roles(1, length + rest))


def test_more_rows_than_a_tile_holds():
    check(shared_prompt(batch=9, n=2, rest=4), random_routes(rows=9), roles=random_roles(1, 41))


class TestOneMemory:
    def test_a_prefix_expanded_over_the_batch(self):
        q, prefix_k, prefix_v, k, v = shared_prompt()
        expected = attend(q, prefix_k, prefix_v, k, v)
        got = attend(q, prefix_k.expand(2, -1, -1, -1), prefix_v.expand(2, -1, -1, -1), k, v)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])

    def test_strides(self):
        """A prefix cut out of a longer cache of another layout."""
        q, prefix_k, prefix_v, k, v = shared_prompt()
        expected = attend(q, prefix_k, prefix_v, k, v)
        first = [
            torch.cat([x, x], 2).transpose(1, 2).contiguous().transpose(1, 2)[:, :, :37] for x in (prefix_k, prefix_v)
        ]
        rest = [torch.cat([x, x], 3)[..., :16] for x in (k, v)]
        got = attend(q, *first, *rest)
        assert torch.equal(got[0], expected[0])

    def test_is_what_decode_does_with_joined_keys(self):
        inputs = shared_prompt()
        got, (q, k, v) = attend(*inputs), joined(*inputs)
        whole = decode.attend(problem_of(q, k, v))
        for one, other in zip(got, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6)

    def test_is_read_once_for_all_rows(self):
        """Programs over the prefix: slices for each key head and tile of rows, whatever the number of batch rows."""
        grids = {}
        for batch in (1, 2, 8, 16):
            q, prefix_k, prefix_v, k, v = shared_prompt(batch=batch, heads=4, key_heads=2)
            problem = problem_of(q, k, v)
            launches, _, _ = decode.launches_of(problem, prefix.runs_of(problem, prefix_k, prefix_v), None, True)
            over_prefix, over_rest, _ = launches
            assert over_prefix.args["k"].shape == (1, 2, 37, 16)
            assert over_prefix.meta["BLOCK_M"] >= batch * 2
            assert over_rest.grid == (2 * batch, 2)
            grids[batch] = over_prefix.grid
        assert set(grids.values()) == {(2, 2)}

    def test_that_is_not_one_is_refused(self):
        q, prefix_k, prefix_v, k, v = shared_prompt()
        with pytest.raises(
            ValueError, match=r"prefix_k: expected one memory for all batch rows.*Pass \[1, Hkv, P, D\]"
        ):
            attend(q, prefix_k.repeat(2, 1, 1, 1), prefix_v, k, v)
        with pytest.raises(
            ValueError, match=r"prefix_v: expected \[1\|B=2, Hkv=2, P, D=16\] torch.float32 like k, got"
        ):
            attend(q, prefix_k, prefix_v[:, :, 1:], k, v)
        with pytest.raises(ValueError, match="prefix_k: expected"):
            attend(q, prefix_k.half(), prefix_v, k, v)
        with pytest.raises(ValueError, match="prefix_k: expected"):
            attend(q, prefix_k[:, :1], prefix_v, k, v)


@settings(max_examples=10, deadline=None)
@given(
    share=st.sampled_from([1, 2, 7]), n=st.integers(1, 3), length=st.integers(1, 40), rest=st.integers(0, 20),
    batch=st.integers(1, 4), splits=st.sampled_from([1, 2, 5]), role_rows=st.booleans(), lengths=st.booleans(),
    window=st.sampled_from([None, 12]), masked=st.booleans(), edits=st.booleans(), dim=st.sampled_from([16, 20]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_anything(share, n, length, rest, batch, splits, role_rows, lengths, window, masked, edits, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    columns, heads, rows = max(n, length + rest), 2 * share, batch if role_rows else 1
    inputs = shared_prompt(length, columns - length, batch=batch, heads=heads, key_heads=2, n=n, dim=dim, seed=seed)
    options = {
        "roles": random_roles(rows, columns, seed), "query_roles": random_roles(rows, n, seed + 1), "window": window
    }  # fmt: skip
    if lengths:
        options["lengths"] = torch.randint(0, columns + 1, (batch,), generator=generator, dtype=torch.int32)
    if masked:
        options["mask"] = torch.rand(rows, 1, n, columns, generator=generator) < 0.8
    routes = random_routes(heads, rows=batch, fields=("bias", "gain"), seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, splits)
        check(inputs, routes, heads=random_edits(batch, n, heads, dim) if edits else None, **options)

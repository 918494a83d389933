"""What must hold whatever the numbers are."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import backends, force, random_routes

import emokernels as emo

settings.register_profile(
    "kernels", max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
properties = settings.get_profile("kernels")


@st.composite
def problems(draw, cached=False):
    """Shapes, role layouts as runs, and a seed."""
    share = draw(st.sampled_from([1, 2, 7]))
    key_heads = draw(st.integers(1, 2))
    n = draw(st.integers(1, 24))
    keys = n + (draw(st.integers(0, 12)) if cached else 0)
    batch = draw(st.integers(1, 3))
    runs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=6))
    roles = [role for role, length in runs for _ in range(length)]
    roles = (roles * keys)[:keys]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    heads = share * key_heads
    q = torch.randn(batch, heads, n, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, key_heads, keys, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, key_heads, keys, 8, generator=generator, dtype=torch.float64)
    return q, k, v, torch.tensor([roles], dtype=torch.uint8)


def same(a, b, tolerance=1e-11):
    torch.testing.assert_close(a.z, b.z, rtol=0, atol=tolerance)
    torch.testing.assert_close(a.lse, b.lse, rtol=0, atol=tolerance)


@backends
@pytest.mark.parametrize("engine", ["auto", "spans"])
class TestProperties:
    @properties
    @given(problem=problems(cached=True))
    def test_identity_tables_change_nothing(self, monkeypatch, backend, engine, problem):
        force(monkeypatch, engine)
        q, k, v, roles = problem
        routes = emo.Routes.identity(q.shape[1])
        out = emo.attention(q, k, v, roles=roles, routes=routes, backend=backend)
        same(out, emo.attention(q, k, v, backend="reference"))

    @properties
    @given(problem=problems(cached=True), bias=st.floats(-20, 20))
    def test_one_bias_for_all_visible_keys_changes_only_lse(self, monkeypatch, backend, engine, problem, bias):
        force(monkeypatch, engine)
        q, k, v, roles = problem
        table = torch.full((1, q.shape[1], 6, 6), bias, dtype=torch.float64)
        out = emo.attention(q, k, v, roles=roles, routes=emo.Routes(bias=table), backend=backend)
        plain = emo.attention(q, k, v, backend="reference")
        same(out, emo.AttentionOutput(plain.z, plain.lse + bias))

    @properties
    @given(problem=problems(cached=True), src=st.integers(0, 5))
    def test_bias_of_minus_infinity_is_a_mask(self, monkeypatch, backend, engine, problem, src):
        force(monkeypatch, engine)
        q, k, v, roles = problem
        routes = emo.Routes.identity(q.shape[1], fields=("bias",))
        routes.bias[:, :, :, src] = -torch.inf
        out = emo.attention(q, k, v, roles=roles, routes=routes, backend=backend)
        mask = (roles != src)[:, None, None, :].expand(1, 1, q.shape[2], -1)
        plain = emo.attention(q, k, v, mask=mask, backend="reference")
        assert torch.equal(out.lse == -torch.inf, plain.lse == -torch.inf)
        same(out, plain)

    @properties
    @given(problem=problems(cached=True), src=st.integers(0, 5))
    def test_gain_zero_is_a_mask_without_renormalising(self, monkeypatch, backend, engine, problem, src):
        force(monkeypatch, engine)
        q, k, v, roles = problem
        routes = emo.Routes.identity(q.shape[1], fields=("gain",))
        routes.gain[:, :, :, src] = 0
        out = emo.attention(q, k, v, roles=roles, routes=routes, backend=backend)
        kept = torch.where((roles == src)[:, None, :, None], 0.0, v)
        same(out, emo.attention(q, k, kept, backend="reference"))

    @properties
    @given(problem=problems(), split=st.integers(1, 23))
    def test_prefill_and_decode_make_one_forward(self, monkeypatch, backend, engine, problem, split):
        force(monkeypatch, engine)
        q, k, v, roles = problem
        n = q.shape[2]
        split = min(split, n)
        routes = random_routes(q.shape[1])
        whole = emo.attention(q, k, v, roles=roles, routes=routes, backend="reference")
        parts = []
        for start, stop in [(0, split), *((i, i + 1) for i in range(split, n))]:
            part = (q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop])
            parts.append(emo.attention(*part, roles=roles[:, :stop], routes=routes, backend=backend))
        same(emo.AttentionOutput(torch.cat([p.z for p in parts], 2), torch.cat([p.lse for p in parts], 2)), whole)

    @properties
    @given(problem=problems(cached=True))
    def test_a_row_alone_is_the_row_in_a_batch(self, monkeypatch, backend, engine, problem):
        force(monkeypatch, engine)
        q, k, v, roles = problem
        batch, heads, n, _ = q.shape
        rolled = torch.cat([roles.roll(row, 1) for row in range(batch)])
        routes = random_routes(heads, rows=batch)
        mask = torch.ones(batch, 1, n, k.shape[2], dtype=torch.bool)
        mask[-1, :, :, : k.shape[2] // 3] = False
        out = emo.attention(q, k, v, roles=rolled, routes=routes, mask=mask, backend=backend)
        for row in range(batch):
            one = slice(row, row + 1)
            alone = emo.attention(
                q[one],
                k[one],
                v[one],
                roles=rolled[one],
                routes=routes.select_rows(torch.tensor([row])),
                mask=mask[one],
                backend=backend,
            )
            same(alone, emo.AttentionOutput(out.z[one], out.lse[one]))

    @properties
    @given(problem=problems(cached=True), seed=st.integers(0, 99))
    def test_permuting_heads_permutes_outputs(self, monkeypatch, backend, engine, problem, seed):
        force(monkeypatch, engine)
        q, k, v, roles = problem
        heads, share = q.shape[1], q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
        routes = random_routes(heads, fields=("bias", "gain"))
        moved = emo.Routes(bias=routes.bias[:, order], gain=routes.gain[:, order])
        out = emo.attention(q, k, v, roles=roles, routes=routes, backend=backend)
        again = emo.attention(q[:, order], k[:, order], v[:, order], roles=roles, routes=moved, backend=backend)
        same(again, emo.AttentionOutput(out.z[:, order], out.lse[:, order]))

    @properties
    @given(problem=problems(cached=True))
    def test_lse_does_not_depend_on_gain_and_matches_the_merge_of_its_parts(
        self, monkeypatch, backend, engine, problem
    ):
        force(monkeypatch, engine)
        q, k, v, roles = problem
        routes = random_routes(q.shape[1], fields=("bias", "gain"))
        out = emo.attention(q, k, v, roles=roles, routes=routes, backend=backend)
        without = emo.attention(q, k, v, roles=roles, routes=emo.Routes(bias=routes.bias), backend=backend)
        torch.testing.assert_close(out.lse, without.lse, rtol=0, atol=1e-12)
        visual = roles == emo.Role.VISUAL
        parts = []
        for keep in (visual, ~visual):
            mask = keep[:, None, None, :].expand(1, 1, q.shape[2], -1)
            parts.append(emo.attention(q, k, v, roles=roles, routes=routes, mask=mask, backend=backend))
        merged = torch.logaddexp(parts[0].lse, parts[1].lse)
        torch.testing.assert_close(out.lse, merged, rtol=0, atol=1e-11)
        z = sum(torch.exp(part.lse - merged).unsqueeze(-1) * part.z for part in parts)
        torch.testing.assert_close(out.z, z, rtol=0, atol=1e-11)


@properties
@given(problem=problems(cached=True), softcap=st.sampled_from([None, 2.0]), window=st.sampled_from([None, 3]))
def test_composed_agrees_with_the_reference(problem, softcap, window):
    q, k, v, roles = problem
    routes = random_routes(q.shape[1])
    settings_of_both = {"roles": roles, "routes": routes, "softcap": softcap, "window": window}
    out = emo.attention(q, k, v, backend="composed", **settings_of_both)
    same(out, emo.attention(q, k, v, backend="reference", **settings_of_both))

"""Attention against a float64 oracle that shares no code with the package."""

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import oracle_of
from problems import LLAVA, VIDEO, assert_close, backends, force, qkv, random_routes, roles_of, visual_routes

import emokernels as emo
from emokernels.attention import prepare_step, run, step_mask

ENGINES = ["auto", "spans", "tiles"]
FIELDS = [("bias",), ("scale",), ("abs",), ("gain",), ("bias", "gain"), ("bias", "scale", "abs", "gain")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fields", FIELDS, ids="+".join)
@pytest.mark.parametrize("layout", [LLAVA, VIDEO], ids=["llava", "video"])
def test_composed_routes(monkeypatch, engine, fields, layout):
    force(monkeypatch, engine)
    q, k, v = qkv(batch=2)
    roles, routes = roles_of(layout), random_routes(rows=2, fields=fields)
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles))


@pytest.mark.parametrize("fields", FIELDS, ids="+".join)
def test_reference_routes(fields):
    q, k, v = qkv(batch=2)
    roles, routes = roles_of(LLAVA, VIDEO), random_routes(rows=2, fields=fields)
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="reference")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("boosted", [None, [2]], ids=["all heads", "one head"])
def test_visual_boost(monkeypatch, engine, boosted):
    force(monkeypatch, engine)
    q, k, v = qkv()
    roles, routes = roles_of(LLAVA), visual_routes(boosted=boosted)
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1), (8, 1), (14, 2)])
def test_grouped_query_heads(monkeypatch, engine, heads, key_heads):
    force(monkeypatch, engine)
    q, k, v = qkv(heads=heads, key_heads=key_heads)
    roles, routes = roles_of(LLAVA), random_routes(heads, fields=("bias", "gain"))
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles))


def padding_mask(keep, n):
    keys = keep.shape[1]
    return keep[:, None, None, :] & torch.ones(n, keys, dtype=torch.bool).tril(keys - n)


PADDINGS = {
    "left": [[0] * 5 + [1] * 15, [1] * 20],
    "right": [[1] * 20, [1] * 14 + [0] * 6],
    "both, one row nothing": [[0] * 20, [0] * 4 + [1] * 12 + [0] * 4],
    "holes": [[1, 0] * 10, [1] * 9 + [0] * 2 + [1] * 9],
}


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("form", ["bool", "bool, not causal", "-inf", "lowest"])
def test_padding(monkeypatch, engine, padding, form):
    force(monkeypatch, engine)
    backend = "reference" if engine == "reference" else "composed"
    q, k, v = qkv(batch=2)
    mask = padding_mask(torch.tensor(PADDINGS[padding], dtype=torch.bool), 20)
    if form == "-inf":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    elif form == "lowest":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    causal = "not causal" not in form
    roles, routes = roles_of([0] * 5 + LLAVA[:15], LLAVA), random_routes(rows=2)
    if engine == "spans":
        routes = random_routes(rows=2, fields=("bias", "scale", "gain"))
    out = emo.attention(q, k, v, roles=roles, routes=routes, mask=mask, causal=causal, backend=backend)
    assert_close(out, oracle_of(q, k, v, routes, roles=roles, mask=mask, causal=causal))


@backends
@pytest.mark.parametrize("heads_of_mask", [1, 4])
def test_additive_mask_with_values(backend, heads_of_mask):
    q, k, v = qkv(batch=2)
    mask = torch.randn(2, heads_of_mask, 20, 20)
    mask[:, :, :, 7] = -torch.inf
    roles, routes = roles_of(LLAVA), random_routes()
    out = emo.attention(q, k, v, roles=roles, routes=routes, mask=mask, backend=backend)
    assert_close(out, oracle_of(q, k, v, routes, roles=roles, mask=mask))


@backends
def test_masked_rows_are_zero_and_have_no_gradient(backend):
    q, k, v = (x.requires_grad_() for x in qkv(batch=2))
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    mask[0, :, 3:5] = False
    roles, routes = roles_of(LLAVA), random_routes()
    out = emo.attention(q, k, v, roles=roles, routes=routes, mask=mask, backend=backend)
    assert (out.z[0, :, 3:5] == 0).all()
    assert (out.lse[0, :, 3:5] == -torch.inf).all()
    visible = torch.where(out.lse == -torch.inf, 0.0, out.lse)
    (out.z.sum() + visible.sum()).backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
    assert (q.grad[0, :, 3:5] == 0).all()


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("rows", ["shared", "distinct"])
@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"window": 4}, {"mask": True}], ids=str)
def test_decode(n, rows, extra):
    batch, keys = 3, 24
    q, k, v = qkv(batch=batch, n=n, keys=keys)
    layout = [*LLAVA, 5, 5, 5, 5]
    roles = roles_of(layout) if rows == "shared" else roles_of(layout, [0, *layout[:-1]], [0, 0, *layout[:-2]])
    query_roles = roles_of([5] * n)
    if extra.get("mask"):
        extra = {"mask": (roles != 0)[:, None, None, :].expand(-1, 1, n, keys)}
    routes = random_routes(rows=batch)
    out = emo.attention(q, k, v, roles=roles, query_roles=query_roles, routes=routes, backend="composed", **extra)
    assert_close(out, oracle_of(q, k, v, routes, roles=roles, query_roles=query_roles, **extra))


def test_steps_of_a_padded_batch_follow_their_tables():
    """Rows with different layouts, keys that grow by one a step, tables refilled in place between steps."""
    routes = emo.Routes.identity(heads=4, fields=("bias", "gain"), dtype=torch.float64)
    routes.gain[:, 1, emo.Role.GENERATED, emo.Role.VISUAL] = 2.5
    routes.bias[:, 2, emo.Role.GENERATED, emo.Role.QUERY] = 0.7
    for step in range(1, 6):
        tail = [5] * step
        roles = roles_of([*LLAVA, *tail], [0, 0, *LLAVA[:-2], *tail], [0, *LLAVA[1:], *tail])
        if step == 3:
            routes.gain[:, 1, emo.Role.GENERATED, emo.Role.VISUAL] = 0.25
        if step == 4:
            routes.bias[:, 0, emo.Role.GENERATED, emo.Role.GENERATED] = 1.1
        q, k, v = qkv(batch=3, n=1, keys=roles.shape[1], seed=step)
        mask = (roles != 0)[:, None, None, :]
        out = emo.attention(q, k, v, roles=roles, routes=routes, mask=mask, backend="composed")
        assert_close(out, oracle_of(q, k, v, routes, roles=roles, mask=mask))


@pytest.mark.parametrize("fields", [("gain",), ("bias", "gain")])
@pytest.mark.parametrize("layout", ["shared", "distinct"])
@pytest.mark.parametrize("masked", ["no", "padding", "a row without keys"])
def test_prepared_steps_equal_attention(fields, layout, masked):
    tables = {}
    for name in fields:
        tables[name] = getattr(random_routes(fields=(name,)), name).clone()
        tables[name][..., emo.Role.GENERATED] = 1.0 if name == "gain" else 0.0
    routes = emo.Routes(**tables)
    query_roles, step = roles_of([5]), None
    for added in (1, 2, 5):
        tail = [5] * added
        rows = [[*LLAVA, *tail], [*LLAVA, *tail] if layout == "shared" else [0, 0, *LLAVA[:-2], *tail]]
        roles = roles_of(*rows)
        q, k, v = qkv(batch=2, n=1, keys=roles.shape[1], seed=added)
        mask = None if masked == "no" else torch.ones(2, 1, 1, roles.shape[1], dtype=torch.bool)
        if mask is not None:
            mask[1, ..., :2] = False
        if mask is not None and masked == "a row without keys":
            mask[0] = False
        step = step or prepare_step(q, k, v, roles=roles, query_roles=query_roles, routes=routes)
        expected = emo.attention(
            q, k, v, roles=roles, query_roles=query_roles, routes=routes, mask=mask, causal=False, backend="reference"
        )
        got = step(q, k, v, step_mask(mask, q.dtype), q.shape[3] ** -0.5)
        assert torch.allclose(got, expected.z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_decode_with_many_keys(monkeypatch, key_heads):
    monkeypatch.setattr("emokernels.composed.step.LARGE_KEYS", 0)
    q, k, v = qkv(batch=2, n=1, keys=20, key_heads=key_heads)
    roles, routes = roles_of(LLAVA), random_routes(rows=2)
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keys", [20, 33])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("extra", [{}, {"softcap": 1.5}, {"scale": 0.3}], ids=str)
def test_chunk_after_cached_keys(monkeypatch, engine, keys, causal, extra):
    force(monkeypatch, engine)
    q, k, v = qkv(n=20, keys=keys)
    roles, routes = roles_of(LLAVA + [3] * 6 + [4] + [2] * 6)[:, :keys], random_routes(fields=("bias", "scale", "gain"))
    out = emo.attention(q, k, v, roles=roles, routes=routes, causal=causal, backend="composed", **extra)
    assert_close(out, oracle_of(q, k, v, routes, roles=roles, causal=causal, **extra))


@backends
@pytest.mark.parametrize("window", [1, 3, 19, 40])
def test_window(backend, window):
    q, k, v = qkv()
    roles, routes = roles_of(LLAVA), random_routes()
    out = emo.attention(q, k, v, roles=roles, routes=routes, window=window, backend=backend)
    assert_close(out, oracle_of(q, k, v, routes, roles=roles, window=window))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "last dim strided"])
def test_strides(monkeypatch, engine, how):
    force(monkeypatch, engine)
    q, k, v = qkv(batch=2, heads=4, key_heads=2)
    if how == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif how == "sliced":
        q, k, v = (torch.cat([x, x], 3)[..., 4:12] for x in (q, k, v))
    elif how == "expanded":
        q, k, v = q[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 2, -1, -1), v[:1, :1].expand(2, 2, -1, -1)
    else:
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    before = [x.clone() for x in (q, k, v)]
    roles, routes = roles_of(LLAVA).expand(2, -1), random_routes(fields=("bias", "gain"))
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@backends
def test_head_edits(backend):
    q, k, v = qkv(batch=2)
    edits = emo.HeadEdits(
        scale=torch.randn(2, 1, 4),
        shift=torch.randn(1, 20, 4, 8),
        replace=torch.randn(2, 20, 4, 8).masked_fill(torch.rand(2, 20, 4, 1) < 0.1, torch.nan).nan_to_num(9.0),
        mask=torch.rand(2, 20, 4) < 0.3,
    )
    z, lse = oracle_of(q, k, v)
    z = z.transpose(1, 2) * edits.scale[..., None] + edits.shift
    z = torch.where(edits.mask[..., None], edits.replace.double(), z).transpose(1, 2)
    out = emo.attention(q, k, v, heads=edits, backend=backend)
    assert_close(out, (z, lse))


def test_unused_replacement_values_may_be_nan():
    q, k, v = qkv()
    mask = torch.zeros(1, 20, 4, dtype=torch.bool)
    edits = emo.HeadEdits(replace=torch.full((1, 20, 4, 8), torch.nan), mask=mask)
    assert torch.isfinite(emo.attention(q, k, v, heads=edits).z).all()


HF_CASES = {
    "prefill": {"n": 64, "keys": 64},
    "prefill, grouped": {"n": 64, "keys": 64, "key_heads": 2},
    "decode, grouped": {"n": 1, "keys": 64, "key_heads": 2},
    "decode": {"n": 1, "keys": 64},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", HF_CASES)
def test_without_routes_it_is_stock_attention_bit_for_bit(case, dtype):
    shape = {"key_heads": 4, **HF_CASES[case]}
    q, k, v = qkv(dim=16, dtype=dtype, **shape)
    grouped = shape["key_heads"] != 4
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=shape["n"] > 1, enable_gqa=grouped, scale=16**-0.5)
    z, lse = run(q, k, v)
    assert lse is None
    assert torch.equal(z, stock)
    out = emo.attention(q, k, v)
    assert torch.equal(out.z, stock)
    identity = emo.Routes.identity(4)
    roles = torch.ones(1, shape["keys"], dtype=torch.uint8)
    assert torch.equal(emo.attention(q, k, v, roles=roles, routes=identity).z, stock)


def test_without_routes_with_a_padding_mask_bit_for_bit():
    q, k, v = qkv(batch=2, n=32, dtype=torch.float32)
    mask = padding_mask(torch.tensor([[0] * 8 + [1] * 24, [1] * 32], dtype=torch.bool), 32)
    wide = (x.repeat_interleave(2, 1) for x in (k, v))
    assert torch.equal(run(q, k, v, mask=mask, causal=False)[0], F.scaled_dot_product_attention(q, *wide, mask))


@backends
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("n", [1, 20])
def test_masks_without_routes(backend, additive, n):
    q, k, v = qkv(batch=2, n=n, keys=20)
    mask = torch.rand(2, 1, n, 20, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[1, :, -1] = False
    if additive:
        mask = torch.randn(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    out = emo.attention(q, k, v, mask=mask, backend=backend)
    assert (out.lse[1, :, -1] == -torch.inf).all()
    assert_close(out, oracle_of(q, k, v, mask=mask))


def eager(q, k, v, roles, routes):
    """What a model's eager attention does with dense tables: products in the model's dtype, softmax in float32."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    n = q.shape[2]
    s = (q @ k.mT) * q.shape[3] ** -0.5
    i = roles.long()[0]
    if routes.bias is not None:
        s = s + routes.bias[:, :, i[:, None], i[None, :]].to(s.dtype)
    s = s.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
    p = torch.softmax(s, -1, dtype=torch.float32)
    if routes.gain is not None:
        p = p * routes.gain[:, :, i[:, None], i[None, :]]
    return p.to(q.dtype) @ v


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [("bias",), ("gain",), ("bias", "gain")], ids="+".join)
def test_error_is_at_most_twice_that_of_stock_attention(monkeypatch, engine, dtype, fields):
    if engine == "spans":
        monkeypatch.setattr("emokernels.composed.SMALL_SCORES", 0)
    elif engine == "tiles":
        monkeypatch.setattr("emokernels.composed.SMALL_SCORES", 1 << 60)
    q, k, v = qkv(n=80, dim=32, dtype=dtype)
    roles = roles_of([1] * 8 + [2] * 40 + [3] * 31 + [4])
    routes = visual_routes(fields=fields)
    z, lse = oracle_of(q, k, v, routes, roles=roles)
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    if fields == ("bias",):
        i = roles.long()[0]
        dense = routes.bias[:, :, i[:, None], i[None, :]].masked_fill(~torch.ones(80, 80).bool().tril(), -torch.inf)
        stock = F.scaled_dot_product_attention(q, k, v, dense.to(dtype), enable_gqa=True)
    else:
        stock = eager(q, k, v, roles, routes)
    assert rms(out.z - z) <= 2 * rms(stock - z)
    assert (out.z - z).abs().max() <= 2 * (stock - z).abs().max()
    exact_lse_error = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (out.lse - lse).abs().max() <= exact_lse_error


def rms(x):
    return x.double().square().mean().sqrt()


def test_gain_near_zero_does_not_cancel():
    """Nearly all weight on the image, nearly all of it removed: what is left is the text's small share."""
    q, k, v = qkv(n=80, dim=16, dtype=torch.float32)
    roles = roles_of([1] * 8 + [2] * 40 + [3] * 31 + [4])
    routes = emo.Routes.identity(4, fields=("bias", "gain"))
    routes.bias[:, :, 3:, 2], routes.gain[:, :, 3:, 2] = 12.0, 0.0
    z, _ = oracle_of(q, k, v, routes, roles=roles)
    boosted = z[:, :, 48:]
    assert boosted.abs().max() < 1e-3
    for small in (0, 1 << 60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("emokernels.composed.SMALL_SCORES", small)
            out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed").z[:, :, 48:]
        assert ((out - boosted).abs().max() / boosted.abs().max()) < 1e-5

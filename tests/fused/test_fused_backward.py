"""Gradients of fused attention against float64: every way a tile can meet a block, and every table.

Budgets: twice the error of a plain eager run (no routes) in the same dtype against the same float64 gradients, times
how much larger the routes make a gradient and what it is summed from.
"""

import inspect

import pytest
import torch
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import LLAVA, VIDEO, qkv, random_routes, roles_of

import emokernels as emo
from emokernels.attention import _OPS, make_problem
from emokernels.fused import backward, backward_audit, backward_configs, backward_rows
from emokernels.fused.attention import attend
from emokernels.fused.launch import ARCHITECTURES, Config
from emokernels.ops import empty_outputs

FIELDS = [("bias",), ("scale",), ("abs",), ("gain",), ("bias", "gain")]
PROMPT = [1] * 3 + [2] * 21 + [3] * 14 + [4, 5]
"""With tiles of 16: blocks of one role, of two, and a diagonal in both."""
N = len(PROMPT)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that a short prompt has every kind of block."""
    small = Config(16, 16, 4, 2)
    for name in ("QUERIES", "KEYS"):
        table = {key: dict.fromkeys((64, 128, 256), (small, small)) for key in getattr(backward_configs, name)}
        monkeypatch.setattr(backward_configs, name, table)


def problem_of(batch=1, heads=2, key_heads=1, n=N, keys=None, dim=16, seed=0):
    return qkv(batch, heads, key_heads, n, keys, dim, torch.float64, seed)


def tables_of(heads=2, rows=1, fields=("bias", "scale", "abs", "gain"), seed=1):
    return random_routes(heads, rows, fields, seed)


def loss_of(z, lse, dtype=torch.float64):
    """A sum over all of z and lse with weights that both precisions have exactly."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(z.shape, generator=generator).half().to(dtype).to(z.device)
    top = torch.randn(lse.shape, generator=generator).half().to(lse.dtype).to(z.device)
    return (z * weight).sum() + (torch.where(lse == -torch.inf, 0.0, lse) * top).sum().to(dtype)


def gradients(backend, q, k, v, routes=None, dtype=torch.float64, device="cpu", **options):
    """Of `loss_of` with respect to q, k, v and the tables, computed in `dtype` (tables in float32 or float64)."""
    q, k, v = (x.detach().to(dtype).to(device).requires_grad_() for x in (q, k, v))
    wide = torch.promote_types(dtype, torch.float32)
    learnt = {} if routes is None else {n: t.detach().to(wide).to(device) for n, t in routes.tables()}
    for table in learnt.values():
        table.requires_grad_()
    options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    routed = emo.Routes(**learnt) if learnt else None
    if backend == "eager":
        z, lse = eager(q, k, v, routed, **options)
    else:
        z, lse = emo.attention(q, k, v, routes=routed, backend=backend, **options)
    found = torch.autograd.grad(loss_of(z, lse, dtype), [q, k, v, *learnt.values()], allow_unused=True)
    return [None if x is None else x.cpu() for x in found]


def eager(q, k, v, routes, roles=None):
    """Causal attention as models write it: products in the inputs' dtype, softmax in float32, weights rounded."""
    share, n, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    s = (q @ k.mT).to(wide) * q.shape[3] ** -0.5
    pairs = {}
    if routes is not None:
        roles = roles.long().expand(q.shape[0], -1)
        at = torch.arange(q.shape[0], device=q.device)[:, None, None]
        for name, table in routes.tables():
            table = table.expand(q.shape[0], -1, -1, -1)
            pairs[name] = table[at, :, roles[:, keys - n :, None], roles[:, None, :]].permute(0, 3, 1, 2)
    x = s * pairs.get("scale", 1.0) + s.abs() * pairs.get("abs", 0.0) + pairs.get("bias", 0.0)
    x = x.masked_fill(~torch.ones(n, keys, dtype=torch.bool, device=q.device).tril(keys - n), -torch.inf)
    weights = torch.softmax(x, -1) * pairs.get("gain", 1.0)
    return weights.to(v.dtype) @ v, torch.logsumexp(x, -1)


def errors_of_plain(q, k, v, routes, dtype, options):
    """Largest errors of attention with tables that change nothing, and its exact gradients.

    In half precision models round the weights; in float32 the backward starts from a rounded lse, as here.
    """
    plain = None
    if routes is not None:
        fields = tuple(name for name, _ in routes.tables())
        plain = emo.Routes.identity(q.shape[1], routes.rows, fields=fields, dtype=torch.float64)
    backend = "composed"
    if dtype != torch.float32:
        backend, options = "eager", {"roles": options.get("roles")}
    low = [x.to(dtype) for x in (q, k, v)]
    if options.get("scale") is not None:  # the same problem with a positive scale, which stock kernels need
        low[0] = low[0] if options["scale"] > 0 else -low[0]
        options = {**options, "scale": abs(options["scale"])}
    errors = []
    for turn in range(3):  # sums in another order round differently; the largest of few errors is a matter of luck
        turned = [x.roll(turn, -1) for x in low]
        exact = gradients("reference", *turned, plain, **options)
        found = gradients(backend, *turned, plain, dtype, **options)
        errors.append([float((a.double() - b).abs().max()) for a, b in zip(found, exact, strict=True)])
    return [max(some) for some in zip(*errors, strict=True)], exact


def reach(low, routes, options):
    """The size that a logit can have; the exponential turns its rounding into an error of the weight."""
    q, k = low[0].double(), low[1].double().repeat_interleave(low[0].shape[1] // low[1].shape[1], 1)
    size = float((q @ k.mT).abs().max()) * abs(options.get("scale") or q.shape[3] ** -0.5)
    if routes is None:
        return size
    found = {name: float(table[table > -torch.inf].abs().max()) for name, table in routes.tables()}
    return size * (found.get("scale", 1.0) + found.get("abs", 0.0)) + found.get("bias", 0.0)


def check(q, k, v, routes=None, dtype=torch.float32, backend="fused", **options):
    """All gradients within the budget; returns them."""
    low = [x.to(dtype) for x in (q, k, v)]
    expected = gradients("reference", *low, routes, **options)
    found = gradients(backend, *low, routes, dtype, DEVICE, **options)
    errors, plain = errors_of_plain(q, k, v, routes, dtype, options)
    gain = 1.0 if routes is None or routes.gain is None else max(1.0, float(routes.gain.abs().max()))
    logits = max(1.0, reach(low, routes, options) / reach(low, None, options))
    for name, a, b, error, usual in zip("qkvbacg", found, expected, errors, plain, strict=False):
        assert torch.isfinite(a).all(), name
        assert a.shape == b.shape, name
        larger = max(1.0, float(b.abs().max() / usual.abs().max()))
        budget = 2 * max(error, 2 * torch.finfo(dtype).eps * float(usual.abs().max())) * larger * gain * logits
        worst = float((a.double() - b).abs().max())
        assert worst <= budget, f"gradient {name}: {worst:.2e} off, {budget:.2e} allowed"
    return found


PLAIN = [{}, {"causal": False}, {"window": 20}, {"scale": -0.4}, {"softcap": 2.0}]


@pytest.mark.parametrize("options", PLAIN, ids=str)
def test_plain(options):
    check(*problem_of(), **options)


def test_plain_in_half_precision():
    check(*problem_of(batch=2), dtype=torch.float16)


@pytest.mark.skipif(DEVICE == "cpu", reason="bfloat16 is silently wrong in the interpreter")
def test_bfloat16():
    check(*problem_of(dim=64), tables_of(), torch.bfloat16, roles=roles_of(PROMPT))


@pytest.mark.parametrize(("n", "keys"), [(1, 40), (17, 40), (40, 17)])
def test_rows_and_keys_of_different_number(n, keys):
    """Chunked prefill, decode, and more rows than keys, which causality does not allow."""
    check(*problem_of(n=n, keys=keys), causal=n <= keys)


@pytest.mark.parametrize("fields", FIELDS, ids="+".join)
def test_routes(fields):
    check(*problem_of(), tables_of(fields=fields), roles=roles_of(PROMPT))


def test_routes_in_half_precision():
    check(*problem_of(dim=32), tables_of(fields=("bias", "gain")), torch.float16, roles=roles_of(PROMPT))


@pytest.mark.parametrize("extra", [{"softcap": 2.0, "window": 15}, {"scale": -0.3}], ids=str)
def test_all_tables(extra):
    check(*problem_of(), tables_of(), roles=roles_of(PROMPT), **extra)


@pytest.mark.parametrize("rows", [1, 2], ids=["shared tables", "tables per row"])
def test_batches(rows):
    roles = roles_of(PROMPT, [0, 0, *PROMPT[:-2]])
    check(*problem_of(batch=2), tables_of(rows=rows, fields=("bias", "gain")), roles=roles)


def test_tables_of_float64():
    """Users may build them so; gradients come back as they are."""
    q, k, v = (x.float().to(DEVICE) for x in problem_of(n=20))
    gain = tables_of(fields=("gain",)).gain.to(DEVICE).requires_grad_()
    out = emo.attention(q, k, v, roles=roles_of(LLAVA).to(DEVICE), routes=emo.Routes(gain=gain), backend="fused")
    (found,) = torch.autograd.grad(out.z.sum(), gain)
    assert found.dtype == torch.float64
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("role", [0, 2, 3])
def test_one_role_stands_out(role):
    """Two sets of roles, one role and the rest; the last head changes nothing and is one set."""
    routes = emo.Routes.identity(2, fields=("bias", "gain"), dtype=torch.float64)
    routes.gain[:, 0, 3, role] = 2.5
    routes.bias[:, 0, 3, role] = -1.5
    q, k, v = problem_of()
    roles = roles_of([0] * 2 + PROMPT[2:])
    check(q, k, v, routes, roles=roles)
    constant = wanted_of(q, k, v, routes, roles, [True] * 3 + [False] * 4)
    expected = gradients("reference", *(x.float() for x in (q, k, v)), routes, roles=roles)
    for a, b in zip(constant[:3], expected, strict=False):
        assert float((a.double() - b).abs().max()) <= 1e-5


@pytest.mark.parametrize("rows", ["all rows", "rows of one role"])
def test_knockouts(rows):
    routes = emo.Routes.identity(4, fields=("bias", "gain"), dtype=torch.float64)
    dst = slice(None) if rows == "all rows" else 3
    routes.bias[:, :2, dst, 2] = -torch.inf
    routes.gain[:, 1:3, dst, 2] = 0
    routes.gain[:, 3, dst, 2] = -2.0
    check(*problem_of(heads=4, key_heads=2), routes, roles=roles_of(PROMPT))


def test_a_knocked_out_route_has_no_gradient_of_its_bias_and_that_of_its_gain_says_what_it_lacks():
    routes = emo.Routes.identity(2, fields=("bias", "gain"), dtype=torch.float64)
    routes.bias[:, 0, :, 2] = -torch.inf
    routes.gain[:, 1, :, 2] = 0.0
    *_, bias, gain = check(*problem_of(), routes, roles=roles_of(PROMPT))
    assert (bias[:, 0, :, 2] == 0).all()
    assert (gain[:, 0, :, 2] == 0).all()
    assert (gain[:, 1, 3, 2] != 0).all()


def test_extreme_tables():
    routes = emo.Routes.identity(4, fields=("bias", "gain"), dtype=torch.float64)
    routes.gain[:, 0, :, 2], routes.gain[:, 1, :, 2] = 1e-9, 1e6
    routes.bias[:, 2, :, 2], routes.bias[:, 3, :, 2] = 60.0, -60.0
    check(*problem_of(heads=4, key_heads=4), routes, roles=roles_of(PROMPT))


@pytest.mark.parametrize("form", ["bool", "per head", "lowest", "values"])
def test_masks(form):
    """With a row that sees nothing, a block that nobody sees, and blocks that a mask leaves whole."""
    q, k, v = problem_of(batch=2, n=36, keys=52)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 2 if form == "per head" else 1, 36, 52, generator=generator) < 0.8
    mask[..., 32:] = True
    mask[0, :, 3] = False
    mask[:, :, :, :17] = False
    if form in ("lowest", "values"):
        values = torch.randn(mask.shape, generator=generator) if form == "values" else torch.zeros(mask.shape)
        lowest = torch.finfo(torch.float32).min if form == "lowest" else -torch.inf
        mask = values.masked_fill(~mask, lowest)
    fields = ("bias", "gain") if form != "values" else ("scale", "abs")
    dq, *_ = check(q, k, v, tables_of(fields=fields), roles=roles_of([0] * 12 + PROMPT), mask=mask, causal=False)
    assert (dq[0, :, 3] == 0).all()


def test_a_mask_without_routes():
    q, k, v = problem_of(batch=2)
    mask = torch.ones(2, 1, 1, N, dtype=torch.bool)
    mask[0, ..., :18] = False
    check(q, k, v, mask=mask.expand(2, 1, N, N))


def test_gradients_of_rows_without_keys_do_not_count():
    """Whatever arrives there, be it infinite."""
    q, k, v = (x.float().to(DEVICE).requires_grad_() for x in problem_of(n=20))
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool, device=DEVICE)
    mask[:, :, 5] = False
    out = emo.attention(q, k, v, mask=mask, backend="fused")
    found = torch.autograd.grad(out.z.sum() + out.lse.exp().log().sum(), [q, k, v])
    assert all(torch.isfinite(x).all() for x in found)
    assert (found[0][:, :, 5] == 0).all()


@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (7, 1), (6, 2)])
def test_grouped_query_heads(heads, key_heads):
    routes = tables_of(heads, fields=("bias", "gain"))
    check(*problem_of(heads=heads, key_heads=key_heads, n=20), routes, roles=roles_of(LLAVA))


@pytest.mark.parametrize("dim", [24, 64])
def test_head_dimensions(dim):
    """Padded, and in float32 wider than what is multiplied at a time."""
    assert not 24 < backward_rows._CHUNK < 32
    routes = tables_of(fields=("scale", "gain"))
    check(*problem_of(n=20, keys=40, dim=dim), routes, roles=roles_of([*LLAVA, *VIDEO]))


def test_gradients_of_keys_and_values_apart(monkeypatch):
    monkeypatch.setattr(backward_configs, "APART", dict.fromkeys((2, 4), 16))
    check(*problem_of(n=36), tables_of(fields=("gain",)), roles=roles_of(PROMPT[:36]))


def test_lengths_of_a_cache_that_is_not_full():
    q, k, v = problem_of(batch=2, n=8, keys=24)
    lengths = torch.tensor([17, 24], dtype=torch.int32)
    roles, query_roles = roles_of([*LLAVA, 5, 5, 5, 5]), roles_of([3] * 8)
    options = {"roles": roles, "query_roles": query_roles, "lengths": lengths}
    routes = tables_of(fields=("gain",))
    low = [x.float() for x in (q, k, v)]
    expected = gradients("reference", *low, routes, **options)
    found = gradients("fused", *low, routes, torch.float32, DEVICE, **options)
    for a, b in zip(found, expected, strict=True):
        assert float((a.double() - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def wanted_of(q, k, v, routes, roles, wanted, seed=5):
    """The backward alone, as the op calls it."""
    low = [x.float().to(DEVICE) for x in (q, k, v)]
    routes = emo.Routes(**{n: t.float().to(DEVICE) for n, t in routes.tables()})
    problem = make_problem(*low, roles.to(DEVICE), None, routes, None, True, None, None, None)
    z, lse = attend(problem)
    # The gradient that arrives is what `loss_of` sends.
    weight = torch.autograd.grad(loss_of(a := z.detach().double().requires_grad_(), lse.double()), a)[0].to(z.dtype)
    top = torch.autograd.grad(loss_of(z.double(), a := lse.detach().double().requires_grad_()), a)[0].to(lse.dtype)
    found = backward.attend_backward(problem, weight, top, z, lse, wanted)
    return [None if x is None else x.cpu() for x in found]


@pytest.mark.parametrize("only", range(7))
def test_only_what_is_wanted_is_computed(monkeypatch, only):
    q, k, v = problem_of(n=20)
    roles, routes = roles_of(LLAVA), tables_of()
    launched = []
    for name in ("queries_launch", "keys_launch"):
        made = getattr(backward, name)
        monkeypatch.setattr(backward, name, lambda *a, made=made, **k: launched.append(made(*a, **k)) or launched[-1])
    found = wanted_of(q, k, v, routes, roles, [i == only for i in range(7)])
    assert [x is not None for x in found] == [i == only for i in range(7)]
    assert len(launched) == 1
    assert launched[0].kernel.__name__ == ("keys_kernel" if only in (1, 2) else "queries_kernel")
    assert [
        launched[0].meta.get(name, False) for name in ("DQ", "DK", "DV", "DBIAS", "DFACTOR", "DMAGNITUDE", "DGAIN")
    ] == [i == only for i in range(7)]
    expected = gradients("reference", *(x.float() for x in (q, k, v)), routes, roles=roles)[only]
    torch.testing.assert_close(found[only].double(), expected, rtol=0, atol=2e-5)


def test_tables_that_are_not_given_have_no_gradient():
    q, k, v = problem_of(n=20)
    found = wanted_of(q, k, v, tables_of(fields=("gain",)), roles_of(LLAVA), [True] * 7)
    assert [x is not None for x in found] == [True] * 3 + [False] * 3 + [True]


def test_equal_inputs_give_equal_bits():
    q, k, v = problem_of(n=36)
    roles, routes = roles_of(PROMPT[:36]), tables_of(fields=("bias", "gain"))
    for a, b in zip(*(wanted_of(q, k, v, routes, roles, [True] * 7) for _ in range(2)), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("how", ["transposed", "expanded", "sliced"])
def test_strides(how):
    """Of the inputs, and of the gradient that arrives: that of a sum is one number."""
    q, k, v = (x.float() for x in problem_of(batch=2, heads=4, key_heads=2, n=20))
    if how == "transposed":
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    elif how == "expanded":
        views = [q, k[:1, :1].expand(2, 2, -1, -1), v[:1].expand(2, -1, -1, -1)]
    else:
        views = [torch.stack([x, x], -1)[..., 0].flip(0) for x in (q, k, v)]
    roles, gain = roles_of(LLAVA), tables_of(4, fields=("gain",)).gain
    results = []
    for backend, dtype, device in (("fused", torch.float32, DEVICE), ("reference", torch.float64, "cpu")):
        inputs = [x.to(device, dtype).requires_grad_() for x in (*views, gain.float())]
        out = emo.attention(*inputs[:3], roles=roles.to(device), routes=emo.Routes(gain=inputs[3]), backend=backend)
        results.append(torch.autograd.grad(out.z.sum(), inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=2e-5)


@settings(max_examples=8, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2)]), n=st.integers(1, 34), more=st.integers(0, 20),
    dim=st.sampled_from([8, 16, 20]), fields=st.sampled_from([*FIELDS, ("scale", "abs")]),
    window=st.sampled_from([None, None, 9]), softcap=st.sampled_from([None, None, 1.5]), masked=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_problem(heads, n, more, dim, fields, window, softcap, masked, seed):
    q, k, v = problem_of(1, *heads, n=n, keys=n + more, dim=dim, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    roles = torch.randint(0, 6, (1, 1 + (n + more) // 7), generator=generator).repeat_interleave(7, 1)[:, : n + more]
    options = {"roles": roles.to(torch.uint8), "window": window, "softcap": softcap}
    if masked:
        options["mask"] = torch.rand(1, 1, n, n + more, generator=generator) < 0.7
    low, routes = [x.float() for x in (q, k, v)], tables_of(heads[0], fields=fields, seed=seed)
    expected = gradients("reference", *low, routes, **options)
    found = gradients("fused", *low, routes, torch.float32, DEVICE, **options)
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all()
        assert float((a.double() - b).abs().max()) <= 3e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("how", ["contiguous", "transposed"])
def test_opcheck(how):
    q, k, v = (x.float().to(DEVICE) for x in problem_of(batch=2, n=6))
    if how == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    routes = emo.Routes(**{n: t.float().to(DEVICE) for n, t in tables_of(fields=("bias", "gain")).tables()})
    problem = make_problem(q, k, v, roles_of(LLAVA[:6]).to(DEVICE), None, routes, None, True, None, None, None)
    z, lse = empty_outputs(q)
    wanted = [True, False, True, True, False, False, True]
    op = torch.ops.emokernels.attention_fused_backward.default
    torch.library.opcheck(op, (torch.randn_like(z), torch.randn_like(lse), z.zero_(), lse.zero_(), wanted, *problem))
    if how == "contiguous":
        leaves = [None if t is None or t.dtype == torch.uint8 else t.detach().requires_grad_() for t in problem[:11]]
        inputs = [t if leaf is None else leaf for t, leaf in zip(problem[:11], leaves, strict=True)]
        torch.library.opcheck(_OPS["fused"], (*inputs, *problem[11:]))


def test_a_training_step_compiles_whole_and_does_not_recompile_after_a_refill():
    q, k, v = (x.float().to(DEVICE) for x in problem_of(n=20))
    roles, table = roles_of(LLAVA).to(DEVICE), tables_of(fields=("gain",)).gain.float().to(DEVICE)
    gain = table.clone().requires_grad_()
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def loss(q, gain):
        return emo.attention(q, k, v, roles=roles, routes=emo.Routes(gain=gain), backend="fused").z.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    x = q.clone().requires_grad_()
    for _ in range(2):
        expected = torch.autograd.grad(loss(x, gain), [x, gain])
        found = torch.autograd.grad(compiled(x, gain), [x, gain])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            gain.mul_(1.5)
    assert len(compilations) == 1


def test_a_second_derivative_is_refused():
    q, k, v = (x.float().to(DEVICE).requires_grad_() for x in problem_of(n=4, keys=6))
    z = emo.attention(q, k, v, backend="fused").z
    (first,) = torch.autograd.grad(z.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        first.sum().backward()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_audit_builds_every_launch(monkeypatch, arch):
    monkeypatch.undo()
    launches = list(backward_audit.audit_launches(arch))
    names = [name for name, _, _ in launches]
    assert len(set(names)) == len(names)
    for name, launch, expects in launches:
        parameters = inspect.signature(launch.kernel.fn).parameters
        assert set(parameters) == {*launch.args, *launch.meta}, name
        assert expects.get("plain", names[0]) in names
        if "queries" in name or "keys" in name:
            assert backward_rows.PADDING % launch.meta["BLOCK_M"] == 0

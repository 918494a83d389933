"""The ops as torch sees them: gradients, schemas, fakes, compilation."""

import pytest
import torch
from problems import LLAVA, backends, force, qkv, random_routes, roles_of

import emokernels as emo
from emokernels.attention import _OPS as ATTENTION_OPS
from emokernels.attention import make_problem, run
from emokernels.mlp import _OPS as MLP_OPS


def leaves(tables):
    return [table.requires_grad_() for _, table in tables]


def small(batch=2, n=4, keys=6, heads=4, key_heads=2, **kwargs):
    q, k, v = qkv(batch=batch, heads=heads, key_heads=key_heads, n=n, keys=keys, dim=4, **kwargs)
    return q, k, v, roles_of([1, 2, 2, 3, 3, 4][:keys], [0, 1, 2, 2, 3, 5][:keys])[:batch]


@backends
@pytest.mark.parametrize(
    ("extra", "rows"),
    [({}, 2), ({"softcap": 1.5}, 1), ({"window": 2}, 1), ({"mask": True}, 2), ({"causal": False}, 1)],
    ids=str,
)
def test_gradients(backend, extra, rows):
    q, k, v, roles = small(heads=2, key_heads=1)
    if extra.get("mask"):
        extra = {"mask": torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.6}
        extra["mask"][0, :, 1] = False
    routes = random_routes(2, rows=rows)

    def call(q, k, v, *tables):
        out = emo.attention(q, k, v, roles=roles, routes=emo.Routes(*tables), backend=backend, **extra)
        return out.z, torch.where(out.lse == -torch.inf, 0.0, out.lse)

    torch.autograd.gradcheck(call, [x.requires_grad_() for x in (q, k, v)] + leaves(routes.tables()), fast_mode=False)


@pytest.mark.parametrize("engine", ["spans", "tiles"])
def test_gradients_of_long_problems_follow_the_reference(monkeypatch, engine):
    q, k, v = (x.requires_grad_() for x in qkv(batch=2, n=20))
    roles, routes = roles_of(LLAVA), random_routes(rows=2, fields=("bias", "gain"))
    tables = leaves(routes.tables())
    weight = torch.randn(2, 4, 20, 8, dtype=torch.float64)

    def gradients(backend):
        out = emo.attention(q, k, v, roles=roles, routes=routes, backend=backend)
        return torch.autograd.grad((out.z * weight).sum() + out.lse.square().sum(), [q, k, v, *tables])

    expected = gradients("reference")
    force(monkeypatch, engine)
    for got, want in zip(gradients("composed"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@backends
def test_gradients_of_head_edits(backend):
    q, k, v, _ = small()
    values = [
        x.double().requires_grad_() for x in (torch.randn(2, 1, 4), torch.randn(1, 4, 4, 4), torch.randn(2, 4, 4, 4))
    ]
    mask = torch.rand(2, 4, 4) < 0.5

    def call(q, scale, shift, replace):
        return emo.attention(q, k, v, heads=emo.HeadEdits(scale, shift, replace, mask), backend=backend).z

    torch.autograd.gradcheck(call, [q.requires_grad_(), *values])


def test_second_derivatives():
    q, k, v, roles = small(batch=1, n=2, keys=3, heads=2, key_heads=1)
    gain = random_routes(2, fields=("gain",)).gain.requires_grad_()
    inputs = [x.requires_grad_() for x in (q, k, v)] + [gain]

    def call(backend):
        return lambda q, k, v, gain: (
            emo.attention(q, k, v, roles=roles, routes=emo.Routes(gain=gain), backend=backend).z
        )

    torch.autograd.gradgradcheck(call("reference"), inputs)
    first = torch.autograd.grad(call("composed")(*inputs).sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        first.sum().backward()


@backends
def test_a_mask_that_wants_a_gradient_is_refused(backend):
    q, k, v, _ = small()
    mask = torch.zeros(1, 1, 4, 6, requires_grad=True)
    with pytest.raises(NotImplementedError, match="mask"):
        emo.attention(q, k, v, mask=mask, backend=backend)
    with pytest.raises(NotImplementedError, match="mask"):
        run(q, k, v, mask=mask, backend=backend, need_lse=True)


OP_PROBLEMS = {
    "prefill": ({"n": 6}, {}),
    "decode": ({"n": 1}, {}),
    "float32": ({"n": 6, "dtype": torch.float32}, {}),
    "half": ({"n": 6, "dtype": torch.bfloat16}, {}),
    "softcap, window, mask": ({"n": 4}, {"softcap": 2.0, "window": 3, "mask": torch.ones(1, 1, 4, 6).bool()}),
    "no routes": ({"n": 6}, {"routes": None}),
}


OPCHECKS = [("composed", case, how) for case in OP_PROBLEMS for how in ("contiguous", "transposed", "expanded")]
OPCHECKS += [("reference", "prefill", "transposed"), ("reference", "decode", "contiguous")]


@pytest.mark.parametrize(("backend", "case", "how"), OPCHECKS)
def test_opcheck_attention(backend, case, how):
    shape, extra = OP_PROBLEMS[case]
    q, k, v, roles = small(**shape)
    if how == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif how == "expanded":
        k, v = k[:1, :1].expand(2, 2, -1, -1), v[:1].expand(2, -1, -1, -1)
    routes = random_routes(rows=2, dtype=torch.float32)
    if how == "contiguous" and q.dtype != torch.bfloat16:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        leaves(routes.tables())
    routes, roles = (None, None) if extra.get("routes", 1) is None else (routes, roles)
    problem = make_problem(
        q, k, v, roles, None, routes, extra.get("mask"), True, None, extra.get("window"), extra.get("softcap")
    )
    torch.library.opcheck(ATTENTION_OPS[backend], tuple(problem))


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("how", ["contiguous", "transposed"])
def test_opcheck_gated_activation(backend, how):
    gate, up = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    if how == "transposed":
        gate, up = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (gate, up))
    scale, replace = torch.randn(2, 1, 2), torch.randn(1, 3, 2)
    gate, up, scale, replace = (x.requires_grad_() for x in (gate, up, scale, replace))
    index, mask = torch.tensor([[1, 5], [0, 2]]), torch.rand(2, 3, 2) < 0.5
    op = MLP_OPS[backend]
    torch.library.opcheck(op, (gate, up, index, scale, None, replace, mask, "silu"))
    torch.library.opcheck(op, (gate, None, index[0], scale, None, None, None, "gelu"))
    torch.library.opcheck(op, (gate, up, None, None, None, None, None, "relu"))


def test_opcheck_backwards():
    q, k, v, roles = small()
    problem = make_problem(q, k, v, roles, None, random_routes(), None, True, None, None, None)
    z, lse = ATTENTION_OPS["composed"](*problem)
    wanted = [True, False, True, True, False, False, True]
    op = torch.ops.emokernels.attention_composed_backward.default
    torch.library.opcheck(op, (torch.randn_like(z), torch.randn_like(lse), z, lse, wanted, *problem))
    gate, up = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    arguments = (torch.randn(2, 3, 8), gate, up, torch.tensor([1, 2]), torch.randn(1, 1, 2), None, None, None, "gelu")
    for name in ("reference", "composed"):
        torch.library.opcheck(getattr(torch.ops.emokernels, f"gated_activation_{name}_backward").default, arguments)


@backends
@pytest.mark.parametrize("n", [1, 6])
def test_compiles_whole_and_does_not_recompile_after_a_refill(backend, n):
    q, k, v, roles = small(n=n, dtype=torch.float32)
    routes = random_routes(rows=2, dtype=torch.float32)
    edits = emo.HeadEdits(scale=torch.rand(2, 1, 4), shift=torch.rand(1, 1, 4, 4))
    neurons = emo.NeuronEdits(torch.tensor([0, 2]), scale=torch.rand(1, 1, 2))

    def step(q, k, v):
        z = emo.attention(q, k, v, roles=roles, routes=routes, heads=edits, backend=backend).z
        hidden = z.transpose(1, 2).flatten(2)
        return emo.gated_activation(hidden, hidden + 1, neurons=neurons, backend=backend)

    compilations = []

    def backend_of_dynamo(graph, inputs):
        compilations.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend_of_dynamo)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(q, k, v), step(q, k, v), rtol=0, atol=1e-5)
            for _, table in routes.tables():
                table.add_(0.25)
            edits.scale.mul_(2)
            neurons.scale.mul_(2)
    assert len(compilations) == 1


@pytest.mark.slow
def test_compiles_with_inductor_and_trains():
    q, k, v, roles = small(n=6, dtype=torch.float32)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    gain = random_routes(fields=("gain",), dtype=torch.float32).gain.requires_grad_()

    def loss(q, k, v, gain):
        out = emo.attention(q, k, v, roles=roles, routes=emo.Routes(gain=gain))
        return out.z.square().sum() + out.lse.sum()

    expected = torch.autograd.grad(loss(q, k, v, gain), (q, k, v, gain))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v, gain), (q, k, v, gain))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_results_are_fresh_memory():
    q, k, v, roles = small(n=6)
    storages = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    edits = emo.HeadEdits(replace=torch.randn(2, 6, 4, 4), mask=torch.ones(2, 6, 4, dtype=torch.bool))
    storages.add(edits.replace.untyped_storage().data_ptr())
    for routes in (None, random_routes(), emo.Routes.identity(4)):
        for heads in (None, edits):
            out = emo.attention(q, k, v, roles=roles, routes=routes, heads=heads)
            assert out.z.untyped_storage().data_ptr() not in storages


def test_the_fast_entry_is_the_public_function():
    q, k, v, roles = small(n=6)
    routes = random_routes()
    out = emo.attention(q, k, v, roles=roles, routes=routes)
    z, lse = run(q, k, v, roles=roles, routes=routes, need_lse=True)
    assert torch.equal(z, out.z)
    assert torch.equal(lse, out.lse)
    assert run(q, k, v, roles=roles, routes=routes)[1] is None


def test_refills_are_seen_in_eager_mode():
    """Analyses are remembered by content, so neither tables, roles nor masks changed in place may be missed."""
    q, k, v = qkv(n=80)
    roles = roles_of([1] * 8 + [2] * 40 + [3] * 31 + [4])
    routes = emo.Routes.identity(4, fields=("bias", "gain"))
    mask = torch.ones(1, 1, 80, 80, dtype=torch.bool).tril()

    def check():
        for small_scores in (0, 1 << 60):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("emokernels.composed.SMALL_SCORES", small_scores)
                got = emo.attention(q, k, v, roles=roles, routes=routes, mask=mask, backend="composed")
            want = emo.attention(q, k, v, roles=roles, routes=routes, mask=mask, backend="reference")
            torch.testing.assert_close(got.z, want.z, rtol=0, atol=1e-11)

    check()
    routes.gain[:, 1, 3, 2] = 3.0
    check()
    roles[:, 20:30] = 3
    check()
    mask[..., :5] = False
    check()
    with torch.inference_mode():
        routes.bias[:, :, 4, 1] = -2.0
        check()

"""attention_flow of the reference and composed backends: the oracle, properties, ops, errors, memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measurement_oracle import Largest, dense, flow_oracle, softmax_weights
from problems import LLAVA, VIDEO, backends, qkv, random_routes, roles_of

import emokernels as emo
from emokernels.composed.flow import measure_flow
from emokernels.flow import _OPS
from emokernels.problem import make_problem

PADDED = [0] * 6 + [1] * 2 + [2] * 6 + [3] * 5 + [4]
"""LLAVA's length with left padding."""


def padding(*starts, n=20, keys=20):
    columns = torch.arange(keys)
    return torch.stack([columns >= start for start in starts])[:, None, None, :].expand(-1, 1, n, keys)


def additive(n=20, keys=20):
    generator = torch.Generator().manual_seed(9)
    mask = torch.randn(1, 4, n, keys, generator=generator)
    mask[torch.rand(1, 4, n, keys, generator=generator) < 0.4] = torch.finfo(torch.float32).min
    mask[:, :, 3] = -torch.inf
    return mask


def some_routes(**kwargs):
    routes = random_routes(**kwargs)
    routes.bias[:, :, emo.Role.QUERY, emo.Role.SYSTEM] = -torch.inf
    routes.gain[:, :, emo.Role.QUERY, emo.Role.VISUAL] = 0
    return routes


CASES = {
    "plain": ({}, {}),
    "routes": ({}, {"routes": some_routes()}),
    "routes by row": ({"batch": 2}, {"routes": some_routes(rows=2), "roles": roles_of(LLAVA, PADDED)}),
    "many short runs": ({}, {"roles": roles_of([1, 2] * 10), "routes": some_routes()}),
    "video": ({"batch": 2}, {"roles": roles_of(VIDEO)}),
    "padding": (
        {"batch": 2}, {"roles": roles_of(LLAVA, PADDED), "mask": padding(0, 6), "routes": some_routes()}
    ),
    "additive mask, empty row": ({}, {"mask": additive(), "routes": some_routes()}),
    "window": ({}, {"window": 5, "routes": some_routes()}),
    "softcap, scale": ({}, {"softcap": 1.5, "scale": -0.7}),
    "both ways": ({}, {"causal": False, "routes": some_routes()}),
    "chunk after a cache": ({"n": 7}, {"routes": some_routes()}),
    "decode": ({"n": 1, "batch": 3}, {"routes": some_routes()}),
    "query roles": ({"n": 5}, {"query_roles": roles_of([3, 2, 3, 5, 0])}),
    "one key head": ({"heads": 7, "key_heads": 1}, {"routes": some_routes(heads=7)}),
    "no sharing": ({"key_heads": 4}, {}),
}  # fmt: skip


def case(name, dtype=torch.float64):
    shape, options = CASES[name]
    q, k, v = qkv(**{"n": 20, "keys": 20, "dtype": dtype, **shape})
    return q, k, v, {"roles": roles_of(LLAVA), **options}


def slope_of(q, seed=3):
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(q.dtype)


@backends
@pytest.mark.parametrize("tile", ["whole", "small"])
@pytest.mark.parametrize("what", ["mass", "saliency"])
@pytest.mark.parametrize("name", CASES)
def test_oracle(monkeypatch, name, what, tile, backend):
    if tile == "small":
        monkeypatch.setattr("emokernels.composed.tiles.TILE", 64)
    q, k, v, options = case(name)
    grad_z = slope_of(q) if what == "saliency" else None
    flow = emo.attention_flow(q, k, v, grad_z=grad_z, backend=backend, **options)
    expected = flow_oracle(q, k, v, grad_z=grad_z, **options)
    assert flow.dtype == torch.float64
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-11)


@backends
def test_saliency_is_the_information_flow_of_a_loss(backend):
    """|A dL/dA| by autograd through an explicit model, against grad_z taken from the kernel's own attention."""
    q, k, v = qkv(n=20)
    roles, routes = roles_of(LLAVA), random_routes(fields=("bias", "gain"))
    target = torch.randn(4, 20, 8, dtype=torch.float64)

    def loss_of(z):
        return (torch.tanh(z) * target).sum() + z.square().mean()

    z = emo.attention(q, k, v, roles=roles, routes=routes, backend="reference").z.requires_grad_()
    (grad_z,) = torch.autograd.grad(loss_of(z), z)
    flow = emo.attention_flow(q, k, v, roles=roles, routes=routes, grad_z=grad_z, backend=backend)

    p = softmax_weights(q, k, roles, roles, bias=routes.bias).requires_grad_()
    weights = p * dense(routes.gain, roles, roles, 1)
    weights.retain_grad()
    loss_of(weights @ v.repeat_interleave(2, 1)).backward()
    onto = torch.nn.functional.one_hot(roles[0].long(), 6).double()
    for pairs in ((weights * weights.grad).abs(), (p * p.grad).abs()):
        torch.testing.assert_close(flow, onto.T @ pairs.detach() @ onto, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["mass", "saliency"])
@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_error_is_at_most_twice_that_of_plain_arithmetic(backend, what, dtype):
    q, k, v = qkv(n=80, dim=32, dtype=dtype)
    roles, routes = roles_of([1] * 8 + [2] * 40 + [3] * 31 + [4]), random_routes(fields=("gain",), dtype=torch.float32)
    grad_z = slope_of(q) if what == "saliency" else None
    expected = flow_oracle(q, k, v, roles=roles, routes=routes, grad_z=grad_z)
    flow = emo.attention_flow(q, k, v, roles=roles, routes=routes, grad_z=grad_z, backend=backend)
    assert flow.dtype == torch.float32

    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    s = ((q @ k.mT) * 32**-0.5).masked_fill(~torch.ones(80, 80).bool().tril(), -torch.inf)
    pairs = torch.softmax(s.float(), -1) * dense(routes.gain, roles, roles, 1).float()
    if grad_z is not None:
        pairs = (pairs * (grad_z @ v.mT).float()).abs()
    onto = torch.nn.functional.one_hot(roles[0].long(), 6).float()
    plain = onto.T @ pairs @ onto
    assert (flow - expected).abs().max() <= 2 * (plain - expected).abs().max()


@st.composite
def problems(draw):
    share = draw(st.sampled_from([1, 2, 7]))
    key_heads, batch = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    n = draw(st.integers(1, 24))
    keys = n + draw(st.integers(0, 12))
    runs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=6))
    layout = ([role for role, length in runs for _ in range(length)] * keys)[:keys]
    shape = {"batch": batch, "heads": share * key_heads, "key_heads": key_heads, "n": n, "keys": keys}
    q, k, v = qkv(**shape, seed=draw(st.integers(0, 1 << 16)))
    roles = roles_of(layout)
    return q, k, v, torch.cat([roles.roll(row, 1) for row in range(batch)])


examples = settings(max_examples=20, deadline=None)


@backends
class TestProperties:
    @examples
    @given(problem=problems())
    def test_mass_sums_to_the_queries_of_a_role(self, backend, problem):
        q, k, _, roles = problem
        n, keys = q.shape[2], k.shape[2]
        mask = torch.ones(q.shape[0], 1, n, keys, dtype=torch.bool)
        mask[:, :, ::3] = False
        flow = emo.attention_flow(q, k, roles=roles, mask=mask, backend=backend)
        queries = torch.nn.functional.one_hot(roles[:, keys - n :].long(), 6).double()
        queries[:, ::3] = 0
        torch.testing.assert_close(flow.sum(-1), queries.sum(1)[:, None].expand(-1, q.shape[1], -1))

    @examples
    @given(problem=problems(), src=st.integers(0, 5))
    def test_a_knocked_out_route_carries_nothing(self, backend, problem, src):
        q, k, v, roles = problem
        for table, value in (("bias", -torch.inf), ("gain", 0.0)):
            routes = random_routes(q.shape[1], fields=(table,))
            getattr(routes, table)[:, ::2, :, src] = value
            for grad_z in (None, slope_of(q)):
                flow = emo.attention_flow(q, k, v, roles=roles, routes=routes, grad_z=grad_z, backend=backend)
                assert (flow[:, ::2, :, src] == 0).all()

    @examples
    @given(problem=problems(), factor=st.floats(-3, 3))
    def test_saliency_is_linear_in_the_size_of_the_gradient(self, backend, problem, factor):
        q, k, v, roles = problem
        grad_z = slope_of(q)
        once = emo.attention_flow(q, k, v, roles=roles, grad_z=grad_z, backend=backend)
        more = emo.attention_flow(q, k, v, roles=roles, grad_z=grad_z * factor, backend=backend)
        torch.testing.assert_close(more, once * abs(factor), rtol=0, atol=1e-10)

    @examples
    @given(problem=problems(), split=st.integers(1, 23))
    def test_chunks_of_a_prompt_add_up(self, backend, problem, split):
        q, k, v, roles = problem
        n, keys = q.shape[2], k.shape[2]
        split = min(split, n)
        routes, grad_z = random_routes(q.shape[1]), slope_of(q)
        whole = emo.attention_flow(q, k, v, roles=roles, routes=routes, grad_z=grad_z, backend="reference")
        total = torch.zeros_like(whole)
        for start, stop in ((0, split), (split, n)):
            if start < stop:
                seen = keys - n + stop
                total += emo.attention_flow(
                    q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], roles=roles[:, :seen], routes=routes,
                    grad_z=grad_z[:, :, start:stop], backend=backend,
                )  # fmt: skip
        torch.testing.assert_close(total, whole, rtol=0, atol=1e-10)

    @examples
    @given(problem=problems())
    def test_a_row_alone_is_the_row_in_a_batch(self, backend, problem):
        q, k, v, roles = problem
        routes, grad_z = random_routes(q.shape[1], rows=q.shape[0]), slope_of(q)
        flow = emo.attention_flow(q, k, v, roles=roles, routes=routes, grad_z=grad_z, backend=backend)
        for row in range(q.shape[0]):
            one = slice(row, row + 1)
            alone = emo.attention_flow(
                q[one], k[one], v[one], roles=roles[one], routes=routes.select_rows(torch.tensor([row])),
                grad_z=grad_z[one], backend=backend,
            )  # fmt: skip
            torch.testing.assert_close(alone, flow[one], rtol=0, atol=1e-10)


@backends
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "last dim strided"])
def test_strides(backend, how):
    q, k, v = qkv(batch=2)
    grad_z = slope_of(q)
    if how == "transposed":
        q, k, v, grad_z = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad_z))
    elif how == "sliced":
        q, k, v, grad_z = (torch.cat([x, x], 3)[..., 4:12] for x in (q, k, v, grad_z))
    elif how == "expanded":
        q, k, v = q[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 2, -1, -1), v[:1, :1].expand(2, 2, -1, -1)
        grad_z = grad_z[:, :, :1].expand(-1, -1, 20, -1)
    else:
        q, k, v, grad_z = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v, grad_z))
    roles = roles_of(LLAVA).expand(2, -1)
    before = [x.clone() for x in (q, k, v, grad_z)]
    flow = emo.attention_flow(q, k, v, roles=roles, routes=some_routes(), grad_z=grad_z, backend=backend)
    expected = flow_oracle(q, k, v, roles=roles, routes=some_routes(), grad_z=grad_z)
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-11)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, grad_z), strict=True))


@backends
def test_values_are_not_read_without_a_gradient(backend):
    q, k, v = qkv()
    roles = roles_of(LLAVA)
    flow = emo.attention_flow(q, k, roles=roles, backend=backend)
    assert torch.equal(flow, emo.attention_flow(q, k, torch.full_like(v, torch.nan), roles=roles, backend=backend))


def test_memory_stays_bounded(monkeypatch):
    monkeypatch.setattr("emokernels.composed.tiles.TILE", 1 << 12)
    q, k, v = qkv(n=256, dim=8, heads=4)
    roles = roles_of([1] * 40 + [2] * 100 + [3] * 116)
    problem = make_problem(q, k, v, roles, roles, some_routes(), None, True, None, None, None)
    with Largest(q, k, v) as largest:
        measure_flow(problem, slope_of(q))
    assert largest.elements <= max(1 << 12, q.numel())


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("what", ["mass", "saliency"])
@pytest.mark.parametrize("how", ["contiguous", "transposed"])
def test_opcheck(backend, what, how):
    q, k, v = qkv(n=6, batch=2, dtype=torch.float32)
    if how == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    roles = roles_of([1, 2, 2, 3, 3, 4])
    problem = make_problem(q, k, v, roles, roles, random_routes(dtype=torch.float32), None, True, None, None, None)
    torch.library.opcheck(_OPS[backend], (slope_of(q) if what == "saliency" else None, *problem))


@backends
def test_compiles_whole_and_does_not_recompile_after_a_refill(backend):
    q, k, v = qkv(n=6, dtype=torch.float32)
    roles, routes = roles_of([1, 2, 2, 3, 3, 4]), random_routes(dtype=torch.float32)
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def measure(q, grad_z):
        return emo.attention_flow(q, k, v, roles=roles, routes=routes, grad_z=grad_z, backend=backend) * 2

    torch._dynamo.reset()
    compiled = torch.compile(measure, fullgraph=True, backend=count)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(q, slope_of(q)), measure(q, slope_of(q)), rtol=0, atol=1e-5)
            routes.gain.add_(0.25)
            routes.bias.mul_(0.5)
    assert len(compilations) == 1


@backends
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_z", "routes.gain"])
def test_forward_only(backend, which):
    q, k, v = qkv()
    routes = random_routes(fields=("gain",))
    inputs = {"q": q, "k": k, "v": v, "grad_z": slope_of(q), "routes.gain": routes.gain}
    inputs[which].requires_grad_()
    call = lambda: emo.attention_flow(  # noqa: E731
        q, k, v, roles=roles_of(LLAVA), routes=routes, grad_z=inputs["grad_z"], backend=backend
    )
    with pytest.raises(NotImplementedError, match=f"^{which}: expected .* forward only.* Call it under torch.no_grad"):
        call()
    with torch.no_grad():
        assert not call().requires_grad
    problem = make_problem(q, k, v, roles_of(LLAVA), roles_of(LLAVA), routes, None, True, None, None, None)
    with pytest.raises(NotImplementedError, match="forward only"):
        _OPS[backend](inputs["grad_z"], *problem)


def tensor(*shape, dtype=torch.float32, device=None):
    return torch.zeros(*shape, dtype=dtype, device=device)


ERRORS = {
    "q rank": (ValueError, "q:", {"q": tensor(4, 4, 8)}),
    "k dtype": (TypeError, "k:", {"k": tensor(1, 2, 6, 8, dtype=torch.float64)}),
    "v shape": (ValueError, "v:", {"v": tensor(1, 2, 5, 8)}),
    "v missing": (ValueError, "v:", {"v": None, "grad_z": tensor(1, 4, 4, 8)}),
    "roles missing": (ValueError, "roles:", {"roles": None}),
    "roles type": (TypeError, "roles:", {"roles": [1] * 6}),
    "roles dtype": (TypeError, "roles:", {"roles": tensor(1, 6, dtype=torch.int64)}),
    "roles value": (ValueError, "roles:", {"roles": torch.full((1, 6), 6, dtype=torch.uint8)}),
    "query roles length": (ValueError, "query_roles:", {"query_roles": tensor(1, 6, dtype=torch.uint8)}),
    "query roles missing": (ValueError, "query_roles:", {"q": tensor(1, 4, 7, 8), "causal": False}),
    "grad_z type": (TypeError, "grad_z:", {"grad_z": 1.0}),
    "grad_z dtype": (TypeError, "grad_z:", {"grad_z": tensor(1, 4, 4, 8, dtype=torch.float16)}),
    "grad_z shape": (ValueError, "grad_z:", {"grad_z": tensor(1, 4, 4, 8).transpose(1, 2)[:, :3]}),
    "grad_z device": (ValueError, "grad_z:", {"grad_z": tensor(1, 4, 4, 8, device="meta")}),
    "routes heads": (ValueError, "routes.bias:", {"routes": random_routes(3)}),
    "mask shape": (ValueError, "mask:", {"mask": tensor(1, 1, 4, 5).bool()}),
    "causal": (ValueError, "causal:", {"q": tensor(1, 4, 7, 8)}),
    "window": (ValueError, "window:", {"window": 0}),
    "softcap": (ValueError, "softcap:", {"softcap": -1.0}),
    "backend unknown": (ValueError, "backend:", {"backend": "magic"}),
    "backend without flow": (NotImplementedError, "backend:", {"backend": "native"}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    kind, words, changes = ERRORS[name]
    q, k, v = qkv(n=4, keys=6, dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "roles": tensor(1, 6, dtype=torch.uint8), **changes}
    with pytest.raises(kind, match=f"^{words}") as error:
        emo.attention_flow(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert ": expected " in str(error.value)
    assert ", got " in str(error.value)

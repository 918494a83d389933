"""attention_flow in Triton: the oracle, strides, every mask, tiles that roles cut, and what the audit compiles."""

import pytest
import torch
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from measurement_oracle import flow_oracle

import emokernels as emo
from emokernels.flow import _OPS
from emokernels.fused import flow as fused
from emokernels.fused.launch import ARCHITECTURES, Config
from emokernels.problem import make_problem

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SYSTEM, VISUAL, QUERY, LAST = 1, 2, 3, 4
PROMPT = [SYSTEM] * 5 + [VISUAL] * 40 + [QUERY] * 24 + [LAST]
PADDED = [0] * 9 + PROMPT[:-9]


def small_tiles(monkeypatch, chunk=0):
    """Many tiles in a small problem; `chunk` of the head dimension at a time, or all of it."""
    tile = dict.fromkeys(ARCHITECTURES, (Config(16, 16, 4, 2), chunk))
    for key in fused.CONFIGS:
        monkeypatch.setitem(fused.CONFIGS, key, tile)


def inputs(batch=1, heads=2, key_heads=1, n=70, keys=70, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, n), (key_heads, keys), (key_heads, keys), (heads, n))
    return [torch.randn(batch, h, m, dim, generator=generator).to(dtype).to(DEVICE) for h, m in shapes]


def tables(heads=2, rows=1, fields=("bias", "scale", "abs", "gain"), seed=1):
    generator = torch.Generator().manual_seed(seed)
    centre = {"bias": (0.0, 1.0), "scale": (1.0, 0.5), "abs": (0.0, 0.3), "gain": (1.0, 0.7)}
    made = {
        name: centre[name][0] + centre[name][1] * torch.randn(rows, heads, 6, 6, generator=generator) for name in fields
    }
    if "bias" in made:
        made["bias"][:, 0, QUERY, SYSTEM] = -torch.inf
    return emo.Routes(**made)


def roles_of(*rows):
    return torch.tensor(rows, dtype=torch.uint8)


def bool_mask(batch=1, heads=1, n=70, keys=70):
    mask = torch.rand(batch, heads, n, keys, generator=torch.Generator().manual_seed(4)) < 0.6
    mask[:, :, 11] = False
    return mask


def additive_mask(dtype=torch.float32, n=70, keys=70):
    generator = torch.Generator().manual_seed(5)
    mask = torch.randn(1, 2, n, keys, generator=generator).to(dtype)
    hidden = torch.rand(1, 2, n, keys, generator=generator) < 0.3
    mask[hidden] = torch.finfo(dtype).min
    mask[:, :, 3] = -torch.inf
    return mask


CASES = {
    "plain": ({}, {}),
    "routes": ({}, {"routes": tables()}),
    "bias": ({}, {"routes": tables(fields=("bias",))}),
    "gain alone": ({}, {"routes": tables(fields=("gain",))}),
    "routes by row": ({"batch": 2}, {"routes": tables(rows=2), "roles": roles_of(PROMPT, PADDED)}),
    "short runs": ({}, {"roles": roles_of([1, 2, 2, 3, 5] * 14), "routes": tables()}),
    "padding": (
        {"batch": 2},
        {
            "roles": roles_of(PROMPT, PADDED),
            "mask": (torch.arange(70) >= torch.tensor([[0], [9]]))[:, None, None].expand(-1, 1, 70, 70),
            "routes": tables(fields=("bias", "gain")),
        },
    ),
    "bool mask": ({"batch": 2}, {"mask": bool_mask(2), "routes": tables()}),
    "additive mask": ({}, {"mask": additive_mask(), "routes": tables()}),
    "half additive mask": ({}, {"mask": additive_mask(torch.float16)}),
    "window": ({}, {"window": 19, "routes": tables()}),
    "softcap, negative scale": ({}, {"softcap": 1.5, "scale": -0.4}),
    "both ways": ({"n": 40}, {"causal": False, "routes": tables()}),
    "chunk after a cache": ({"n": 21}, {"routes": tables()}),
    "decode": ({"n": 1, "batch": 2}, {"routes": tables()}),
    "grouped": ({"heads": 7, "key_heads": 1}, {"routes": tables(7, fields=("bias", "gain"))}),
    "odd head dimension": ({"dim": 24}, {"routes": tables(fields=("bias",))}),
}


def move(options):
    moved = {}
    for name, value in options.items():
        moved[name] = value.to(DEVICE) if isinstance(value, (torch.Tensor, emo.Routes)) else value
    return moved


def compare(q, k, v, grad_z, options, budget=1.0):
    """The error against float64, at most twice that of plain arithmetic on inputs of this precision."""
    flow = emo.attention_flow(q, k, v, grad_z=grad_z, backend="fused", **move(options)).cpu()
    q, k, v, grad_z = (None if x is None else x.cpu() for x in (q, k, v, grad_z))
    expected = flow_oracle(q, k, v, grad_z=grad_z, **options)
    assert flow.dtype == torch.float32
    # Scores and dL/dA are products in float32; the sum over a route of up to N x K pairs is rounded once or twice.
    size = expected.abs().amax().clamp(min=1.0)
    assert (flow - expected).abs().max() <= budget * 4e-6 * size


CHUNKED = [(name, 16) for name in ("routes", "bool mask", "odd head dimension")]


@pytest.mark.parametrize(("name", "chunk"), [(name, 0) for name in CASES] + CHUNKED)
@pytest.mark.parametrize("what", ["mass", "saliency"])
def test_oracle(monkeypatch, name, what, chunk):
    small_tiles(monkeypatch, chunk)
    shape, options = CASES[name]
    q, k, v, grad_z = inputs(**shape)
    compare(q, k, v, grad_z if what == "saliency" else None, {"roles": roles_of(PROMPT), **options})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["mass", "saliency"])
def test_tiles_of_the_table(dtype, what):
    q, k, v, grad_z = inputs(n=150, keys=150, dim=64, dtype=dtype)
    roles = roles_of([SYSTEM] * 20 + [VISUAL] * 100 + [QUERY] * 29 + [LAST])
    options = {"roles": roles, "routes": tables(fields=("bias", "gain"))}
    compare(q, k, v, grad_z if what == "saliency" else None, options, budget=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["mass", "saliency"])
def test_error_is_at_most_twice_that_of_plain_arithmetic(monkeypatch, dtype, what):
    small_tiles(monkeypatch)
    q, k, v, grad_z = inputs(dim=32, dtype=dtype)
    roles = roles_of(PROMPT)
    grad_z = grad_z if what == "saliency" else None
    flow = emo.attention_flow(q, k, v, roles=roles.to(DEVICE), grad_z=grad_z, backend="fused").cpu()
    q, k, v = q.cpu(), k.cpu().repeat_interleave(2, 1), v.cpu().repeat_interleave(2, 1)
    grad_z = None if grad_z is None else grad_z.cpu()
    expected = flow_oracle(q, k, v, roles=roles, grad_z=grad_z)
    pairs = torch.softmax(
        ((q @ k.mT) * 32**-0.5).float().masked_fill(~torch.ones(70, 70).bool().tril(), -torch.inf), -1
    )
    if grad_z is not None:
        pairs = (pairs * (grad_z @ v.mT).float()).abs()
    onto = torch.nn.functional.one_hot(roles[0].long(), 6).float()
    plain = onto.T @ pairs @ onto
    assert (flow - expected).abs().max() <= 2 * (plain - expected).abs().max()


@st.composite
def problems(draw):
    share, key_heads = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 2))
    n = draw(st.integers(1, 40))
    keys = n + draw(st.integers(0, 20))
    runs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 25)), min_size=1, max_size=6))
    layout = ([role for role, length in runs for _ in range(length)] * keys)[:keys]
    shape = {"heads": share * key_heads, "key_heads": key_heads, "n": n, "keys": keys}
    options = {"roles": roles_of(layout), "routes": tables(share * key_heads, seed=draw(st.integers(0, 99)))}
    options |= draw(st.sampled_from([{}, {"window": 7}, {"softcap": 2.0}, {"causal": False}]))
    return inputs(batch=draw(st.integers(1, 2)), **shape, seed=draw(st.integers(0, 99))), options


@settings(max_examples=10, deadline=None)
@given(problem=problems(), what=st.sampled_from(["mass", "saliency"]))
def test_any_problem(problem, what):
    (q, k, v, grad_z), options = problem
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch)
        compare(q, k, v, grad_z if what == "saliency" else None, options, budget=2.0)


def test_properties(monkeypatch):
    small_tiles(monkeypatch)
    q, k, v, grad_z = inputs(batch=2)
    roles = roles_of(PROMPT, PADDED).to(DEVICE)
    mass = emo.attention_flow(q, k, roles=roles, mask=bool_mask().to(DEVICE), backend="fused")
    queries = torch.nn.functional.one_hot(roles.long(), 6).float()
    queries[:, 11] = 0
    sees = queries.sum(1)[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(mass.sum(-1), sees, rtol=0, atol=2e-5)
    for table, value in (("bias", -torch.inf), ("gain", 0.0)):
        routes = emo.Routes.identity(2, fields=(table,), device=DEVICE)
        getattr(routes, table)[:, 1, QUERY, VISUAL] = value
        for slope in (None, grad_z):
            flow = emo.attention_flow(q, k, v, roles=roles, routes=routes, grad_z=slope, backend="fused")
            assert (flow[:, 1, QUERY, VISUAL] == 0).all()
            assert (flow[:, 0, QUERY, VISUAL] > 0).all()
    once = emo.attention_flow(q, k, v, roles=roles, grad_z=grad_z, backend="fused")
    assert torch.equal(once, emo.attention_flow(q, k, v, roles=roles, grad_z=grad_z, backend="fused"))
    torch.testing.assert_close(emo.attention_flow(q, k, v, roles=roles, grad_z=-2 * grad_z, backend="fused"), 2 * once)


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "last dim strided"])
def test_strides(monkeypatch, how):
    small_tiles(monkeypatch)
    q, k, v, grad_z = inputs(batch=2, key_heads=2)
    if how == "transposed":
        q, k, v, grad_z = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad_z))
    elif how == "sliced":
        q, k, v, grad_z = (torch.cat([x, x], 3)[..., 8:24] for x in (q, k, v, grad_z))
    elif how == "expanded":
        q, k, v = q[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 2, -1, -1), v[:1, :1].expand(2, 2, -1, -1)
        grad_z = grad_z[:, :, :1].expand(-1, -1, 70, -1)
    else:
        q, k, v, grad_z = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v, grad_z))
    before = [x.clone() for x in (q, k, v, grad_z)]
    full = tables()
    routes = emo.Routes(bias=full.bias.expand(2, -1, -1, -1), gain=full.gain.mT.contiguous().mT)
    wide = torch.stack([roles_of(PROMPT), roles_of(PADDED)], 2).flatten(1)  # every second column is the first layout
    options = {"roles": wide[:, ::2], "routes": routes, "mask": bool_mask(n=140)[:, :, ::2].expand(2, 1, 70, 70)}
    compare(q, k, v, grad_z, options, budget=2.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, grad_z), strict=True))


def test_opcheck(monkeypatch):
    small_tiles(monkeypatch)
    q, k, v, grad_z = inputs(n=20, keys=20)
    roles = roles_of(PROMPT[:20]).to(DEVICE)
    routes = tables().to(DEVICE)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    problem = make_problem(q, k, v, roles, roles, routes, None, True, None, None, None)
    for slope in (None, grad_z):
        torch.library.opcheck(_OPS["fused"], (slope, *problem))


def test_compiles_whole_and_does_not_recompile_after_a_refill(monkeypatch):
    small_tiles(monkeypatch)
    q, k, v, grad_z = inputs(n=20, keys=20)
    roles, routes = roles_of(PROMPT[:20]).to(DEVICE), tables(fields=("bias", "gain")).to(DEVICE)
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def measure(q, grad_z):
        return emo.attention_flow(q, k, v, roles=roles, routes=routes, grad_z=grad_z, backend="fused") * 2

    torch._dynamo.reset()
    compiled = torch.compile(measure, fullgraph=True, backend=count)
    for _ in range(2):
        torch.testing.assert_close(compiled(q, grad_z), measure(q, grad_z))
        routes.gain.add_(0.25)
    assert len(compilations) == 1


def test_errors():
    q, k, v, grad_z = inputs(n=4, keys=4, dim=8)
    roles = roles_of([1, 2, 3, 4]).to(DEVICE)
    wide = torch.zeros(1, 1, 4, 257, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"^q: expected a head dimension up to 256 for 'fused'"):
        emo.attention_flow(wide, wide, roles=roles, backend="fused")
    with pytest.raises(NotImplementedError, match=r"^backend: expected float32, bfloat16 or float16 for 'fused'"):
        emo.attention_flow(q.double(), k.double(), roles=roles, backend="fused")
    for one in (q, k, v, grad_z):
        one.requires_grad_()
        with pytest.raises(NotImplementedError, match="forward only"):
            emo.attention_flow(q, k, v, roles=roles, grad_z=grad_z, backend="fused")
        with pytest.raises(NotImplementedError, match="forward only"):
            problem = make_problem(q, k, v, roles, roles, None, None, True, None, None, None)
            _OPS["fused"](grad_z, *problem)
        one.requires_grad_(False)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launches_are_built_without_a_gpu(arch):
    launches = {name: launch for name, launch, _ in fused.audit_launches(arch)}
    assert len(launches) == 5 * 2 * 4
    for name, launch in launches.items():
        assert launch.args["out"].device.type == "meta"
        assert launch.meta["DIM"] == int(name.split("d=")[1].split()[0])
        assert set(launch.args) | set(launch.meta) == set(launch.kernel.arg_names)

"""`composed` on the real stock kernels of a GPU, each against float64.

A kernel that is not here is skipped with the reason.
"""

import pytest
import torch
import torch.nn.functional as F

import emokernels as emo
from emokernels.attention import run
from emokernels.composed import stock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]

KERNELS = [kernel.name for kernel in stock.KERNELS]
SHAPES = [{"dim": 64}, {"dim": 128, "key_heads": 8}, {"dim": 20}, {"dim": 256, "key_heads": 1}]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LAYOUT = [1] * 35 + [2] * 200 + [3] * 100 + [4]
VIDEO = ([1] * 7 + ([2] * 40 + [3] * 5) * 7 + [3] * 13 + [4])[: len(LAYOUT)]


@pytest.fixture
def kernel(request, monkeypatch):
    """The only stock kernel there is, by name."""
    monkeypatch.setenv(stock.CHOICE, request.param)
    found = next(one for one in stock.KERNELS if one.name == request.param)
    if found.missing() is not None:
        pytest.skip(f"{found.name}: {found.missing()}")
    return found


def inputs(dtype, n, keys, heads=8, key_heads=2, dim=64, batch=2):
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = ((batch, heads, n, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, dim))
    return [torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in shapes]


def skip_refused(kernel, q, k, v, causal):
    reason = kernel.refuses(*(stock.aligned(x) for x in (q, k, v)), causal)
    if reason is not None:
        pytest.skip(f"{kernel.name}: {reason}")


def exact(q, k, v, causal, scale):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).double() for x in (k, v))
    s = scale * (q.double() @ k.mT)
    if causal:
        s = s.masked_fill(torch.ones(s.shape[2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


def budget(q, k, v, causal, scale):
    """Twice the error of torch's own attention on the same inputs."""
    grouped = q.shape[1] != k.shape[1]
    stock_z = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return 2 * (stock_z - exact(q, k, v, causal, scale)[0]).abs().max() + 1e-6


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "keys", "causal"), [(333, 333, True), (65, 333, False), (1, 64, False), (64, 2, False)])
@pytest.mark.parametrize(
    "shape", [{"dim": 64}, {"dim": 128, "key_heads": 8}, {"dim": 20}, {"dim": 256, "key_heads": 1}]
)
def test_the_kernel_and_its_log_sum_exp(kernel, dtype, n, keys, causal, shape):
    q, k, v = inputs(dtype, n, keys, **shape)
    skip_refused(kernel, q, k, v, causal)
    z, lse = stock.stock_with_lse(q, k, v, causal, 0.1)
    expected, expected_lse = exact(q, k, v, causal, 0.1)
    assert z.shape == q.shape
    assert z.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert (z - expected).abs().max() <= budget(q, k, v, causal, 0.1)
    assert (lse - expected_lse).abs().max() <= 2e-3


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_the_kernel_takes_strides(kernel, dtype, how):
    q, k, v = inputs(dtype, 200, 200)
    if how == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif how == "sliced":
        q, k, v = (torch.cat([x, x], 2)[:, :, 3:203] for x in (q, k, v))
    else:
        k, v = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)
    skip_refused(kernel, q, k, v, True)
    z, _ = stock.stock_with_lse(q, k, v, True, 0.1)
    assert (z - exact(q, k, v, True, 0.1)[0]).abs().max() <= budget(q, k, v, True, 0.1)


def problem(dtype, fields, layouts=(LAYOUT, VIDEO), n=None):
    keys = len(LAYOUT)
    q, k, v = inputs(dtype, n or keys, keys)
    roles = torch.tensor(layouts, dtype=torch.uint8, device="cuda")
    routes = emo.Routes.identity(8, fields=fields, device="cuda")
    for head in (1, 2, 7):
        for name, table in routes.tables():
            table[:, head, 3:, 2] = 0.7 if name == "bias" else 1.5
    return q, k, v, roles, routes


def reference(q, k, v, roles, routes):
    tables = {name: table.double() for name, table in routes.tables()}
    return emo.attention(
        q.double(), k.double(), v.double(), roles=roles, routes=emo.Routes(**tables), backend="reference"
    )


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", [("gain",), ("bias",), ("bias", "gain")], ids="+".join)
def test_routes_on_the_kernel(kernel, dtype, fields):
    q, k, v, roles, routes = problem(dtype, fields)
    skip_refused(kernel, q, k, v, True)
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    expected = reference(q, k, v, roles, routes)
    allowed = 1.5 * budget(q, k, v, True, 64**-0.5)
    assert (out.z - expected.z).abs().max() <= allowed
    assert (out.lse - expected.lse).abs().max() <= 5e-3


def layer(q, k, v, roles, routes):
    """What a patched model calls: nothing is validated, which would read values."""
    return run(q, k, v, roles=roles, routes=routes, backend="composed")[0]


@pytest.fixture
def no_waiting():
    """Makes every synchronization an error while it is switched on."""
    yield lambda mode: torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n", [1, 4])
def test_decode_waits_for_nothing(no_waiting, n):
    given = problem(torch.bfloat16, ("bias", "gain"), n=n)
    layer(*given)
    no_waiting("error")
    z = layer(*given)
    no_waiting("default")
    assert (z - reference(*given).z).abs().max() <= 2e-2


def test_the_second_layer_of_a_prefill_waits_for_nothing(no_waiting):
    given = problem(torch.bfloat16, ("bias", "gain"), layouts=(LAYOUT, LAYOUT))
    first = layer(*given)
    no_waiting("error")
    second = layer(*given)
    no_waiting("default")
    assert torch.equal(first, second)


@pytest.mark.parametrize("n", [1, None], ids=["decode", "prefill"])
def test_graphs_follow_refilled_tables(n):
    given = problem(torch.bfloat16, ("bias", "gain"), n=n)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = layer(*given)
    for by in (1.5, 0.25):
        given[4].gain[:, 0, 3:, 2] = by
        graph.replay()
        assert (z - reference(*given).z).abs().max() <= 3e-2

"""The native kernels on a GPU, against the float64 definition. Run by `make gpu`; skipped with a reason elsewhere."""

import pytest
import torch
from native_problems import FIELDS, LAYOUTS, MASKS, assert_correct, exact, problem

import emokernels as emo
from emokernels import native, reference
from emokernels.native.attention import run

WHY_NOT = "no GPU is visible to torch" if not torch.cuda.is_available() else native.why_not()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def on_gpu(**changes):
    """The problem on the CPU, where its answer comes from, and the same one on the GPU."""
    return problem(**changes), problem(**changes, device="cuda")


def check(got, made):
    z, lse = got
    assert_correct((z.cpu().transpose(1, 2).contiguous().transpose(1, 2), lse.cpu()), made)


@every_dtype
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("fields", [(), FIELDS], ids=["plain", "routed"])
@pytest.mark.parametrize("splits", [1, 5])
def test_head_dimensions(dtype, dim, fields, splits):
    made, gpu = on_gpu(batch=2, heads=8, key_heads=2, n=2, keys=700, dim=dim, dtype=dtype, fields=fields, rows=2)
    check(run(gpu, splits), made)


@every_dtype
@pytest.mark.parametrize(("heads", "key_heads", "n"), [(32, 32, 1), (32, 8, 1), (28, 4, 1), (16, 1, 4), (8, 8, 8)])
def test_grouped_heads_and_queries(dtype, heads, key_heads, n):
    made, gpu = on_gpu(heads=heads, key_heads=key_heads, n=n, keys=1000, dim=128, dtype=dtype, fields=("bias", "gain"))
    check(native.attend(gpu), made)


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(dtype, layout):
    made, gpu = on_gpu(batch=3, keys=333, dim=128, dtype=dtype, layout=layout, fields=("gain",))
    check(native.attend(gpu), made)


@every_dtype
@pytest.mark.parametrize("mask", MASKS)
def test_masks(dtype, mask):
    made, gpu = on_gpu(batch=2, n=2, keys=300, dtype=dtype, fields=FIELDS, mask=mask, causal=False)
    check(native.attend(gpu), made)


@every_dtype
@pytest.mark.parametrize("extra", [{"window": 50}, {"softcap": 1.5}, {"lengths": [300, 65, 1, 0]}], ids=str)
def test_other_features(dtype, extra):
    made, gpu = on_gpu(batch=4, n=3, keys=300, dtype=dtype, fields=FIELDS, **extra)
    check(native.attend(gpu), made)


@every_dtype
@pytest.mark.parametrize("keys", [1, 4096, 20000])
def test_long_caches(dtype, keys):
    made, gpu = on_gpu(heads=8, key_heads=2, keys=keys, dim=128, dtype=dtype, fields=("bias", "gain"))
    first = native.attend(gpu)
    check(first, made)
    assert all(torch.equal(a, b) for a, b in zip(first, native.attend(gpu), strict=True))


def test_public_function_and_head_edits():
    made, gpu = on_gpu(heads=8, key_heads=2, keys=300, dtype=torch.bfloat16, fields=("gain",))
    routes = emo.Routes(gain=gpu.gain)
    heads = emo.HeadEdits(scale=torch.full((1, 1, 8), 0.5, device="cuda"))
    out = emo.attention(
        gpu.q, gpu.k, gpu.v, roles=gpu.roles, query_roles=gpu.query_roles, routes=routes, heads=heads, backend="native"
    )
    assert (out.z.cpu().double() - 0.5 * exact(made)[0]).abs().max() < 2e-2


def test_a_cuda_graph_replays_with_refilled_tables_and_lengths():
    _, gpu = on_gpu(batch=2, heads=8, key_heads=2, keys=600, dtype=torch.float16, fields=("gain",), lengths=[600, 300])
    for _ in range(2):
        native.attend(gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, lse = native.attend(gpu)
    gpu.gain.mul_(0.5)
    gpu.lengths.copy_(torch.tensor([17, 599], dtype=torch.int32))
    graph.replay()
    z0, lse0 = native.attend(gpu)
    assert torch.equal(z, z0)
    assert torch.equal(lse, lse0)


def test_another_stream():
    made, gpu = on_gpu(keys=500, fields=("gain",))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = native.attend(gpu)
    torch.cuda.synchronize()
    check(got, made)


def test_compiled_without_breaks():
    _, gpu = on_gpu(keys=300, dtype=torch.bfloat16, fields=("gain",))
    fast = torch.compile(lambda q: native.attend(gpu._replace(q=q))[0] * 2, fullgraph=True)
    assert torch.equal(fast(gpu.q), native.attend(gpu)[0] * 2)


@every_dtype
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "quick_gelu"])
@pytest.mark.parametrize("shape", [(1, 1, 11008), (2, 37, 1000), (3, 5, 77)])
def test_gated_activation(dtype, act, shape):
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    index = torch.stack([torch.randperm(shape[2], generator=generator)[:20] for _ in range(shape[0])])
    scale = torch.randn(shape[0], 1, 20, generator=generator)
    replace, mask = torch.randn(1, shape[1], 20, generator=generator), torch.rand(1, shape[1], 20) < 0.3
    edits = (index, scale, None, replace, mask)
    tolerance = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    for values in ((None,) * 5, edits):
        expected = reference.activate(gate.double(), up.double(), *values, act)
        moved = [None if x is None else x.cuda() for x in values]
        got = native.activate(gate.cuda(), up.cuda(), *moved, act)
        torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=tolerance)
        wide = torch.cat([gate, up], -1).cuda()  # both halves of one projection, read where they are
        halves = native.activate(*wide.chunk(2, -1), *moved, act)
        assert torch.equal(halves, got)

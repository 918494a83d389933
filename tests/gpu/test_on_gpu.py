"""The same answers on a GPU as the float64 definition gives. Run by `make gpu`; skipped with a reason elsewhere."""

import sys
from pathlib import Path

import pytest
import torch

import emokernels as emo

sys.path.insert(0, str(Path(__file__).parents[1] / "emocircuits"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("rows", [1, 7, 96])
def test_attention_against_float64(backend, dtype, rows):
    torch.manual_seed(0)
    q = torch.randn(2, 8, rows, 64, device="cuda", dtype=dtype)
    k, v = (torch.randn(2, 2, 96, 64, device="cuda", dtype=dtype) for _ in range(2))
    roles = torch.randint(1, 6, (2, 96), device="cuda", dtype=torch.uint8)
    shape = (1, 8, len(emo.Role), len(emo.Role))
    routes = emo.Routes(bias=torch.randn(shape, device="cuda"), gain=torch.rand(shape, device="cuda") * 2)
    wide = emo.Routes(bias=routes.bias.double(), gain=routes.gain.double())
    exact = emo.attention(q.double(), k.double(), v.double(), roles=roles, routes=wide, backend="reference").z
    plain_exact = emo.attention(q.double(), k.double(), v.double(), backend="reference").z
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1), is_causal=rows == 96
    ) if rows in (1, 96) else emo.attention(q, k, v, backend="composed").z  # fmt: skip
    budget = 2 * (plain - plain_exact).abs().max() + 1e-7
    got = emo.attention(q, k, v, roles=roles, routes=routes, backend=backend).z
    gain = routes.gain.max() * exact.abs().max() / plain_exact.abs().max()
    assert (got - exact).abs().max() <= budget * max(1.0, float(gain))


@pytest.mark.parametrize("cache", [None, "static"])
def test_patched_generation_equals_the_cpu(cache):
    import models
    from test_patching import everything, generate

    from emocircuits import patch

    model = models.build("llava", dtype=torch.float64)
    inputs = models.batch([models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)])
    options = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    with patch(model, everything()):
        tokens, logits = generate(model, inputs, **options)
    model.cuda()
    inputs = {name: value.cuda() for name, value in inputs.items()}
    with patch(model, everything()):
        on_gpu, gpu_logits = generate(model, inputs, **options)
    assert torch.equal(tokens, on_gpu.cpu())
    assert torch.allclose(logits, gpu_logits.cpu(), rtol=1e-7, atol=1e-7)

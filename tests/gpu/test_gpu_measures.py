"""Attention flow and the logit lens against float64."""

import pytest
import torch
from on_device import HALF, dtypes, here, prompt_roles, qkv, randn, routes, wide

import emokernels as emo

N = here(500, 40)


@dtypes
@pytest.mark.parametrize("saliency", [False, True], ids=["mass", "saliency"])
@pytest.mark.parametrize("dim", here([64, 80, 128, 256], [16]))
def test_flow(dim, saliency, dtype):
    q, k, v = qkv(n=N, dim=dim, dtype=dtype)
    options = {"roles": prompt_roles(N, 2), "grad_z": randn(*q.shape, dtype=dtype, seed=9) if saliency else None}
    for table in (None, routes()):
        found = emo.attention_flow(q, k, v, **options, routes=table, backend="fused")
        given = {name: wide(x) for name, x in options.items()}
        expected = emo.attention_flow(*wide((q, k, v)), **given, routes=wide(table), backend="reference")
        assert found.dtype == torch.float32
        scale = expected.abs().amax((-1, -2), keepdim=True)
        assert float(((found.double() - expected) / scale).abs().max()) <= 4 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.parametrize("options", [{"window": 30}, {"softcap": 20.0}, {"causal": False}], ids=str)
def test_flow_of_other_attention(options):
    q, k, v = qkv(n=N, dim=here(128, 16), dtype=HALF)
    found = emo.attention_flow(q, k, v, roles=prompt_roles(N), **options, backend="fused")
    expected = emo.attention_flow(*wide((q, k, v)), roles=prompt_roles(N), **options, backend="reference")
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
    torch.testing.assert_close(found.sum(-1).sum(-1), torch.full_like(found[..., 0, 0], N), rtol=1e-4, atol=0)


def test_the_flow_of_a_decode_step():
    q, k, v = qkv(n=1, keys=N, dim=here(128, 16), dtype=HALF)
    found = emo.attention_flow(q, k, v, roles=prompt_roles(N), routes=routes(), backend="fused")
    expected = emo.attention_flow(
        *wide((q, k, v)), roles=prompt_roles(N), routes=wide(routes()), backend="reference"
    )  # fmt: skip
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)

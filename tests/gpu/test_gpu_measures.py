"""Attention flow and the logit lens against float64."""

import pytest
import torch
from on_device import DEVICE, HALF, dtypes, here, prompt_roles, qkv, randn, routes, wide

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


def lens_inputs(rows, vocabulary, dim, dtype):
    """Logits of a model that is sure here and there; overlapping sets, one padded with -1."""
    hidden, unembed = randn(rows, dim, dtype=dtype, seed=1), randn(vocabulary, dim, dtype=dtype, seed=2) * dim**-0.5
    unembed[5] *= 8
    sets = torch.tensor([[1, 2, 3, vocabulary - 1], [5, 3, -1, -1]], device=DEVICE)
    return hidden * 2, unembed.to(dtype), sets


@dtypes
@pytest.mark.parametrize("vocabulary", here([1000, 32000, 151936], [70]))
@pytest.mark.parametrize("rows", here([1, 17, 300], [5]))
def test_lens(rows, vocabulary, dtype):
    hidden, unembed, sets = lens_inputs(rows, vocabulary, here(512, 24), dtype)
    found = emo.logit_lens(hidden, unembed, token_sets=sets, top_k=5, backend="fused")
    exact = emo.logit_lens(hidden.double(), unembed.double(), token_sets=sets, top_k=5, backend="reference")
    torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.set_prob.double(), exact.set_prob, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.top.log_prob.double(), exact.top.log_prob, rtol=1e-4, atol=1e-4)
    logits = hidden.double() @ unembed.double().T
    chosen = torch.log_softmax(logits, -1).gather(-1, found.top.ids)
    torch.testing.assert_close(chosen, exact.top.log_prob, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"bias": True}], ids=str)
def test_lens_of_other_heads(options):
    hidden, unembed, sets = lens_inputs(here(33, 5), here(32000, 70), here(512, 24), HALF)
    if "bias" in options:
        options = {
            "bias": randn(unembed.shape[0], seed=3).masked_fill(
                torch.arange(unembed.shape[0], device=DEVICE) % 7 == 0, -torch.inf
            )
        }
    found = emo.logit_lens(hidden, unembed, token_sets=sets, **options, backend="fused")
    given = {name: wide(x) for name, x in options.items()}
    exact = emo.logit_lens(hidden.double(), unembed.double(), token_sets=sets, **given, backend="reference")
    torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.set_prob.double(), exact.set_prob, rtol=1e-3, atol=1e-6)

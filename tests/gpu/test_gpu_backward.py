"""Gradients of fused attention with respect to q, k, v and the tables, against float64."""

import pytest
import torch
from on_device import DEVICE, HALF, check, dtypes, here, prompt_roles, qkv, randn, routes, wide

import emokernels as emo

N = here(400, 34)
FULL = ("bias", "scale", "abs", "gain")


def gradients(q, k, v, table, backend, seed=11, **options):
    """Gradients of a sum over z (and a little of lse), of every input that can have one."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    learnt = {name: t.detach().clone().requires_grad_() for name, t in (table.tables() if table else ())}
    made = emo.Routes(**learnt) if table else None
    out = emo.attention(q, k, v, routes=made, backend=backend, **options)
    weight = randn(*out.z.shape, seed=seed).to(out.z.dtype)
    seen = torch.where(out.lse > -torch.inf, out.lse, 0.0)
    loss = (out.z * weight).sum() + 0.1 * seen.sum()
    names = ["q", "k", "v", *learnt]
    return dict(zip(names, torch.autograd.grad(loss, [q, k, v, *learnt.values()]), strict=True))


def agree(q, k, v, table, **options):
    """Within twice the error of eager attention in the same dtype, relative to the largest entry of each gradient."""
    found = gradients(q, k, v, table, "fused", **options)
    expected = gradients(*wide((q, k, v)), wide(table), "reference", **options)
    eager = gradients(
        q, k, v, None, "reference", **{n: x for n, x in options.items() if n not in ("roles", "query_roles")}
    )
    bare = gradients(
        *wide((q, k, v)), None, "reference", **{n: x for n, x in options.items() if n not in ("roles", "query_roles")}
    )
    rounding = max(
        float((eager[name].double() - bare[name]).abs().max() / bare[name].abs().max()) for name in ("q", "k", "v")
    )
    # Fused kernels round the weights to the inputs' dtype before they multiply, as FlashAttention does.
    rounding = max(rounding, torch.finfo(q.dtype).eps)
    for name, gradient in found.items():
        error = (gradient.double() - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-6)
        assert torch.isfinite(gradient).all(), name
        assert float(error) <= 4 * rounding * max(1.0, float(_gain(table))), name


def _gain(table):
    return 1.0 if table is None or table.gain is None else table.gain.abs().max()


@dtypes
@pytest.mark.parametrize("dim", here([64, 80, 128, 256], [16]))
def test_head_dimensions(dim, dtype):
    q, k, v = qkv(n=N, dim=dim, dtype=dtype)
    agree(q, k, v, None)
    agree(q, k, v, routes(), roles=prompt_roles(N, 2))


@pytest.mark.parametrize("fields", [("bias",), ("scale",), ("abs",), ("gain",), FULL], ids=str)
def test_tables(fields):
    q, k, v = qkv(n=N, dim=here(128, 16), dtype=HALF)
    agree(q, k, v, routes(fields=fields), roles=prompt_roles(N))


@pytest.mark.parametrize("heads", here([(8, 8), (8, 1), (28, 4)], [(2, 2)]), ids=str)
def test_grouped_queries(heads):
    q, k, v = qkv(1, *heads, n=N, dim=here(128, 16), dtype=HALF)
    agree(q, k, v, routes(heads[0]), roles=prompt_roles(N))


@pytest.mark.parametrize("kind", ["padding", "window", "softcap", "chunk", "not causal"])
def test_masks(kind):
    q, k, v = qkv(n=here(300, 20) if kind == "chunk" else N, keys=N, dim=here(128, 16), dtype=HALF)
    start = torch.tensor([0, N // 3], device=DEVICE)[:, None, None, None]
    padding = (torch.arange(N, device=DEVICE) >= start).expand(2, 1, q.shape[2], N)
    options = {
        "padding": {"mask": padding}, "window": {"window": N // 4}, "softcap": {"softcap": 20.0}, "chunk": {},
        "not causal": {"causal": False},
    }[kind]  # fmt: skip
    agree(q, k, v, routes(), roles=prompt_roles(N), **options)


def test_the_same_bits_every_time():
    q, k, v = qkv(n=N, dim=here(128, 16), dtype=HALF)
    options = {"roles": prompt_roles(N)}
    first = gradients(q, k, v, routes(fields=FULL), "fused", **options)
    for _ in range(here(5, 1)):
        again = gradients(q, k, v, routes(fields=FULL), "fused", **options)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_the_forward_of_a_gradient_is_the_forward():
    q, k, v = qkv(n=N, dim=here(128, 16), dtype=HALF)
    options = {"roles": prompt_roles(N), "routes": routes()}
    found = emo.attention(q.requires_grad_(), k, v, **options, backend="fused")
    check(emo.AttentionOutput(found.z.detach(), found.lse.detach()), q.detach(), k, v, **options)

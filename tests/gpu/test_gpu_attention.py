"""Prefill attention of every backend against float64, in the dtypes and head dimensions of real models."""

import pytest
import torch
from on_device import DEVICE, DTYPES, HALF, HEADS, ON_GPU, check, dtypes, exact, here, prompt_roles, qkv, randn, routes

import emokernels as emo

N = here(600, 40)


def attend(*args, backend="fused", **options):
    found = emo.attention(*args, backend=backend, **options)
    check(found, *args, **options)
    return found


@dtypes
@pytest.mark.parametrize("dim", here([64, 80, 96, 128, 256], [16, 80]))
@pytest.mark.parametrize("backend", here(["fused", "composed"], ["fused"]))
def test_routes_in_every_head_dimension(backend, dim, dtype):
    q, k, v = qkv(n=N, dim=dim, dtype=dtype)
    attend(q, k, v, roles=prompt_roles(N, 2), routes=routes(rows=2), backend=backend)


@dtypes
@pytest.mark.parametrize("heads", here([(8, 8), (8, 1), (28, 4), (32, 8)], [(2, 2), (4, 1)]), ids=str)
def test_grouped_queries(heads, dtype):
    q, k, v = qkv(1, *heads, n=N, dtype=dtype, dim=here(128, 16))
    attend(q, k, v)
    attend(q, k, v, roles=prompt_roles(N), routes=routes(heads[0], ("gain",)))


def masks(kind, n, keys):
    """Hugging Face's forms, and options that stand in for them."""
    lengths = torch.tensor([keys, 2 * keys // 3], device=DEVICE)
    padding = torch.arange(keys, device=DEVICE)[None, :] >= keys - lengths[:, None]
    padding = padding[:, None, None, :].expand(2, 1, n, keys)
    if kind == "left padding":
        return {"mask": padding}
    if kind == "left padding, additive":
        low = torch.finfo(HALF).min
        return {"mask": torch.zeros(2, 1, n, keys, dtype=HALF, device=DEVICE).masked_fill(~padding, low)}
    if kind == "by head":
        return {"mask": randn(2, HEADS, n, keys, seed=9)}
    if kind == "blocks":
        block = torch.arange(keys, device=DEVICE) // 7
        return {"mask": (block[keys - n :, None] >= block[None, :])[None, None], "causal": False}
    return {"window": {"window": keys // 3}, "softcap": {"softcap": 20.0}, "all": {"causal": False}}[kind]


@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
@pytest.mark.parametrize(
    "kind", ["left padding", "left padding, additive", "by head", "blocks", "window", "softcap", "all"]
)
def test_masks(kind, routed):
    q, k, v = qkv(n=N, dtype=HALF, dim=here(128, 16))
    options = masks(kind, N, N)
    if routed:
        options |= {"roles": prompt_roles(N, 2), "routes": routes()}
    attend(q, k, v, **options)


@pytest.mark.parametrize("n", here([129, 256, 511], [17]))
def test_a_chunk_of_a_prompt(n):
    """Fewer queries than keys: the last query sees the last key."""
    q, k, v = qkv(n=n, keys=N, dtype=HALF, dim=here(128, 16))
    attend(q, k, v, roles=prompt_roles(N), routes=routes())


@pytest.mark.parametrize("fields", [("bias",), ("scale",), ("abs",), ("gain",), ("bias", "scale", "abs", "gain")])
def test_every_table(fields):
    q, k, v = qkv(n=N, dtype=HALF, dim=here(128, 16))
    attend(q, k, v, roles=prompt_roles(N), routes=routes(fields=fields))


def test_a_knocked_out_route_is_a_mask_and_a_silent_one_keeps_its_share():
    q, k, v = qkv(n=N, dtype=HALF, dim=here(128, 16))
    roles, table = prompt_roles(N), emo.Routes.identity(HEADS, fields=("bias", "gain"), device=DEVICE)
    half = HEADS // 2
    table.bias[:, :half, :, emo.Role.VISUAL] = -torch.inf
    table.gain[:, half:, :, emo.Role.VISUAL] = 0.0
    found = attend(q, k, v, roles=roles, routes=table)
    visible = (roles != emo.Role.VISUAL)[:, None, None, :].expand(1, 1, N, N)
    masked = emo.attention(q, k, v, mask=visible, backend="fused")
    bare = emo.attention(q, k, v, backend="fused")
    torch.testing.assert_close(found.z[:, :half], masked.z[:, :half], rtol=0, atol=4 * torch.finfo(HALF).eps)
    torch.testing.assert_close(found.lse[:, half:], bare.lse[:, half:], rtol=1e-5, atol=1e-5)


def test_head_edits():
    q, k, v = qkv(n=N, dtype=HALF, dim=here(128, 16))
    edits = emo.HeadEdits(
        scale=randn(2, 1, HEADS, seed=3), shift=randn(1, N, HEADS, q.shape[3], seed=4) * 0.1,
        replace=randn(2, 1, HEADS, q.shape[3], seed=6), mask=randn(2, N, HEADS, seed=7) > 1,
    )  # fmt: skip
    found = emo.attention(q, k, v, roles=prompt_roles(N), routes=routes(), heads=edits, backend="fused")
    bare = emo.attention(q, k, v, roles=prompt_roles(N), routes=routes(), backend="fused").z.float()
    expected = edits.scale.transpose(1, 2)[..., None] * bare + edits.shift.transpose(1, 2)
    expected = torch.where(edits.mask.transpose(1, 2)[..., None], edits.replace.transpose(1, 2), expected)
    rounding = 4 * torch.finfo(HALF).eps
    torch.testing.assert_close(found.z.float(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(layout):
    q, k, v = qkv(n=N, dtype=HALF, dim=here(128, 16))
    if layout == "transposed":
        given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    elif layout == "sliced":
        given = [torch.cat([x, x], -1)[..., : x.shape[3]] for x in (q, k, v)]
    else:
        given = [x[:1].expand_as(x) for x in (q, k, v)]
    options = {"roles": prompt_roles(N), "routes": routes()}
    found = attend(*given, **options)
    same = emo.attention(*(x.clone(memory_format=torch.contiguous_format) for x in given), **options, backend="fused")
    assert torch.equal(found.z, same.z)
    assert torch.equal(found.lse, same.lse)


def test_a_row_that_sees_nothing_is_zero():
    q, k, v = qkv(n=N, dtype=HALF, dim=here(128, 16))
    mask = torch.ones(1, 1, N, N, dtype=torch.bool, device=DEVICE)
    mask[:, :, 3] = False
    found = attend(q, k, v, mask=mask, roles=prompt_roles(N), routes=routes())
    assert not found.z[:, :, 3].any()
    assert (found.lse[:, :, 3] == -torch.inf).all()


def test_equal_rows_give_equal_bits():
    """A race would show as a difference between runs or between rows of a batch."""
    q, k, v = (x[:1].expand(3, -1, -1, -1).contiguous() for x in qkv(n=N, dtype=HALF, dim=here(128, 16)))
    first = emo.attention(q, k, v, roles=prompt_roles(N), routes=routes(), backend="fused")
    for _ in range(here(20, 1)):
        again = emo.attention(q, k, v, roles=prompt_roles(N), routes=routes(), backend="fused")
        assert torch.equal(again.z, first.z)
        assert torch.equal(again.z[0], again.z[-1])


def test_a_long_prompt():
    """Sixteen thousand keys on a GPU: the last rows against float64."""
    keys = here(16384, 70)
    q, k, v = qkv(1, 4, 1, n=keys, dim=here(128, 16), dtype=HALF)
    roles, table = prompt_roles(keys), routes(4)
    found = emo.attention(q, k, v, roles=roles, routes=table, backend="fused")
    tail = emo.AttentionOutput(found.z[:, :, -65:], found.lse[:, :, -65:])
    check(tail, q[:, :, -65:], k, v, roles=roles, routes=table)


def test_the_check_of_these_tests_notices_what_is_wrong():
    q, k, v = qkv(n=N, dtype=HALF, dim=here(128, 16))
    options = {"roles": prompt_roles(N), "routes": routes()}
    right = exact(q, k, v, **options)
    right = emo.AttentionOutput(right.z.to(HALF), right.lse.float())
    check(right, q, k, v, **options)
    moved = options["roles"].roll(1, 1)
    for wrong in (
        emo.attention(q, k, v, backend="reference"),
        emo.attention(q, k, v, roles=moved, routes=routes(), backend="reference"),
        emo.attention(q, k, v, roles=moved.roll(-1, 1), routes=routes(seed=6), backend="reference"),
        emo.AttentionOutput(right.z * 1.05, right.lse),
        emo.AttentionOutput(right.z, right.lse + 0.01),
    ):
        with pytest.raises(AssertionError):
            check(wrong, q, k, v, **options)


def test_dtypes_are_those_of_the_place():
    assert (torch.bfloat16 in DTYPES) == ON_GPU

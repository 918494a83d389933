"""A few queries on a cache: every length, caches that are not full, prefixes that rows share."""

import pytest
import torch
from on_device import DEVICE, HALF, HEADS, KEY_HEADS, check, dtypes, here, prompt_roles, qkv, randn, routes

import emokernels as emo

DIM = here(128, 16)


def generated_roles(keys, rows=1, new=3):
    """A prompt and some tokens after it."""
    row = prompt_roles(keys, rows)
    if keys > new:
        row[:, -new - 1] = emo.Role.LAST
        row[:, -new:] = emo.Role.GENERATED
    return row


@dtypes
@pytest.mark.parametrize("keys", here([1, 17, 128, 1000, 4097], [1, 70]))
@pytest.mark.parametrize("batch", here([1, 5, 64], [2]))
def test_one_query(batch, keys, dtype):
    q, k, v = qkv(batch, n=1, keys=keys, dim=DIM, dtype=dtype)
    check(emo.attention(q, k, v, backend="fused"), q, k, v)
    options = {"roles": generated_roles(keys), "routes": routes()}
    check(emo.attention(q, k, v, **options, backend="fused"), q, k, v, **options)


@pytest.mark.parametrize("dim", here([64, 80, 96, 128, 256], [80]))
@pytest.mark.parametrize("heads", here([(8, 8), (8, 1), (28, 4), (32, 8)], [(2, 1)]), ids=str)
def test_heads_and_their_dimensions(heads, dim):
    q, k, v = qkv(2, *heads, n=1, keys=here(777, 40), dim=dim, dtype=HALF)
    options = {"roles": generated_roles(k.shape[2], 2), "routes": routes(heads[0], rows=2)}
    check(emo.attention(q, k, v, **options, backend="fused"), q, k, v, **options)


@pytest.mark.parametrize("n", here([2, 4, 8, 16], [3]))
def test_a_few_queries(n):
    q, k, v = qkv(n=n, keys=here(1000, 50), dim=DIM, dtype=HALF)
    options = {"roles": generated_roles(k.shape[2], 2), "routes": routes(fields=("bias", "scale", "abs", "gain"))}
    check(emo.attention(q, k, v, **options, backend="fused"), q, k, v, **options)


@pytest.mark.parametrize("options", [{"window": 30}, {"softcap": 15.0}, {"scale": 0.3}], ids=str)
def test_options(options):
    q, k, v = qkv(n=2, keys=here(1000, 50), dim=DIM, dtype=HALF)
    options = {**options, "roles": generated_roles(k.shape[2]), "routes": routes()}
    check(emo.attention(q, k, v, **options, backend="fused"), q, k, v, **options)


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_left_padding(form):
    keys = here(1000, 50)
    q, k, v = qkv(n=1, keys=keys, dim=DIM, dtype=HALF)
    mask = (
        torch.arange(keys, device=DEVICE)[None, None, None, :]
        >= torch.tensor([0, 13], device=DEVICE)[:, None, None, None]
    )
    if form == "additive":
        mask = torch.zeros(mask.shape, dtype=HALF, device=DEVICE).masked_fill(~mask, torch.finfo(HALF).min)
    options = {"mask": mask, "roles": generated_roles(keys, 2), "routes": routes()}
    check(emo.attention(q, k, v, **options, backend="fused"), q, k, v, **options)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("lengths", [[5], [5, 700]], ids=str)
def test_a_cache_that_is_not_full(lengths, n):
    """What lies behind the valid length is huge, and never seen."""
    keys = here(1024, 64)
    lengths = torch.tensor([min(x, keys - 2) for x in lengths], dtype=torch.int32, device=DEVICE)
    q, k, v = qkv(n=n, keys=keys, dim=DIM, dtype=HALF)
    behind = torch.arange(keys, device=DEVICE)[None, :] >= lengths[:, None]
    k, v = (torch.where(behind[:, None, :, None], torch.full_like(x, 1e4), x) for x in (k, v))
    options = {
        "lengths": lengths, "roles": generated_roles(keys), "routes": routes(),
        "query_roles": torch.full((1, n), int(emo.Role.GENERATED), dtype=torch.uint8, device=DEVICE),
    }  # fmt: skip
    found = emo.attention(q, k, v, **options, backend="fused")
    check(found, q, k, v, **options)
    for row, length in enumerate(lengths.expand(2).tolist()):
        cut = {**options, "lengths": None, "roles": options["roles"][:, :length]}
        alone = emo.attention(q[row : row + 1], k[row : row + 1, :, :length], v[row : row + 1, :, :length], **cut)
        tolerance = 8 * torch.finfo(HALF).eps
        torch.testing.assert_close(found.z[row], alone.z[0], rtol=tolerance, atol=tolerance)


def test_head_edits_in_a_step():
    q, k, v = qkv(n=1, keys=here(1000, 50), dim=DIM, dtype=HALF)
    edits = emo.HeadEdits(
        scale=randn(2, 1, HEADS, seed=3), replace=randn(2, 1, HEADS, DIM, seed=4),
        mask=torch.arange(2 * HEADS, device=DEVICE).view(2, 1, HEADS) % 3 == 0,
    )  # fmt: skip
    bare = emo.attention(q, k, v, backend="fused").z.float()
    expected = torch.where(
        edits.mask.transpose(1, 2)[..., None], edits.replace.transpose(1, 2), bare * edits.scale.mT[..., None]
    )
    found = emo.attention(q, k, v, heads=edits, backend="fused").z.float()
    tolerance = 4 * torch.finfo(HALF).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("own", [1, here(130, 20)])
@pytest.mark.parametrize("batch", here([2, 64, 256], [3]))
@pytest.mark.parametrize("fields", [(), ("gain",), ("bias", "gain")], ids=str)
def test_a_shared_prefix(fields, batch, own):
    """The same as with the prefix copied in front of every row's own keys."""
    length = here(1000, 40)
    q, k, v = qkv(batch, n=1, keys=own, dim=DIM, dtype=HALF)
    prefix = tuple(randn(1, KEY_HEADS, length, DIM, dtype=HALF, seed=seed) for seed in (7, 8))
    whole = [torch.cat([x.expand(batch, -1, -1, -1), y], 2) for x, y in zip(prefix, (k, v), strict=True)]
    options = {"roles": generated_roles(length + own), "routes": routes(fields=fields)} if fields else {}
    found = emo.attention(q, k, v, prefix=prefix, **options, backend="fused")
    check(found, q, *whole, **options)


def test_a_shared_prefix_with_rows_of_different_lengths():
    length, own, batch = here(500, 30), here(64, 16), 3
    q, k, v = qkv(batch, n=1, keys=own, dim=DIM, dtype=HALF)
    prefix = tuple(randn(1, KEY_HEADS, length, DIM, dtype=HALF, seed=seed) for seed in (7, 8))
    whole = [torch.cat([x.expand(batch, -1, -1, -1), y], 2) for x, y in zip(prefix, (k, v), strict=True)]
    options = {
        "lengths": torch.tensor([length + 1, length + own, length + own // 2], dtype=torch.int32, device=DEVICE),
        "roles": generated_roles(length + own), "routes": routes(),
        "query_roles": torch.full((1, 1), int(emo.Role.GENERATED), dtype=torch.uint8, device=DEVICE),
    }  # fmt: skip
    check(emo.attention(q, k, v, prefix=prefix, **options, backend="fused"), q, *whole, **options)


@pytest.mark.parametrize("fields", [(), ("bias", "gain")], ids=str)
def test_rows_that_are_one_memory(fields):
    """A cache expanded over the batch (stride 0) may be read once."""
    q, k, v = qkv(here(64, 3), n=1, keys=here(1000, 40), dim=DIM, dtype=HALF)
    k, v = (x[:1].expand_as(x) for x in (k, v))
    options = {"roles": generated_roles(k.shape[2]), "routes": routes(fields=fields)} if fields else {}
    check(emo.attention(q, k, v, **options, backend="fused"), q, k, v, **options)


def test_prefill_and_decode_are_one_forward():
    keys = here(700, 40)
    q, k, v = qkv(n=keys, dim=DIM, dtype=HALF)
    options = {"roles": generated_roles(keys), "routes": routes()}
    whole = emo.attention(q, k, v, **options, backend="fused")
    last = emo.attention(q[:, :, -1:], k, v, **options, backend="fused")
    tolerance = 4 * torch.finfo(HALF).eps
    torch.testing.assert_close(last.z, whole.z[:, :, -1:], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(last.lse, whole.lse[:, :, -1:], rtol=1e-5, atol=1e-5)

"""Decode steps for the tests: problems, what the float64 oracle says of them, and the error allowed."""

import torch
from attention_oracle import oracle_of
from device import DEVICE
from problems import qkv

import emokernels as emo
from emokernels.attention import make_problem


def moved(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def low_routes(routes):
    if routes is None:
        return None
    return emo.Routes(**{name: table.float().to(DEVICE) for name, table in routes.tables()})


def low_edits(heads):
    return None if heads is None else heads.to(DEVICE)


def problem_of(
    q, k, v, routes=None, *, roles=None, query_roles=None, mask=None, causal=True, scale=None, window=None,
    softcap=None, lengths=None, columns=None,
):  # fmt: skip
    """A Problem on the test's device; q, k and v are low precision already. `columns` counts a prefix too."""
    if roles is not None and query_roles is None:
        end = k.shape[2] if columns is None else columns
        query_roles = roles[:, end - q.shape[2] : end]
    roles, query_roles, mask, lengths = (moved(x) for x in (roles, query_roles, mask, lengths))
    return make_problem(
        moved(q), moved(k), moved(v), roles, query_roles, low_routes(routes), mask, causal, scale, window, softcap,
        lengths,
    )  # fmt: skip


def exact(q, k, v, routes=None, *, lengths=None, roles=None, query_roles=None, mask=None, heads=None, **options):
    """The oracle, row by row over the keys that exist there, then the head edits."""
    batch, n, keys = q.shape[0], q.shape[2], k.shape[2]
    if roles is not None:
        query_roles = (roles[:, keys - n :] if query_roles is None else query_roles).expand(batch, n)
        roles = roles.expand(batch, keys)
    z = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b in range(batch):
        there = keys if lengths is None else int(lengths[b if lengths.shape[0] > 1 else 0])
        if there == 0:
            continue
        row = slice(b, b + 1)
        own = None if mask is None else (mask if mask.shape[0] == 1 else mask[row])[..., :there]
        tables = None
        if routes is not None:
            tables = emo.Routes(**{m: t if t.shape[0] == 1 else t[row] for m, t in routes.tables()})
        of_row = (None, None) if roles is None else (roles[row, :there], query_roles[row])
        z[row], lse[row] = oracle_of(
            q[row], k[row, :, :there], v[row, :, :there], tables, roles=of_row[0], query_roles=of_row[1], mask=own,
            **options,
        )  # fmt: skip
    if heads is not None:
        if heads.scale is not None:
            z = z * heads.scale.double().transpose(1, 2).unsqueeze(-1)
        if heads.shift is not None:
            z = z + heads.shift.double().transpose(1, 2)
        if heads.mask is not None:
            where = heads.mask.transpose(1, 2).unsqueeze(-1)
            z = torch.where(where, heads.replace.double().nan_to_num().transpose(1, 2), z)
    return z, lse


def plain_error(q, k, v):
    """The largest error of plain attention over all keys in the dtype of q: scores in float32, weights rounded."""
    share, dtype = q.shape[1] // k.shape[1], q.dtype
    wide = [x.repeat_interleave(share, 1) for x in (k, v)]
    errors = []
    for number in (torch.float32, torch.float64):
        s = (q.to(number) @ wide[0].to(number).mT) * q.shape[3] ** -0.5
        p = torch.softmax(s, -1)
        p = p.to(dtype).float() if number == torch.float32 else p
        z = p @ wide[1].to(number)
        errors.append(z.to(dtype).double() if number == torch.float32 else z)
    return (errors[0] - errors[1]).abs().max().item()


def budget(q, k, v, routes=None, scale=None, mask=None, **_):
    """Twice the error of plain attention, times what routes do to weights (gain) and to the size of logits."""
    error = max(plain_error(q, k, v), torch.finfo(q.dtype).eps * v.abs().max().item())
    larger = 1.0 if scale is None else max(1.0, abs(scale) * q.shape[3] ** 0.5)
    gain = 1.0
    if routes is not None:
        larger *= 1.0 if routes.scale is None else max(1.0, routes.scale.abs().max().item())
        larger += 0.0 if routes.abs is None else routes.abs.abs().max().item()
        if routes.bias is not None:
            bias = routes.bias[routes.bias > -torch.inf].abs()
            larger += bias.max().item() if bias.numel() else 0.0
        gain = 1.0 if routes.gain is None else max(1.0, routes.gain.abs().max().item())
    if mask is not None and mask.dtype != torch.bool:
        larger += mask[mask > torch.finfo(mask.dtype).min].abs().max().item()
    return 2 * error * larger * gain


def compare(got, expected, allowed, dtype=torch.float32):
    z, lse = got[0].cpu().double(), got[1]
    assert torch.isfinite(z).all()
    assert (z - expected[0]).abs().max().item() <= allowed
    if lse is not None:
        lse = lse.cpu().double()
        assert lse.shape == expected[1].shape
        assert torch.equal(lse == -torch.inf, expected[1] == -torch.inf)
        seen = expected[1] > -torch.inf
        largest = max(1.0, float(expected[1][seen].abs().max())) if seen.any() else 1.0
        torch.testing.assert_close(lse, expected[1], rtol=0, atol=4e-6 * largest)


def low(tensors, dtype):
    return [x.to(dtype) for x in tensors]


def step(dtype=torch.float32, **sizes):
    """Inputs of a decode step in low precision: by default two rows, one query, a few blocks of keys."""
    given = {"batch": 2, "heads": 4, "key_heads": 2, "n": 1, "keys": 44, "dim": 16} | sizes
    return low(qkv(**given), dtype)


def random_roles(rows, keys, seed=0):
    return torch.randint(0, 6, (rows, keys), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_edits(batch, n, heads, dim, seed=3):
    """Every head edit; replaced values are NaN where the mask does not ask for them."""
    generator = torch.Generator().manual_seed(seed)
    scale, shift = (
        torch.randn(batch, n, heads, generator=generator),
        torch.randn(batch, n, heads, dim, generator=generator),
    )
    replace = torch.randn(batch, n, heads, dim, generator=generator)
    mask = torch.rand(batch, n, heads, generator=generator) < 0.4
    replace[~mask] = torch.nan
    return emo.HeadEdits(scale, shift, replace, mask)

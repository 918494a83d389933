"""Decode problems for the native kernels, their float64 answers, and how far a half-precision answer may be off."""

import torch

import emokernels as emo
from emokernels import reference
from emokernels.problem import make_problem

FIELDS = ("bias", "scale", "abs", "gain")


def routes(heads, rows=1, fields=FIELDS, seed=1):
    """Tables whose every entry differs from the identity; gains from 0.2 to 2."""
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for name in fields:
        noise = torch.rand(rows, heads, 6, 6, generator=generator) * 1.8 - 0.8
        tables[name] = {"bias": noise, "scale": 1 + 0.5 * noise, "abs": 0.3 * noise, "gain": 1 + noise}[name]
    return emo.Routes(**tables)


def problem(
    *, batch=1, heads=4, key_heads=2, n=1, keys=70, dim=64, dtype=torch.float32, device="cpu", fields=(), rows=1,
    mask=None, lengths=None, causal=True, window=None, softcap=None, scale=None, layout="plain", seed=0,
):  # fmt: skip
    """`rows`: batch rows of tables and roles. `mask`: a name of `MASKS`. `layout`: how k and v lie in memory."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q = normal(batch, heads, n, dim)
    k, v = (lay_out(normal(batch, key_heads, keys, dim), layout) for _ in range(2))
    roles = query_roles = tables = None
    if fields:
        tables = routes(heads, rows, fields, seed + 1)
        roles = torch.randint(0, 6, (rows, keys), generator=generator, dtype=torch.uint8)
        query_roles = torch.randint(0, 6, (rows, n), generator=generator, dtype=torch.uint8)
    chosen = None if mask is None else MASKS[mask](batch, heads, n, keys, generator, dtype)
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.int32)
    made = make_problem(q, k, v, roles, query_roles, tables, chosen, causal, scale, window, softcap, lengths)
    if device == "cpu":
        return made
    moved = {name: x.to(device) for name, x in made._asdict().items() if isinstance(x, torch.Tensor)}
    moved |= {name: lay_out(moved[name].clone(), layout) for name in ("k", "v")}
    return made._replace(**moved)


def lay_out(x, layout):
    """The same values as [B, Hkv, K, D] with other strides. Memory around them is NaN."""
    batch, heads, keys, dim = x.shape
    if layout == "plain":
        return x
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:1].expand(batch, -1, -1, -1)
    if layout == "static cache":
        room = torch.full((batch, heads, keys + 40, dim), torch.nan, dtype=x.dtype, device=x.device)
        room[:, :, :keys] = x
        return room[:, :, :keys]
    step = 8 if layout == "wide rows" else 1  # "unaligned": rows that do not start at multiples of 16 bytes
    room = torch.full((batch, heads, keys, dim + 2 * step), torch.nan, dtype=x.dtype, device=x.device)
    room[..., step : step + dim] = x
    return room[..., step : step + dim]


LAYOUTS = ("plain", "transposed", "expanded", "static cache", "wide rows", "unaligned")


def _some(batch, heads, n, keys, generator):
    seen = torch.rand(batch, heads, n, keys, generator=generator) < 0.6
    seen[0, :, n - 1] = False  # a row without keys
    return seen


MASKS = {
    "bool": lambda b, h, n, k, g, t: _some(b, 1, n, k, g),
    "bool per head": lambda b, h, n, k, g, t: _some(b, h, n, k, g),
    "padding": lambda b, h, n, k, g, t: (torch.arange(k) >= 3)[None, None, None].expand(b, 1, n, k),
    "float32": lambda b, h, n, k, g, t: torch.randn(b, 1, n, k, generator=g).masked_fill(
        ~_some(b, 1, n, k, g), -torch.inf
    ),
    "lowest": lambda b, h, n, k, g, t: (
        torch.randn(1, h, n, k, generator=g).to(t).masked_fill(~_some(1, h, n, k, g), torch.finfo(t).min)
    ),
}


def exact(made):
    """z and lse in float64."""
    return reference.attend(made._replace(q=made.q.double(), k=made.k.double(), v=made.v.double()))


def budget(made):
    """Twice the error of plain attention in the problem's dtype, scaled by the largest gain.

    Plain attention over one key is exact, so two roundings of the output are allowed in any case: weight and result.
    """
    bare = made._replace(roles=None, query_roles=None, bias=None, factor=None, magnitude=None, gain=None)
    error = float((eager(bare).double() - exact(bare)[0]).abs().max())
    gain = 1.0 if made.gain is None else max(1.0, float(made.gain.abs().max()))
    return 2 * gain * error + torch.finfo(made.q.dtype).eps * float(exact(made)[0].abs().max()) + 1e-6


def eager(made):
    """What a model's eager attention computes: products in its dtype, softmax in float32. No tables, no soft cap."""
    share = made.q.shape[1] // made.k.shape[1]
    k, v = made.k.repeat_interleave(share, 1), made.v.repeat_interleave(share, 1)
    visible, additive = reference.attention._visibility(made)
    s = (made.q @ k.mT) * made.scale
    if additive is not None:
        s = s + additive.to(s.dtype)
    s = s.masked_fill(~visible, -torch.inf)
    p = torch.softmax(s, -1, dtype=torch.float32).nan_to_num(0.0)
    return p.to(v.dtype) @ v


def assert_correct(got, made):
    z, lse = got
    z0, lse0 = exact(made)
    assert z.shape == z0.shape
    assert z.dtype == made.q.dtype
    assert z.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32
    error = (z.double() - z0).abs().max()
    assert error <= budget(made), f"error {float(error):.2e}, budget {budget(made):.2e}"
    assert torch.equal(lse == -torch.inf, lse0 == -torch.inf)
    assert (z[(lse0 == -torch.inf)] == 0).all()
    torch.testing.assert_close(lse.double(), lse0, rtol=2e-6, atol=4e-6)

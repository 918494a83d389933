"""Random problems for the attention tests."""

import pytest
import torch

import emokernels as emo
from emokernels import composed

LLAVA = [1] * 3 + [2] * 10 + [3] * 6 + [4]
"""Roles of a prompt as LLaVA lays it out, small."""
VIDEO = [1, 1, 2, 2, 2, 3, 2, 2, 2, 3, 3, 2, 2, 2, 1, 3, 3, 3, 3, 4]
"""Frames with timestamps between them."""


def qkv(batch=1, heads=4, key_heads=2, n=20, keys=None, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = n if keys is None else keys
    q = torch.randn(batch, heads, n, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, key_heads, keys, dim, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, key_heads, keys, dim, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def random_routes(heads=4, rows=1, fields=("bias", "scale", "abs", "gain"), seed=1, dtype=torch.float64):
    """Every entry different from the identity."""
    generator = torch.Generator().manual_seed(seed)
    spread = {"bias": (0.0, 1.0), "scale": (1.0, 0.5), "abs": (0.0, 0.3), "gain": (1.0, 0.7)}
    tables = {}
    for name in fields:
        centre, width = spread[name]
        noise = torch.randn(rows, heads, 6, 6, generator=generator, dtype=torch.float64)
        tables[name] = (centre + width * noise).to(dtype)
    return emo.Routes(**tables)


def visual_routes(heads=4, by=1.7, fields=("bias", "gain"), boosted=None, dtype=torch.float32):
    """A boost of VISUAL keys for QUERY, LAST and GENERATED rows."""
    routes = emo.Routes.identity(heads, fields=fields, dtype=dtype)
    for head in range(heads) if boosted is None else boosted:
        for dst in (emo.Role.QUERY, emo.Role.LAST, emo.Role.GENERATED):
            for name, table in routes.tables():
                table[:, head, dst, emo.Role.VISUAL] = by if name != "bias" else by - 1
    return routes


def roles_of(*rows):
    return torch.tensor(rows, dtype=torch.uint8)


def force(monkeypatch, engine):
    """Send small problems to the engine that large ones use: "spans" or "tiles"."""
    if engine == "spans":
        monkeypatch.setattr(composed, "SMALL_SCORES", 0)
        monkeypatch.setattr(composed, "FEW_ROWS", 0)
        monkeypatch.setattr("emokernels.composed.plan.BLOCK_ROWS", 3)
        monkeypatch.setattr("emokernels.composed.plan.BAND_ROWS", 7)
        monkeypatch.setattr("emokernels.composed.spans._plans", composed.spans.Memo(512))
    elif engine == "tiles":
        monkeypatch.setattr(composed, "FEW_ROWS", 1 << 30)
        monkeypatch.setattr("emokernels.composed.tiles.TILE", 64)


def assert_close(out, expected, tolerance=1e-11):
    z, lse = expected
    assert out.z.shape == z.shape
    assert out.lse.shape == lse.shape
    assert torch.isfinite(out.z).all()
    torch.testing.assert_close(out.z.double(), z, rtol=0, atol=tolerance)
    assert torch.equal(out.lse == -torch.inf, lse == -torch.inf)
    torch.testing.assert_close(out.lse.double(), lse, rtol=0, atol=tolerance)


backends = pytest.mark.parametrize("backend", ["reference", "composed"])

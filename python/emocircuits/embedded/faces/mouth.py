"""The mouth: two lip lines over x in [-1, 1], and what shows between them."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Colour
from .expression import Expression
from .identity import Identity

TEETH: Colour = (250, 250, 246)
TONGUE: Colour = (232, 98, 110)
_X = np.linspace(-1.0, 1.0, 25)
_BELLY = np.sqrt(np.clip(1 - _X**2, 0, 1))


def lip_lines(who: Identity, ex: Expression) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower lip, each [25] heights in half head heights, relative to the mouth's place; y down."""
    get = ex.get
    curve, opening, flat = who.rest_curve + get("curve", 0.0), max(0.0, get("mopen", 0.0)), get("flat", 0.0)
    tall = who.mouth_height
    base = -curve * 0.34 * tall * (_X**2 - 0.5)
    asym, wave = get("asym", 0.0), get("wave", 0.0)
    base = base - 0.14 * asym * _X * (_X * np.sign(asym) > 0) * np.sign(asym) + 0.05 * asym * _X
    base = base + 0.05 * tall * wave * np.sin(_X * 9)
    depth = 0.36 * tall * opening * _BELLY
    if get("round", 0.0) > 0:
        return base - 0.8 * depth, base + 0.8 * depth
    if flat > 0:  # a laugh: upper lip nearly straight, the jaw opens below it
        top = (1 - flat) * base - 0.08 * tall * flat
        return top, np.maximum(top, (1 - flat) * base - 0.08 * tall * flat + 1.25 * depth)
    if flat < 0:  # a wail: lower lip nearly straight, the opening arches above it
        low = (1 + flat) * base - 0.10 * tall * flat
        return np.minimum(low, low - 1.15 * depth), low
    band = 0.16 * tall * max(0.0, get("clench", 0.0)) * np.sqrt(np.clip(1 - _X**4, 0, 1))
    return base - 0.25 * depth - 0.5 * band, base + depth + 0.5 * band


def mouth(c: Canvas, who: Identity, ex: Expression) -> None:
    """Draw the mouth."""
    get = ex.get
    upper, lower = lip_lines(who, ex)
    gap = float((lower - upper).max())
    moved = sum(abs(get(k, 0.0)) for k in ("curve", "mopen", "wave", "asym", "clench", "tongue_out", "vomit", "bar"))
    if who.rest_mouth == "none" and moved < 0.04:
        return
    half = who.mouth_width * (1 + get("mwide", 0.0))
    up = [(half * float(x), who.mouth_y + float(y)) for x, y in zip(_X, upper, strict=True)]
    low = [(half * float(x), who.mouth_y + float(y)) for x, y in zip(_X, lower, strict=True)]
    sketch = who.style == "line"
    if gap <= 0.05:
        c.stroke(up, who.stroke, who.lips)
    else:
        cavity: Colour = (70, 66, 66) if sketch else who.cavity
        c.area([*up, *low[::-1]], cavity if who.style != "outline" or get("round", 0.0) > 0 else (255, 255, 255))
        _inside(c, who, ex, up, low, gap)
        c.area([*up, *low[::-1]], None, who.ink, max(0.03, 0.5 * who.stroke))
    if get("tongue_out", 0.0) > 0.25:
        k, (x, y) = get("tongue_out", 0.0), low[13]
        y -= 0.02
        c.area([(x - 0.14, y), (x + 0.14, y), (x + 0.14, y + 0.16 * k), (x + 0.08, y + 0.28 * k),
                (x - 0.08, y + 0.28 * k),
                (x - 0.14, y + 0.16 * k)], (200, 200, 200) if sketch else TONGUE, who.ink, 0.025)  # fmt: skip


def _inside(c: Canvas, who: Identity, ex: Expression, up: list, low: list, gap: float) -> None:
    """Teeth and tongue between the lips."""
    get = ex.get
    if get("clench", 0.0) > 0.15 and get("round", 0.0) <= 0 and get("flat", 0.0) == 0:
        c.area([*up, *low[::-1]], TEETH)
        mid = [((a + b) / 2, (y + z) / 2) for (a, y), (b, z) in zip(up, low, strict=True)]
        c.stroke(mid, 0.02, who.ink)
        for i in range(4, 24, 4):
            c.stroke([up[i], low[i]], 0.02, who.ink)
        return
    if get("tongue", 0.0) > 0.2 and gap > 0.12:
        inner = range(5, 20)
        ridge = [(up[i][0], low[i][1] - 0.45 * (low[i][1] - up[i][1]) * float(_BELLY[i])) for i in inner]
        c.area([*ridge, *[low[i] for i in reversed(inner)]], TONGUE if who.style != "line" else (200, 200, 200))
    if get("teeth", 0.0) > 0.12 and gap > 0.08:
        share = min(0.6, 0.2 + 0.3 * get("teeth", 0.0))
        edge = [(a, y + (z - y) * share) for (a, y), (_, z) in zip(up, low, strict=True)]
        c.area([*up, *edge[::-1]], TEETH)

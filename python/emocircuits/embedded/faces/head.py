"""What stands around the expression: background, body, head, hair, ears, nose, glasses."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .canvas import Canvas, Colour, Point, mix
from .identity import CLOTH, HAIR, STYLE, Identity

PAPER: Colour = (248, 246, 240)


def background(c: Canvas, who: Identity) -> None:
    """Fill the picture behind the figure."""
    s, base = c.pixels, who.background_colour
    if who.style == "line":
        c.draw.rectangle([0, 0, s, s], fill=PAPER)
    elif who.background == "gradient":
        top, bottom = mix(base, (255, 255, 255), 0.3), mix(base, (20, 20, 40), 0.35)
        ramp = np.linspace(top, bottom, 64).astype(np.uint8)[:, None, :]
        c.image.paste(Image.fromarray(ramp).resize((s, s)), (0, 0))
    elif who.background == "window":
        frame = mix(base, (60, 40, 20), 0.6)
        c.draw.rectangle(
            [0.05 * s, 0.06 * s, 0.36 * s, 0.5 * s], fill=mix(base, (190, 225, 255), 0.8), outline=frame, width=5
        )
        c.draw.line([0.205 * s, 0.06 * s, 0.205 * s, 0.5 * s], fill=frame, width=3)
    elif who.background == "stripes":
        for i in range(0, 10, 2):
            c.draw.rectangle([i * s / 10, 0, (i + 1) * s / 10, s], fill=mix(base, (255, 255, 255), 0.35))
    elif who.background == "park":
        c.draw.rectangle([0, 0, s, 0.62 * s], fill=(168, 206, 236))
        c.draw.rectangle([0, 0.62 * s, s, s], fill=(110, 160, 90))
        c.draw.ellipse([0.72 * s, 0.28 * s, 1.05 * s, 0.66 * s], fill=(70, 120, 66))


def outline(who: Identity) -> list[Point]:
    """The head's edge in face coordinates: an ellipse, bent towards a box by ``squareness``."""
    power = 2.0 / (2.0 + 4.0 * who.squareness)
    t = np.linspace(0.0, 2.0 * np.pi, 48, endpoint=False)
    x = np.sign(np.cos(t)) * np.abs(np.cos(t)) ** power
    y = np.sign(np.sin(t)) * np.abs(np.sin(t)) ** power
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _band(top: float, width: float, dip: float) -> list[Point]:
    """Cap over the head down to the line ``top``; ``dip`` bends that line."""
    t = np.linspace(np.pi, 2 * np.pi, 24)
    edge = [(width * float(np.cos(a)), 1.06 * float(np.sin(a)) * 1.0) for a in t if 1.06 * np.sin(a) < top]
    line = [(x, top + dip * (1 - (x / width) ** 2)) for x in np.linspace(edge[-1][0], edge[0][0], 9)]
    return edge + [(float(x), float(y)) for x, y in line]


def body(c: Canvas, who: Identity) -> None:
    """Long hair behind, shoulders and neck of a person."""
    sketch = who.style == "line"
    ink, w = who.ink, STYLE[who.style].outline
    hair = PAPER if sketch else HAIR[who.hair]
    cloth = PAPER if sketch else CLOTH[who.cloth]
    line = ink if w else None
    if who.hair_style in (3, 6):
        c.area([(x * 1.25, y * 1.15 + 0.12) for x, y in outline(who)], hair, line, w)
    r = 0.38 / c.radius[0]
    shoulders = [(-r, 1.9), (-r, 1.15), (-0.75 * r, 0.98), (0.75 * r, 0.98), (r, 1.15), (r, 1.9), (r, 3.0), (-r, 3.0)]
    c.area(shoulders, cloth, line, w)
    c.area([(-0.3, 0.6), (0.3, 0.6), (0.3, 1.08), (-0.3, 1.08)], PAPER if sketch else mix(who.skin, (0, 0, 0), 0.1))


def head(c: Canvas, who: Identity, skin: Colour) -> None:
    """Head and ears in the given skin colour."""
    w = STYLE[who.style].outline
    line = who.ink if w else None
    if who.ears:
        for side in (-1, 1):
            c.oval(side * 1.0, 0.02, 0.16, 0.2, skin, line, w)
    c.area(outline(who), skin, line, w)
    if not STYLE[who.style].outline and who.style in ("emoji", "gloss") and who.noise > 4:
        c.area(outline(who), None, mix(who.skin, (120, 60, 0), 0.35), 0.05)


def hair(c: Canvas, who: Identity) -> None:
    """Hair or hat on top, beard below; drawn over the head, under the eyes."""
    sketch = who.style == "line"
    ink, w = who.ink, STYLE[who.style].outline
    colour = PAPER if sketch else HAIR[who.hair]
    line = ink if w else None
    if who.hat:
        cloth = PAPER if sketch else CLOTH[who.cloth]
        c.area([(-1.0, -1.15), (1.0, -1.15), (1.0, -0.72), (-1.0, -0.72)], cloth, line, w)
        c.area([(-1.2, -0.78), (1.2, -0.78), (1.2, -0.64), (-1.2, -0.64)], mix(cloth, (0, 0, 0), 0.25), line, w)
    elif who.hair_style in (0, 3):
        c.area(_band(-0.48, 1.05, -0.12), colour, line, w)
    elif who.hair_style == 1:
        c.area([(-1.05, -0.1), *_band(-0.45, 1.05, -0.05), (-0.2, -0.62), (-0.9, -0.35)], colour, line, w)
    elif who.hair_style == 2:
        for a in np.pi * np.linspace(1.06, 1.94, 7):
            c.oval(float(np.cos(a)), float(np.sin(a)), 0.24, 0.24, colour, line, w)
    elif who.hair_style == 4:
        c.area(_band(-0.62, 1.03, 0.1), colour, line, w)
    elif who.hair_style == 6:
        c.area(_band(-0.42, 1.05, -0.35), colour, line, w)
    if sketch and who.hair_style != 5 and not who.hat:  # hatching carries the hair colour
        step = {"black": 2, "brown": 3, "red": 4, "gray": 6, "blond": 9}[who.hair]
        for k in range(2, 38, step):
            x = -0.9 + 1.8 * k / 40
            y = -float(np.sqrt(max(0.0, 1.0 - x * x)))
            c.stroke([(x, y * 0.98), (x, y * 0.98 + 0.2)], 0.02, ink)
    if who.beard:
        t = np.linspace(0.15 * np.pi, 0.85 * np.pi, 14)
        low = [(0.97 * float(np.cos(a)), 1.02 * float(np.sin(a))) for a in t]
        c.area([*low, (-0.6, 0.62), (0.6, 0.62)], mix(who.skin, HAIR[who.hair], 0.3 if sketch else 0.6))


def nose(c: Canvas, who: Identity) -> None:
    """A small nose, if this identity has one."""
    if who.nose:
        c.arc(0.0, 0.12, 0.10, 0.08, 20, 160, max(0.03, 0.5 * who.stroke), mix(who.skin, who.ink, 0.7))


def glasses(c: Canvas, who: Identity) -> None:
    """Thin round glasses over the eyes, if this identity wears them."""
    if who.glasses:
        for side in (-1, 1):
            c.oval(side * who.eye_x, who.eye_y, 0.27, 0.27, None, (50, 50, 60), 0.03)
        c.stroke([(-who.eye_x + 0.26, who.eye_y), (who.eye_x - 0.26, who.eye_y)], 0.03, (50, 50, 60))

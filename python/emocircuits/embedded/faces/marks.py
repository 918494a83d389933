"""Colour of the skin and the marks that drawings add to a face: blush, tears, sweat, veins, steam, hands."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Colour, mix
from .expression import Expression
from .head import PAPER
from .identity import STYLE, Identity

WATER: Colour = (93, 173, 236)


def skin_colour(who: Identity, ex: Expression) -> Colour:
    """Skin with the expression's red, pale or green in it."""
    if who.style == "line":
        return PAPER
    tint = STYLE[who.style].tint
    skin = mix(who.skin, (222, 48, 48), tint * ex.get("red", 0.0))
    skin = mix(skin, (238, 238, 246), 0.8 * tint * ex.get("pale", 0.0))
    return mix(skin, (125, 176, 80), tint * ex.get("green", 0.0))


def under_eyes(c: Canvas, who: Identity, ex: Expression, skin: Colour) -> None:
    """Marks that lie on the skin, below eyes and mouth: blush, puffed cheeks, wrinkled nose."""
    get, line = ex.get, who.style == "line"
    if get("blush", 0.0) > 0.03:
        colour = mix(skin, (200, 200, 200) if line else (250, 95, 85), 0.75 * min(1.0, get("blush", 0.0)))
        for side in (-1, 1):
            c.oval(side * 0.64, who.eye_y + 0.36, 0.2, 0.14, colour)
    if get("puff", 0.0) > 0.1:
        for side in (-1, 1):
            c.arc(
                side * 0.62,
                who.mouth_y,
                0.14,
                0.2 * get("puff", 0.0),
                90 - 90 * side - 80,
                90 - 90 * side + 80,
                0.03,
                mix(skin, who.ink, 0.6),
            )
    if get("wrinkle", 0.0) > 0.08:
        colour = mix(skin, who.ink, min(1.0, 0.35 + 0.6 * get("wrinkle", 0.0)))
        for k in (-1, 0, 1):
            c.stroke([(0.08 * k - 0.05, -0.12), (0.08 * k, 0.0)], 0.03, colour)
        for side in (-1, 1):
            c.stroke([(side * 0.2, 0.1), (side * 0.36, 0.26)], 0.03, colour)


def over_face(c: Canvas, who: Identity, ex: Expression) -> None:
    """Marks that lie on top: tears, streams, sweat, vein, steam, what comes out of the mouth, hands."""
    get = ex.get
    water: Colour = (205, 218, 230) if who.style == "line" else WATER
    if get("tears", 0.0) > 0.08:
        k = min(1.2, get("tears", 0.0))
        for side in (-1, 1) if who.phase > 3 and k > 0.4 else (-1,):
            _drop(c, side * (who.eye_x + 0.06), who.eye_y + 0.34 + 0.12 * k, 0.07 + 0.07 * k, water)
    if get("stream", 0.0) > 0.15:
        k = min(1.0, get("stream", 0.0))
        for side in (-1, 1):
            x, top = side * (who.eye_x + 0.02), who.eye_y + 0.16
            c.area([(x - 0.1, top), (x + 0.1, top), (x + 0.13, top + 0.8 * k), (x - 0.13, top + 0.8 * k)], water)
    if get("joy", 0.0) > 0.3:
        for side in (-1, 1):
            c.oval(side * 0.88, who.eye_y + 0.22, 0.15, 0.19, water)
    if get("sweat", 0.0) > 0.1:
        _drop(c, 0.68, -0.45, 0.07 + 0.08 * min(1.2, get("sweat", 0.0)), water)
    if get("vein", 0.0) > 0.1:
        r = 0.06 + 0.1 * min(1.2, get("vein", 0.0))
        for ax, ay, a in ((-1, -1, 0), (1, -1, 90), (1, 1, 180), (-1, 1, 270)):
            c.arc(0.52 + ax * r, -0.62 + ay * r, 0.8 * r, 0.8 * r, a, a + 90, 0.05, (190, 20, 30))
    if get("steam", 0.0) > 0.2:
        k = min(1.0, get("steam", 0.0))
        for side in (-1, 1):
            for i, r in enumerate((0.10, 0.14, 0.18)):
                c.oval(side * (0.2 + 0.28 * i * k), 0.2 + 0.1 * i, r * k, r * k, (238, 240, 244), (150, 160, 170), 0.02)
    if get("vomit", 0.0) > 0.3:
        k, y = min(1.0, get("vomit", 0.0)), who.mouth_y
        c.area(
            [(-0.24, y), (0.24, y), (0.34, y + 0.75 * k), (-0.34, y + 0.75 * k)],
            (150, 200, 60),
            mix((150, 200, 60), (0, 0, 0), 0.3),
            0.025,
        )
    if get("bar", 0.0) > 0.35:  # a censored shout
        y = who.mouth_y
        c.area([(-0.68, y - 0.17), (0.68, y - 0.17), (0.68, y + 0.19), (-0.68, y + 0.19)], (24, 22, 24))
        for i in range(4):
            x = -0.48 + 0.32 * i
            c.stroke(
                [(x - 0.08, y - 0.08 + 0.1 * (i % 2)), (x + 0.02, y + 0.1), (x + 0.08, y - 0.08)], 0.05, (250, 250, 250)
            )
    if get("hands", 0.0) > 0.4:
        colour = mix(who.skin, (255, 255, 255), 0.15) if STYLE[who.style].person else mix(who.skin, (190, 110, 0), 0.45)
        for side in (-1, 1):
            c.oval(side * 0.72, 0.62, 0.2, 0.4, colour, who.ink, 0.025)


def _drop(c: Canvas, x: float, y: float, r: float, colour: Colour) -> None:
    """A drop hanging at (x, y) with radius r."""
    t = np.linspace(-0.2 * np.pi, 1.2 * np.pi, 12)
    round_part = [(x + r * float(np.cos(a)), y + r * float(np.sin(a))) for a in t]
    c.area([*round_part, (x, y - 2.3 * r)], colour, mix(colour, (30, 70, 140), 0.4), 0.02)

"""Eyes and brows."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Colour, mix
from .expression import Expression
from .identity import HAIR, Identity

WHITE: Colour = (252, 252, 252)
CLOSED = 0.45  # from here on a lid or cross channel draws a closed eye


def eyes(c: Canvas, who: Identity, ex: Expression, skin: Colour) -> None:
    """Both eyes."""
    for side in (-1, 1):
        _eye(c, who, ex, skin, side)


def _closed(c: Canvas, who: Identity, ex: Expression, side: int) -> bool:
    """Draw the eye as a line if the expression closes it; tell whether it did."""
    x, y, r, w = side * who.eye_x, who.eye_y, who.eye_size, max(0.05, who.stroke)
    lid = ex.get("lid", 0.0)
    if ex.get("cross", 0.0) >= CLOSED:  # > on the left, < on the right
        c.stroke([(x + side * 1.1 * r, y - r), (x - side * 0.8 * r, y), (x + side * 1.1 * r, y + r)], w, who.ink)
    elif lid >= CLOSED:
        c.arc(x, y + 0.45 * r, 1.25 * r, 1.25 * r, 190, 350, w, who.ink)
    elif lid <= -CLOSED:
        c.arc(x, y - 0.25 * r, 1.2 * r, 0.9 * r, 20, 160, w, who.ink)
    else:
        return False
    return True


def _eye(c: Canvas, who: Identity, ex: Expression, skin: Colour, side: int) -> None:
    if _closed(c, who, ex, side):
        return
    get = ex.get
    x, y, r, w = side * who.eye_x, who.eye_y, who.eye_size, max(0.025, 0.5 * who.stroke)
    wide, squint, droop = get("wide", 0.0), get("squint", 0.0), get("droop", 0.0)
    opening = (
        1 + who.rest_eye + 1.1 * wide - squint - 0.35 * droop - 0.5 * abs(get("lid", 0.0)) - 0.4 * get("cross", 0.0)
    )
    opening = float(np.clip(opening, 0.14, 1.8))
    h, rx = r * opening, r * (1 + 0.25 * wide)
    look_x, look_y = 0.4 * r * get("gaze_x", 0.0), 0.35 * r * get("gaze", 0.0)
    pupil = 0.58 + 0.5 * get("pupil", 0.0)  # an empty eye below 0.1
    pupil = r * float(np.clip(pupil, 0.2, 0.8)) if pupil > 0.1 else 0.0
    if who.eye == "slit" and abs(opening - 1) < 0.12:
        c.stroke([(x - r, y), (x + r, y)], who.stroke, who.ink)
    elif who.eye in ("dot", "bead", "slit"):
        if wide > 0.16 and who.white_when_wide:
            c.oval(x, y, rx * 1.25, h * 1.15, WHITE, who.ink if who.style != "emoji" else None, w)
            if pupil > 0:
                c.oval(x + look_x, y + look_y, pupil, pupil, who.ink)
        else:
            c.oval(x + 0.6 * look_x, y + 0.6 * look_y, rx * 0.82, h * 0.82 * who.eye_tall, who.ink)
            if who.eye == "bead":
                c.oval(x + 0.25 * r, y - 0.45 * h, 0.25 * r, 0.25 * r, WHITE)
    elif who.eye == "manga":
        h *= 1.7
        c.oval(x, y, rx * 1.15, h, WHITE, who.ink, w)
        size = 0.85 + 0.6 * get("pupil", 0.0)
        c.oval(x + look_x, y + look_y, rx * size * 0.95, min(h, r * 1.45 * size), who.iris)
        c.oval(x + look_x, y + look_y, rx * size * 0.5, min(h * 0.7, r * 0.8 * size), (16, 12, 14))
        c.oval(x + look_x + 0.3 * r, y + look_y - 0.5 * min(h, r), 0.3 * r, 0.35 * r, WHITE)
        c.arc(x, y, rx * 1.15, h, 200, 340, 2.4 * w, who.ink)
    else:
        line = None if who.eye == "plain" else who.ink
        c.oval(x, y, rx * (1.2 if who.eye == "plain" else 1.0), h, WHITE if who.eye != "ring" else skin, line, w)
        tall = min(pupil, h * 0.95)
        colour = who.iris if who.eye == "white" and sum(who.iris) < 300 else who.ink
        if pupil > 0:
            c.oval(x + look_x, y + float(np.clip(look_y, tall - h, h - tall)), pupil, tall, colour)
    _lids(c, who, ex, skin, side, rx * 1.2, h)
    if who.lashes:
        for k in (-0.6, 0.0, 0.6):
            c.stroke([(x + k * r, y - h), (x + 1.5 * k * r, y - h - 0.10)], 0.025, who.ink)


def _lids(c: Canvas, who: Identity, ex: Expression, skin: Colour, side: int, rx: float, h: float) -> None:
    """Upper lid that hangs on the outside (grief, anger hangs inside), lower lid pushed up by a smile."""
    x, y, w = side * who.eye_x, who.eye_y, max(0.03, 0.6 * who.stroke)
    ratio = c.radius[0] / c.radius[1]
    h *= ratio
    droop = ex.get("droop", 0.0)
    if droop > 0.05:
        outer, inner = y - h + 1.3 * h * droop, y - h + 0.2 * h * droop
        xo, xi = x + side * rx * 1.1, x - side * rx * 1.1
        c.area([(xo, y - 1.25 * h), (xi, y - 1.25 * h), (xi, inner), (xo, outer)], skin)
        c.stroke([(xi, inner), (xo, outer)], w, who.ink)
    if ex.get("bin", 0.0) < -0.14 and who.eye not in ("manga",):
        cut = min(0.9, -2.0 * ex["bin"])
        xo, xi = x + side * rx * 1.1, x - side * rx * 1.1
        c.area([(xo, y - 1.3 * h), (xi, y - 1.3 * h), (xi, y - h + 1.1 * h * cut), (xo, y - h)], skin)
    if ex.get("squint", 0.0) > 0.12 and ex.get("curve", 0.0) > 0:
        c.area([(x - 1.1 * rx, y + h), (x - 0.7 * rx, y + 0.45 * h), (x, y + 0.3 * h),
                (x + 0.7 * rx, y + 0.45 * h), (x + 1.1 * rx, y + h),
                (x, y + 1.3 * h)], skin)  # fmt: skip
        c.stroke([(x - 0.8 * rx, y + 0.6 * h), (x, y + 0.35 * h), (x + 0.8 * rx, y + 0.6 * h)], 0.5 * w, who.ink)


def brows(c: Canvas, who: Identity, ex: Expression) -> None:
    """Brows; figures without brows at rest grow them when the expression moves them."""
    get = ex.get
    inner, outer, lift, quirk = get("bin", 0.0), get("bout", 0.0), get("blift", 0.0), get("quirk", 0.0)
    if not who.brows and abs(inner) + abs(outer) + abs(lift) + abs(quirk) < 0.10:
        return
    wide = max(0.0, who.rest_eye + get("wide", 0.0))
    tall = 1.7 if who.eye == "manga" else 1.15
    colour = who.ink
    if who.style in ("photo", "cartoon", "avatar", "manga", "pixel") and (
        sum(who.skin) > 400 or who.hair in ("blond", "gray")
    ):
        colour = mix(HAIR[who.hair], (20, 15, 15), 0.4)
    for side in (-1, 1):
        x = side * who.eye_x
        y = who.eye_y - 0.13 - tall * who.eye_size * (1 + 0.5 * wide) - 0.55 * lift - 0.6 * max(0.0, side * quirk)
        yi, yo = y - 0.6 * (inner + who.rest_brow), y - 0.6 * outer
        half = 0.16 + 0.4 * who.eye_size * 0.3
        path = [(x - side * half, yi), (x, (yi + yo) / 2 - who.brow_bend), (x + side * half, yo)]
        c.stroke(path, who.brow_width if who.style != "line" else 0.5 * who.brow_width, colour)

"""Put identity and expression together into a picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from . import eyes, head, marks, mouth
from .canvas import OVERSAMPLE, Canvas
from .expression import Expression, check_emotion, sample_expression
from .identity import STYLE, Identity, identity_of

SIZE = 64


def _finish(image: Image.Image, who: Identity, ex: Expression) -> Image.Image:
    """Light, blue forehead, blur, raster and noise at the final size; all but the forehead belong to the identity."""
    out = image.reduce(OVERSAMPLE)
    shade, blue = STYLE[who.style].shade, min(1.0, ex.get("blue", 0.0))
    if who.grid:
        out = out.resize((who.grid, who.grid), Image.Resampling.BOX).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    if who.style == "photo":
        out = out.filter(ImageFilter.GaussianBlur(0.45))
    if not (shade or blue > 0.05 or who.noise):
        return out
    x: NDArray[np.floating] = np.asarray(out, np.float32)
    place = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    u, v = (place - who.centre[0]) / who.radius[0], (place - who.centre[1]) / who.radius[1]
    r2 = (u**2)[None, :] + (v**2)[:, None]
    inside = (r2 < 1.0).astype(np.float32)
    if blue > 0.05 and not STYLE[who.style].person:
        soft = np.clip(-0.1 - 1.3 * v, 0, 1) if who.phase > 2.5 else 0.7 * (v < -0.25 - 0.2 * who.eye_x)
        ramp = soft[:, None] * inside * 0.8 * blue
        x = x + (np.array([110, 150, 225], np.float32) - x) * ramp[..., None]
    if shade == "soft":
        lit = np.clip((u[None, :] + 0.4) ** 2 + (v[:, None] + 0.4) ** 2, 0, 2) / 2
        x = x * (1 - 0.35 * who.shade * lit * inside)[..., None]
    elif shade == "gloss":
        down = (np.clip(0.5 + 0.5 * v, 0, 1)[:, None] * inside * who.shade)[..., None]
        x = x * (1 - down * np.array([0.08, 0.28, 0.45], np.float32))
        x = x + (255 - x) * (0.25 * who.shade * np.clip(-v, 0, 1)[:, None] * inside)[..., None]
    if who.noise:
        x = x + np.random.default_rng(who.noise_seed).normal(0, who.noise, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(x, 0, 255).astype(np.uint8))


def render(identity: Identity, expression: Expression) -> Image.Image:
    """Draw ``identity`` with ``expression`` ({} is the resting, neutral face) as a 64 x 64 RGB image.

    Noise, light and everything the expression does not touch depend on the identity alone, so two expressions of one
    identity are equal, pixel for pixel, wherever neither of them draws.
    """
    who, ex = identity, expression
    skin = marks.skin_colour(who, ex)
    c = Canvas(SIZE, who.centre, who.radius, who.background_colour, who.wobble, who.phase)
    head.background(c, who)
    if STYLE[who.style].person:
        head.body(c, who)
    head.head(c, who, skin)
    if STYLE[who.style].person:
        head.hair(c, who)
    marks.under_eyes(c, who, ex, skin)
    eyes.eyes(c, who, ex, skin)
    eyes.brows(c, who, ex)
    head.glasses(c, who)
    head.nose(c, who)
    mouth.mouth(c, who, ex)
    marks.over_face(c, who, ex)
    return _finish(c.image, who, ex)


def face(identity_seed: int, emotion: str, intensity: float, expression_seed: int = 0) -> Image.Image:
    """Draw the picture with these numbers, always the same; ``face(seed, "neutral", 0.0)`` is the neutral twin.

    ``intensity`` in [0, 1]. The expression's own mixture depends on (identity_seed, emotion, expression_seed) but not
    on intensity, so a series over intensity shows one expression growing. Held-out identities: seeds from 100000.
    """
    who = identity_of(identity_seed)
    rng = np.random.default_rng([12, identity_seed, expression_seed, *check_emotion(emotion).encode()])
    return render(who, sample_expression(emotion, intensity, rng))

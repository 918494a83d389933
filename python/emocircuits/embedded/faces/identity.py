"""Who is drawn: style, colours, proportions and the resting face. All that the expression never changes."""

from __future__ import annotations

import dataclasses as dc

import numpy as np

from .canvas import Colour, mix

HAIR: dict[str, Colour] = {
    "black": (35, 30, 32), "brown": (96, 62, 38), "blond": (224, 190, 110), "red": (176, 74, 40),
    "gray": (160, 160, 165),
}  # fmt: skip
CLOTH: dict[str, Colour] = {
    "blue": (60, 100, 180), "green": (60, 140, 80), "white": (232, 232, 228), "purple": (128, 70, 150),
    "orange": (226, 130, 50),
}  # fmt: skip
SKIN: tuple[Colour, ...] = ((255, 219, 190), (240, 194, 160), (214, 160, 120), (168, 112, 78), (112, 74, 52))
YELLOW: tuple[Colour, ...] = (
    (255, 204, 77),
    (252, 194, 27),
    (255, 222, 110),
    (253, 216, 53),
    (255, 234, 120),
    (250, 184, 40),
)
BACKGROUNDS = ("plain", "gradient", "window", "stripes", "park")
INK: tuple[Colour, ...] = ((20, 18, 20), (40, 34, 36), (102, 69, 0), (90, 45, 10), (70, 40, 60))


@dc.dataclass(frozen=True)
class Style:
    """One way of drawing; ``outline`` and ``stroke`` in half head widths; a ``person`` has hair and clothes."""

    name: str
    weight: float
    person: bool
    outline: float
    stroke: tuple[float, float]
    eyes: tuple[str, ...]
    brows: float  # share of identities whose brows show on the resting face
    nose: float  # share of identities with a nose
    shade: str  # "", "soft" (round light), "gloss" (vertical gradient)
    tint: float  # how far red, green and pale skin go at full strength


_STYLES = (
    Style("photo", 0.13, True, 0.0, (0.03, 0.06), ("white",), 1.0, 1.0, "soft", 0.45),
    Style("cartoon", 0.12, True, 0.035, (0.04, 0.07), ("white", "dot", "plain", "manga"), 0.9, 0.8, "", 0.55),
    Style("line", 0.07, True, 0.035, (0.03, 0.05), ("white", "dot", "ring", "dot"), 0.9, 0.8, "", 0.3),
    Style(
        "avatar", 0.15, True, 0.0, (0.04, 0.09), ("dot", "dot", "bead", "plain", "white", "slit"), 0.75, 0.6, "", 0.55
    ),
    Style("manga", 0.08, True, 0.025, (0.03, 0.05), ("manga",), 0.9, 0.4, "", 0.5),
    Style("pixel", 0.05, True, 0.0, (0.09, 0.13), ("dot", "plain"), 0.7, 0.4, "", 0.6),
    Style("child", 0.06, True, 0.045, (0.05, 0.09), ("dot", "ring", "white"), 0.5, 0.5, "", 0.5),
    Style("emoji", 0.14, False, 0.0, (0.07, 0.11), ("dot", "dot", "dot", "dot", "plain", "slit"), 0.15, 0.0, "", 0.9),
    Style(
        "gloss",
        0.10,
        False,
        0.0,
        (0.06, 0.10),
        ("dot", "dot", "bead", "plain", "white", "slit"),
        0.3,
        0.0,
        "gloss",
        0.85,
    ),
    Style("outline", 0.07, False, 0.05, (0.05, 0.08), ("dot", "dot", "ring", "plain", "slit"), 0.15, 0.0, "", 0.8),
    Style("blob", 0.05, False, 0.0, (0.05, 0.11), ("dot", "dot", "bead", "plain", "white", "slit"), 0.3, 0.0, "", 0.6),
)
STYLE: dict[str, Style] = {s.name: s for s in _STYLES}
STYLES: tuple[str, ...] = tuple(STYLE)


@dc.dataclass(frozen=True)
class Identity:
    """One drawn person or figure. Positions are fractions of the image (centre, radius) or of the head (the rest)."""

    style: str
    skin: Colour
    ink: Colour
    hair: str
    hair_style: int
    cloth: str
    background: str
    background_colour: Colour
    centre: tuple[float, float]
    radius: tuple[float, float]
    squareness: float  # 0 round head, towards 1 a box
    stroke: float
    eye: str
    eye_x: float
    eye_y: float
    eye_size: float
    eye_tall: float  # height of dot eyes over their width
    iris: Colour
    white_when_wide: bool  # dot eyes turn into white eyes with a small pupil when wide
    lashes: bool
    brows: bool
    brow_width: float
    brow_bend: float
    nose: bool
    ears: bool
    mouth_y: float
    mouth_width: float
    mouth_height: float  # scales how far the mouth opens and bends
    rest_mouth: str  # "line", or "none": nothing drawn until an expression moves it
    lips: Colour
    cavity: Colour  # inside of the open mouth
    glasses: bool
    beard: bool
    hat: bool
    rest_curve: float
    rest_brow: float
    rest_eye: float
    shade: float
    noise: float
    noise_seed: int
    wobble: float
    phase: float
    grid: int  # pixel-art raster, 0 for none


def _skin(style: Style, rng: np.random.Generator) -> Colour:
    if style.name == "blob":
        base = tuple(int(v) for v in rng.integers(70, 250, 3))
    elif style.person:
        base = SKIN[rng.integers(len(SKIN))]
    elif style.name == "outline" and rng.random() < 0.35:
        base = (252, 250, 245)
    else:
        base = YELLOW[rng.integers(len(YELLOW))]
    return mix([c + rng.uniform(-10, 10) for c in base], (255, 255, 255), 0.0)


def sample_identity(rng: np.random.Generator) -> Identity:
    """Draw an identity; everything random comes from ``rng``."""
    u = rng.uniform
    p = np.array([s.weight for s in _STYLES])
    style = _STYLES[rng.choice(len(_STYLES), p=p / p.sum())]
    person = style.person
    skin = _skin(style, rng)
    rx = float(u(0.20, 0.36) if person else u(0.36, 0.49))
    ry = rx * float(u(1.0, 1.28) if person else u(0.97, 1.03))
    if style.name == "blob":
        rx, ry = float(u(0.34, 0.48)), float(u(0.34, 0.48))
    dark = sum(skin) < 330
    ink = INK[rng.integers(len(INK))]
    if style.name == "photo":
        ink = mix(skin, (30, 15, 10), 0.75)
    elif dark and not person:
        ink = (245, 245, 240)
    elif dark:
        ink = (18, 12, 10)
    white = rng.random() < (0.3 if person else 0.7)
    return Identity(
        style=style.name, skin=skin, ink=ink,
        hair=str(rng.choice(list(HAIR))), hair_style=int(rng.integers(7)), cloth=str(rng.choice(list(CLOTH))),
        background=str(rng.choice(BACKGROUNDS)) if person else str(rng.choice(["plain", "plain", "plain", "gradient"])),
        background_colour=(252, 252, 252) if white else mix(tuple(rng.integers(90, 250, 3)), (255, 255, 255), 0.0),
        centre=(0.5 + float(u(-0.06, 0.06)), (0.46 if person else 0.5) + float(u(-0.04, 0.04))), radius=(rx, ry),
        squareness=float(u(0.0, 0.35) if person else u(0.3, 1.0) if style.name == "blob" else rng.random() < 0.1),
        stroke=float(u(*style.stroke)), eye=str(rng.choice(style.eyes)),
        eye_x=float(u(0.28, 0.48)), eye_y=float(u(-0.28, -0.04)), eye_size=float(u(0.09, 0.19)),
        eye_tall=float(u(0.95, 1.5)),
        iris=[(60, 40, 30), (50, 90, 150), (60, 120, 70), (110, 70, 40), (20, 20, 24)][rng.integers(5)],
        white_when_wide=bool(rng.random() < 0.55), lashes=bool(person and rng.random() < 0.2),
        brows=bool(rng.random() < style.brows), brow_width=float(u(0.05, 0.11)), brow_bend=float(u(0.0, 0.08)),
        nose=bool(rng.random() < style.nose), ears=bool(person and rng.random() < 0.4),
        mouth_y=float(u(0.36, 0.54)), mouth_width=float(u(0.28, 0.48) if person else u(0.34, 0.56)),
        mouth_height=float(u(0.85, 1.35)),
        rest_mouth="none" if (not person and rng.random() < 0.10) else "line",
        lips=(170, 70, 70) if rng.random() < 0.3 else ink,
        cavity=((92, 24, 28), (60, 20, 20), (20, 12, 14), ink if sum(ink) < 400 else (40, 20, 24))[rng.integers(4)],
        glasses=bool(person and rng.random() < 0.13), beard=bool(person and rng.random() < 0.10),
        hat=bool(person and rng.random() < 0.10),
        rest_curve=float(rng.normal(0, 0.04)), rest_brow=float(rng.normal(0, 0.025)),
        rest_eye=float(rng.normal(0, 0.05)),
        shade=float(u(0.3, 1.0)), noise=float(u(1, 8) if rng.random() < 0.5 else 0.0),
        noise_seed=int(rng.integers(2**31)),
        wobble=float(u(0.006, 0.014)) if style.name == "child" else 0.0, phase=float(u(0, 6.28)),
        grid=int(rng.choice([22, 26, 32])) if style.name == "pixel" else 0,
    )  # fmt: skip


def identity_of(seed: int) -> Identity:
    """The identity with this number. Numbers below 100000 are for training, 100000 and above are held out."""
    if seed < 0:
        raise ValueError(f"identity_seed is {seed}: expected a number >= 0 (held-out identities start at 100000)")
    return sample_identity(np.random.default_rng([11, seed]))

"""Picture sheet of held-out faces: ``python -m emocircuits.embedded.sheet --out FILE.png``."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from .data import HELD_OUT
from .faces import LABELS, SIZE, STYLES, face, identity_of

INTENSITIES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.0)


def sheet(first: int = HELD_OUT) -> Image.Image:
    """Left: one identity per style with every label at full intensity. Right: emotions fading to the neutral twin."""
    by_style: dict[str, int] = {}
    seed = first
    while len(by_style) < len(STYLES):
        by_style.setdefault(identity_of(seed).style, seed)
        seed += 1
    n, gap = len(LABELS), SIZE // 4
    out = Image.new("RGB", (2 * n * SIZE + gap, len(STYLES) * SIZE), (255, 255, 255))
    for row, style in enumerate(STYLES):
        for column, label in enumerate(LABELS):
            who = by_style[style]
            fades = LABELS[row % (n - 1)]
            out.paste(face(who, label, float(label != "neutral")), (column * SIZE, row * SIZE))
            out.paste(face(who, fades, INTENSITIES[column]), ((n + column) * SIZE + gap, row * SIZE))
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m emocircuits.embedded.sheet", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    a = parser.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    sheet().save(a.out, optimize=True)


if __name__ == "__main__":
    main()

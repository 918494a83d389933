"""Two pictures of a pair, beside each other: opened, and compared pixel by pixel."""

from __future__ import annotations

import dataclasses as dc
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

WINDOW = 512
"""Largest side, in pixels, of the middle part in which a shift is looked for."""
EDITED = 32
"""Levels of 255; a larger difference is one of content."""


@dc.dataclass(frozen=True)
class Comparison:
    """How two pictures of one size differ.

    Attributes:
        changed: share of all pixels in which some channel differs by more than the tolerance.
        outside: share of the pixels outside the mask that do so, None without a mask.
        outside_pixels, outside_largest: how many these are, and the largest difference among them, in levels of 255.
        shift: (right, down) in pixels, by which the second is moved against the first.
    """

    changed: float
    outside: float | None
    outside_pixels: int
    outside_largest: int
    shift: tuple[int, int]


def open_image(path: Path) -> Image.Image:
    """Read a picture as RGB, turned the way its EXIF data say.

    Raises:
        ValueError: it is no image, is cut off, or is unreasonably large.
    """
    return _open(path).convert("RGB")


def open_mask(path: Path) -> np.ndarray:
    """Read a mask ``[height, width]`` bool: True (white) where pictures may differ. Errors as in `open_image`."""
    return np.asarray(_open(path).convert("L")) > 127


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be opened as an image ({error})") from error


def digest(image: Image.Image) -> str:
    """SHA-256 of the pixels: the same for the same picture in another lossless file."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def flat(image: Image.Image) -> bool:
    """Whether all pixels have one colour."""
    return all(low == high for low, high in image.getextrema())  # type: ignore[misc]


def compare(emotional: Image.Image, neutral: Image.Image, mask: np.ndarray | None, tolerance: int) -> Comparison:
    """Compare two RGB pictures of one size; a pixel differs when some channel does by more than ``tolerance``."""
    a, b = (np.asarray(image).astype(np.int16) for image in (emotional, neutral))
    difference = np.abs(a - b).max(-1)
    differs = difference > tolerance
    outside, count, largest = None, 0, 0
    if mask is not None:
        rest = ~mask
        count = int((differs & rest).sum())
        outside = count / max(1, int(rest.sum()))
        largest = int(difference[rest].max(initial=0))
    return Comparison(float(differs.mean()), outside, count, largest, _shift(a, b))


def _shift(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Where phase correlation of the middle parts has its peak, if they are much closer when moved so."""
    height, width = a.shape[:2]
    h, w = min(height, WINDOW), min(width, WINDOW)
    top, left = (height - h) // 2, (width - w) // 2
    a, b = (image[top : top + h, left : left + w] for image in (a, b))
    window = np.outer(np.hanning(h + 2)[1:-1], np.hanning(w + 2)[1:-1])

    def spectrum(image: np.ndarray) -> np.ndarray:
        grey = image.mean(-1)
        return np.fft.rfft2((grey - grey.mean()) * window)

    cross = spectrum(b) * spectrum(a).conj()
    peaks = np.fft.irfft2(cross / np.maximum(np.abs(cross), 1e-9), (h, w))
    y, x = (int(i) for i in np.unravel_index(int(peaks.argmax()), peaks.shape))
    down, right = y - h * (y > h // 2), x - w * (x > w // 2)
    if max(abs(down), abs(right)) > min(h, w) // 4:
        return 0, 0

    def apart(down: int, right: int) -> float:
        rows, columns = slice(max(0, down), h + min(0, down)), slice(max(0, right), w + min(0, right))
        back = slice(max(0, -down), h + min(0, -down)), slice(max(0, -right), w + min(0, -right))
        # What was edited differs a lot, moved or not, and must not hide the rest.
        return float(np.minimum(np.abs(b[rows, columns] - a[back]), EDITED).mean())

    # The peak alone says little where a picture has little structure.
    return (right, down) if apart(down, right) < apart(0, 0) / 2 else (0, 0)

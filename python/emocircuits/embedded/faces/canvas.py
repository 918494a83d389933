"""A drawing surface in face coordinates, larger than the image so that edges come out smooth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]
OVERSAMPLE = 4
_ANGLES = np.linspace(0.0, 2.0 * np.pi, 28, endpoint=False)


def mix(a: Sequence[float], b: Sequence[float], t: float) -> Colour:
    """Colour between ``a`` (t=0) and ``b`` (t=1); t is clipped to [0, 1]."""
    t = min(1.0, max(0.0, t))
    r, g, bl = (int(np.clip(x + (y - x) * t, 0, 255)) for x, y in zip(a, b, strict=True))
    return r, g, bl


class Canvas:
    """Face coordinates: (0, 0) is the centre of the head, x = +-1 and y = +-1 its edges; x right, y down.

    ``wobble`` bends all that is drawn by a smooth wave (a child's hand), in fractions of the image.
    """

    def __init__(
        self, size: int, centre: Point, radius: Point, background: Colour, wobble: float, phase: float
    ) -> None:
        self.pixels = size * OVERSAMPLE
        self.image = Image.new("RGB", (self.pixels, self.pixels), background)
        self.draw = ImageDraw.Draw(self.image)
        self.centre, self.radius, self.wobble, self.phase = centre, radius, wobble, phase

    def at(self, x: float, y: float) -> Point:
        """Pixel position of the face point (x, y)."""
        return self.bend(self.centre[0] + x * self.radius[0], self.centre[1] + y * self.radius[1])

    def bend(self, u: float, v: float) -> Point:
        """Pixel position of the image point (u, v) given in fractions of the image."""
        if self.wobble:
            du = self.wobble * np.sin(23.0 * v + self.phase) + 0.6 * self.wobble * np.sin(41.0 * u + 2.0 * self.phase)
            dv = self.wobble * np.sin(19.0 * u + 1.7 * self.phase) + 0.6 * self.wobble * np.sin(47.0 * v + self.phase)
            u, v = u + du, v + dv
        return float(u * self.pixels), float(v * self.pixels)

    def length(self, face_units: float) -> float:
        """Pixels of a length given in half head widths."""
        return face_units * self.radius[0] * self.pixels

    def stroke(self, points: Iterable[Point], width: float, colour: Colour) -> None:
        """Line with round ends through face points; ``width`` in half head widths."""
        path = [self.at(x, y) for x, y in points]
        w = max(1, round(self.length(width)))
        self.draw.line(path, fill=colour, width=w, joint="curve")
        if w > 3:
            for x, y in (path[0], path[-1]):
                r = w / 2 - 0.5
                self.draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    def area(
        self, points: Iterable[Point], fill: Colour | None, line: Colour | None = None, width: float = 0.0
    ) -> None:
        """Filled polygon through face points, with an optional outline."""
        path = [self.at(x, y) for x, y in points]
        if fill is not None:
            self.draw.polygon(path, fill=fill)
        if line is not None and width > 0:
            self.draw.line([*path, path[0]], fill=line, width=max(1, round(self.length(width))), joint="curve")

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: Colour | None,
        line: Colour | None = None,
        width: float = 0.0,
    ) -> None:
        """Ellipse about the face point (x, y); both radii in half head *widths*, so a circle stays one."""
        ratio = self.radius[0] / self.radius[1]
        self.area(
            [(x + rx * c, y + ry * s * ratio) for c, s in zip(np.cos(_ANGLES), np.sin(_ANGLES), strict=True)],
            fill,
            line,
            width,
        )

    def arc(
        self, x: float, y: float, rx: float, ry: float, start: float, stop: float, width: float, colour: Colour
    ) -> None:
        """Stroke along an ellipse from ``start`` to ``stop`` degrees (0 = right, 90 = down); radii as in ``oval``."""
        ratio = self.radius[0] / self.radius[1]
        t = np.radians(np.linspace(start, stop, 13))
        self.stroke(
            [(x + rx * c, y + ry * s * ratio) for c, s in zip(np.cos(t), np.sin(t), strict=True)], width, colour
        )

"""Outlines of the shapes that the sample web's pictures show, and the masks drawn from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

Point = tuple[float, float]


def _ellipse(radius: float, points: int = 48, cx: float = 0.0, cy: float = 0.0) -> list[Point]:
    steps = (2 * math.pi * i / points for i in range(points))
    return [(cx + radius * math.cos(t), cy + radius * math.sin(t)) for t in steps]


def _star() -> list[Point]:
    corners = []
    for i in range(10):
        radius, angle = (1.0, 0.42)[i % 2], math.pi * i / 5 - math.pi / 2
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


def _cross(arm: float = 0.3) -> list[Point]:
    a = arm
    quarter = [(a, -a), (a, -1.0), (-a, -1.0)]
    outline: list[Point] = []
    for _ in range(4):
        outline += quarter
        quarter = [(y, -x) for x, y in quarter]
    return outline


def _heart() -> list[Point]:
    outline = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        outline.append((x / 16, -(y + 2.5) / 15))
    return outline


def _crescent() -> list[Point]:
    # The disc of radius 1, less a disc of radius 0.85 whose centre is 0.55 to the right.
    offset, radius = 0.55, 0.85
    x = (1 - radius**2 + offset**2) / (2 * offset)
    outer, inner = math.acos(x), math.acos((x - offset) / radius)
    shift = 0.2
    outline = []
    for i in range(33):
        t = outer + (2 * math.pi - 2 * outer) * i / 32
        outline.append((math.cos(t) + shift, math.sin(t)))
    for i in range(33):
        t = (2 * math.pi - inner) - (2 * math.pi - 2 * inner) * i / 32
        outline.append((offset + radius * math.cos(t) + shift, radius * math.sin(t)))
    return outline


_THIRD = 2 * math.pi / 3

OUTLINES: dict[str, tuple[list[Point], ...]] = {
    "circle": (_ellipse(0.95),),
    "square": ([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],),
    "triangle": ([(math.sin(_THIRD * i), 0.2 - math.cos(_THIRD * i)) for i in range(3)],),
    "star": (_star(),),
    "cross": (_cross(),),
    "ring": (_ellipse(0.97), _ellipse(0.56)),
    "diamond": ([(0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0)],),
    "heart": (_heart(),),
    "crescent": (_crescent(),),
    "arrow": (
        [
            (-1, -0.24),
            (0.15, -0.24),
            (0.15, -0.72),
            (1, 0),
            (0.15, 0.72),
            (0.15, 0.24),
            (-1, 0.24),
        ],
    ),
}
"""Shape -> outline, then holes; unit square [-1, 1] x [-1, 1], y downwards."""


def mask(shape: str, side: int, degrees: float) -> Image.Image:
    """The shape filled with 255 on 0, mode L, [side, side] pixels, smooth edges, turned clockwise.

    The unit square of the outline is fitted so that small turns stay inside the picture.
    """
    drawn = Image.new("L", (2 * side, 2 * side))
    draw = ImageDraw.Draw(drawn)
    for value, outline in zip((255, 0), OUTLINES[shape], strict=False):
        draw.polygon(_placed(outline, side, degrees), fill=value)
    return drawn.reduce(2)


def _placed(outline: Sequence[Point], side: int, degrees: float) -> list[Point]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [
        (side * (1 + 0.97 * (x * c - y * s)), side * (1 + 0.97 * (x * s + y * c)))
        for x, y in outline
    ]

"""What a scene is drawn with: backgrounds, patterned paint, camera noise."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]


def jitter(rng: random.Random, colour: Colour, amount: int) -> Colour:
    """A colour at most `amount` away in every channel."""
    red, green, blue = (min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)
    return red, green, blue


def ground(rng: random.Random, colour: Colour, width: int, height: int) -> Image.Image:
    """A background whose shade drifts smoothly: four by four tones, stretched."""
    tones = Image.new("RGB", (4, 4))
    drift = rng.choice((8, 18, 30))
    tones.putdata([jitter(rng, colour, drift) for _ in range(16)])
    return tones.resize((width, height), Image.Resampling.BICUBIC)


def surface(rng: random.Random, pattern: str, paint: Colour, side: int) -> Image.Image:
    """A square of paint, [side, side], with its pattern in a lighter or darker tone of it."""
    painted = Image.new("RGB", (side, side), paint)
    if pattern == "plain":
        return painted
    light = sum(paint) > 3 * 140
    ink = tuple(round(c * 0.5) if light else round(c + (255 - c) * 0.72) for c in paint)
    draw = ImageDraw.Draw(painted)
    step = max(4, side // rng.choice((5, 6, 7)))
    if pattern == "striped":
        lean = rng.choice((-side // 2, 0, side // 2))
        for x in range(-side, 2 * side, step):
            draw.line(((x, 0), (x + lean, side)), fill=ink, width=max(2, step // 3))
    else:
        for row, y in enumerate(range(0, side, step)):
            for column, x in enumerate(range(0, side, step)):
                if pattern == "checked" and (row + column) % 2:
                    draw.rectangle((x, y, x + step - 1, y + step - 1), fill=ink)
                elif pattern == "dotted":
                    shift = step // 2 * (row % 2)
                    reach = max(2, step // 2)
                    draw.ellipse((x + shift, y, x + shift + reach, y + reach), fill=ink)
    return painted


@cache
def _noise() -> NDArray[np.float32]:
    return np.random.default_rng(20).normal(0, 1, (512, 512, 1)).astype(np.float32)


def grainy(rng: random.Random, picture: Image.Image) -> Image.Image:
    """Camera noise: a window of one fixed field, so that it costs an addition."""
    strength = rng.choice((0.0, 2.0, 4.0, 7.0))
    if not strength or picture.width > 512 or picture.height > 512:
        return picture
    y = rng.randrange(513 - picture.height)
    x = rng.randrange(513 - picture.width)
    window = _noise()[y : y + picture.height, x : x + picture.width]
    pixels = np.asarray(picture) + strength * window
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

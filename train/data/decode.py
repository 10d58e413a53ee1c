"""A picture's bytes to pixels: JPEGs are scaled while they are decoded, the rest is PIL's.

The only augmentation is CLIP's: a random square crop of the resized picture.
"""

from __future__ import annotations

import io
import struct

import cv2
import numpy as np
import simplejpeg
import xxhash
from numpy.typing import NDArray
from PIL import Image

# The loader's threads are the parallelism; OpenCV's own would compete with them and the model.
cv2.setNumThreads(1)

Pixels = NDArray[np.uint8]


class Undecodable(Exception):
    """Bytes that are no usable picture, or no usable text."""


def decode(data: bytes | memoryview, short_side: int) -> Pixels:
    """RGB pixels [height, width, 3] whose shorter side is `short_side`. Raises `Undecodable`."""
    try:
        # The discrete cosine transform yields 1/2, 1/4 ... of the size for a fraction of the work.
        pixels = simplejpeg.decode_jpeg(
            data, colorspace="RGB", min_height=short_side, min_width=short_side
        )
    except ValueError:
        pixels = _decode_any(bytes(data), short_side)
    return resize(pixels, short_side)


def resize(pixels: Pixels, short_side: int) -> Pixels:
    """Scale so that the shorter side is `short_side`, keeping the proportions."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short == short_side:
        return pixels
    size = (
        max(short_side, round(width * short_side / short)),
        max(short_side, round(height * short_side / short)),
    )
    method = cv2.INTER_AREA if short > short_side else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, size, interpolation=method), np.uint8)


def random_crop(
    pixels: Pixels, side: int, *, seed: int, epoch: int, uid: tuple[int, int]
) -> Pixels:
    """The [side, side, 3] square that (seed, epoch, uid) choose; every position is as likely."""
    height, width = pixels.shape[:2]
    drawn = xxhash.xxh3_128_intdigest(struct.pack("<QQQQ", seed, epoch, *uid))
    top = ((drawn & 0xFFFFFFFF) * (height - side + 1)) >> 32
    left = ((drawn >> 64 & 0xFFFFFFFF) * (width - side + 1)) >> 32
    return pixels[top : top + side, left : left + side]


def central_crop(pixels: Pixels, side: int) -> Pixels:
    """The [side, side, 3] square in the middle."""
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def _decode_any(data: bytes, short_side: int) -> Pixels:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.draft("RGB", (short_side, short_side))
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # PIL's plugins raise whatever their format's parser stumbles on
        raise Undecodable(f"{type(error).__name__}: {error}") from None

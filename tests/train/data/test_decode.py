"""Pixels: scaled, cropped, and refused when there are none."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.data import decode


def _encoded(width: int, height: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    stream = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).convert(mode).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK")])
@pytest.mark.parametrize("size", [(300, 200), (40, 30), (64, 48), (48, 500)])
def test_the_shorter_side_fits(kind: str, mode: str, size: tuple[int, int]) -> None:
    pixels = decode.decode(_encoded(*size, kind, mode), 48)
    assert min(pixels.shape[:2]) == 48
    assert pixels.shape[2] == 3
    assert abs(pixels.shape[1] / pixels.shape[0] - size[0] / size[1]) < 0.1 * size[0] / size[1]
    assert pixels[:, :4].mean() < 40
    assert pixels[:, -4:].mean() > 215


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB")])
def test_other_formats(kind: str, mode: str) -> None:
    assert decode.decode(_encoded(90, 60, kind, mode), 30).shape == (30, 45, 3)


@pytest.mark.parametrize("data", [b"", b"GIF89a", _encoded(200, 200)[:900], b"\xff\xd8\xff\xe0"])
def test_no_picture(data: bytes) -> None:
    with pytest.raises(decode.Undecodable):
        decode.decode(data, 32)


def _crop(pixels: decode.Pixels, side: int, **key: Any) -> decode.Pixels:
    into = np.zeros((side, side, 3), np.uint8)
    decode.random_crop(pixels, min(pixels.shape[:2]), into, **key)
    return into


def test_random_crops_reach_every_position_evenly() -> None:
    row, column = np.mgrid[:40, :36].astype(np.uint8)
    pixels = np.stack([row, column, row], 2)
    positions: Counter[tuple[int, int]] = Counter()
    for number in range(4000):
        into = np.zeros((32, 32, 3), np.uint8)
        decode.random_crop(pixels, 36, into, seed=1, epoch=0, uid=(7, number))
        assert np.array_equal(into - into[0, 0], pixels[:32, :32])
        positions[int(into[0, 0, 0]), int(into[0, 0, 1])] += 1
    assert len(positions) == 9 * 5
    assert min(positions.values()) > 4000 / 45 / 2


def test_a_crop_is_a_function_of_seed_epoch_and_uid() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 80, 3), np.uint8)

    def crop(seed: int, epoch: int, uid: tuple[int, int]) -> bytes:
        return _crop(pixels, 32, seed=seed, epoch=epoch, uid=uid).tobytes()

    first = crop(1, 2, (3, 4))
    assert first == crop(1, 2, (3, 4))
    assert len({first, crop(2, 2, (3, 4)), crop(1, 3, (3, 4)), crop(1, 2, (4, 3))}) == 4


def test_the_central_crop() -> None:
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    assert np.array_equal(decode.central_crop(pixels, 4), pixels[1:5])

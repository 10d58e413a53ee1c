"""Pixels: scaled, cropped, and refused when there are none."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path
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


@pytest.mark.parametrize("short_side", [9, 32, 50, 61, 64, 100, 224])
def test_scaled_decoding_never_gives_less_than_asked(short_side: int) -> None:
    for size in [(449, 448), (448, 1000), (171, 170), (340, 3000), (63, 64), (800, 801)]:
        decoded = decode.decode_scaled(_encoded(*size), short_side)
        assert min(decoded.shape[:2]) >= min(short_side, *size)
        if min(size) >= 8 * short_side:
            assert min(decoded.shape[:2]) <= -(-min(size) // 8)
        elif min(size) >= short_side:
            assert min(decoded.shape[:2]) < 2 * short_side


def test_progressive_and_cut_by_a_camera() -> None:
    picture = Image.open(io.BytesIO(_encoded(120, 80)))
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    picture.save(stream, "JPEG", progressive=True, exif=exif)
    assert decode.decode(stream.getvalue(), 40).shape == (40, 60, 3)  # as stored
    trailing = stream.getvalue() + b"\0" * 1000
    assert decode.decode(trailing, 40).shape == (40, 60, 3)


def _png_that_claims(width: int, height: int) -> bytes:
    data = bytearray(_encoded(8, 8, "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_a_giant_is_refused_by_its_header(side: int) -> None:
    jpeg = bytearray(_encoded(64, 64))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    began = time.process_time()
    ours = rf"{side} x {side} pixels, more than 67,108"
    for data, reason in (
        (bytes(jpeg), ours),
        (_png_that_claims(side, side), ours if side < 10_000 else "decompression bomb"),
    ):
        with pytest.raises(decode.Undecodable, match=reason):
            decode.decode_scaled(data, 32)
    assert time.process_time() - began < 0.5


def test_the_limit_of_pixels() -> None:
    for kind in ("JPEG", "PNG"):
        data = _encoded(50, 40, kind)
        assert decode.decode_scaled(data, 32, max_pixels=2000).shape == (40, 50, 3)
        with pytest.raises(decode.Undecodable):
            decode.decode_scaled(data, 32, max_pixels=1999)


def _psnr(one: decode.Pixels, other: decode.Pixels) -> float:
    """Peak signal-to-noise ratio, dB; above some 40 nobody sees a difference."""
    error = np.mean((one.astype(float) - other) ** 2)
    return 10 * float(np.log10(255**2 / max(error, 1e-3)))


def _by_pil(pixels: decode.Pixels, shape: tuple[int, ...]) -> decode.Pixels:
    size = (shape[1], shape[0])
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


@pytest.mark.skipif("OPENWIT_DATA" not in os.environ, reason="OPENWIT_DATA is not set")
def test_photographs_look_as_if_scaled_by_pil() -> None:
    with tarfile.open(Path(os.environ["OPENWIT_DATA"]) / "photos" / "photos-200.tar") as tar:
        members = [member for member in tar if member.isfile()][::9]
        photos = [stream.read() for member in members if (stream := tar.extractfile(member))]
    for ratio in (1.05, 1.15, 1.33, 1.36, 1.5, 1.8, 1.99, 2.5):
        alike = []
        for photo in photos:
            pixels = decode.decode_scaled(photo, 10_000)[:256, :256]
            scaled = decode.resize(pixels, round(min(pixels.shape[:2]) / ratio))
            alike.append(_psnr(scaled, _by_pil(pixels, scaled.shape)))
        assert np.mean(alike) > 41.5, ratio
    for short_side in (64, 112, 160, 224, 288):
        alike = []
        for photo in photos:
            whole = decode.decode_scaled(photo, 10_000)
            if min(whole.shape[:2]) >= short_side:
                scaled = decode.decode(photo, short_side)
                alike.append(_psnr(scaled, _by_pil(whole, scaled.shape)))
        # The transform keeps more detail than PIL's filter; pixels left out would give 21 to 25.
        assert np.mean(alike) > 31, short_side


def test_only_the_crop_is_resized_and_lies_where_it_would() -> None:
    ramp = np.linspace(0, 255, 96)[None, :, None] * np.ones((64, 1, 3))
    pixels = ramp.astype(np.uint8)
    into = np.zeros((24, 24, 3), np.uint8)
    starts = []
    for number in range(300):
        decode.random_crop(pixels, 32, into, seed=0, epoch=0, uid=(0, number))
        # 24 of 32 is 48 of 64: half of the ramp's 96 columns.
        assert abs(float(into[0, -1, 0]) - float(into[0, 0, 0]) - 255 * 46 / 95) < 4
        starts.append(int(into[0, 0, 0]))
    assert min(starts) <= 4
    assert abs(max(starts) - 255 * 48.5 / 95) <= 4


def test_a_picture_too_small_is_enlarged() -> None:
    pixels = decode.decode_scaled(_encoded(20, 10), 32)
    assert pixels.shape == (10, 20, 3)
    into = np.zeros((32, 32, 3), np.uint8)
    decode.random_crop(pixels, 32, into, seed=0, epoch=0, uid=(0, 1))
    assert np.all(np.diff(into[5, :, 0].astype(int)) >= -1)
    assert into.max() - into.min() > 80


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

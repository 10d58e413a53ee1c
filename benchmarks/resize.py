"""What storing pictures larger or better costs: bytes, and the loader's time for a crop of them.

200 real photographs, stored as `download` stores them and read as the loader reads them. A crop of
224 pixels is what most CLIP models see, 336 what the largest is fine-tuned on.
"""

from __future__ import annotations

import io
import math
import os
import statistics
import tarfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from dataset_build.download import DownloadSettings
from pipeline.config import MissingInput
from train.data import decode

SIDES = (224, 256, 288, 336, 384, 512)
QUALITIES = (85, 90, 95)
ROUNDS = 3
COMPARED = 4  # each fourth picture, pixel by pixel


def measure() -> Iterator[dict[str, Any]]:
    """A line for every stored side, quality and crop; `ratio` is the speed against the default.

    `psnr_db` compares the crop's pixels with those of the original file, before cropping.
    Raises `MissingInput` without `$OPENWIT_DATA`.
    """
    photos = _photos()
    shorts = [min(simplejpeg.decode_jpeg_header(photo)[:2]) for photo in photos]
    sizes = [(side, quality) for quality in QUALITIES for side in SIDES]
    stored = {size: _stored(photos, *size) for size in sizes}
    default = DownloadSettings()
    usual = (default.image_size, default.encode_quality)
    for crop in (224, 336):
        originals = [decode.decode(photo, crop) for photo in photos[::COMPARED]]
        # Taken in turns, so that none of them has the quieter time.
        best = dict.fromkeys(sizes, float("inf"))
        for _ in range(ROUNDS):
            for size in sizes:
                best[size] = min(best[size], _cpu_seconds(stored[size], crop))
        for side, quality in sizes:
            size = side, quality
            yield {
                "name": "resize",
                "stored_side": side,
                "quality": quality,
                "crop": crop,
                "ours": round(best[size] / len(photos) * 1e6),
                "peer": round(best[usual] / len(photos) * 1e6),
                "ratio": round(best[usual] / best[size], 2),
                "unit": "µs of a core, decoded and cropped, stored so and by default",
                "bytes": round(statistics.mean(map(len, stored[size]))),
                "psnr_db": round(_psnr(originals, stored[size][::COMPARED], crop), 1),
                "photos": len(photos),
                "smaller_than_stored_side": sum(short < side for short in shorts),
            }


def _photos() -> list[bytes]:
    root = os.environ.get("OPENWIT_DATA", "")
    path = Path(root) / "photos/photos-200.tar"
    if not root or not path.exists():
        raise MissingInput("the benchmark needs photos/photos-200.tar in $OPENWIT_DATA")
    with tarfile.open(path) as tar:
        members = [tar.extractfile(member) for member in tar if member.isreg()]
        return [member.read() for member in members if member]


def _stored(photos: list[bytes], side: int, quality: int) -> list[bytes]:
    """The photographs as `download` stores them."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dataset_build.download import staging

    resizer = staging.EightBitResizer(side, "keep_ratio", True, encode_quality=quality)
    return [resizer(io.BytesIO(photo))[0] for photo in photos]


def _cpu_seconds(pictures: list[bytes], crop: int) -> float:
    start = time.process_time()
    into = np.empty((crop, crop, 3), np.uint8)
    for number, data in enumerate(pictures):
        pixels = decode.decode_scaled(data, crop)
        decode.random_crop(pixels, crop, into, seed=0, epoch=0, uid=(number, 0))
    return time.process_time() - start


def _psnr(originals: list[decode.Pixels], pictures: list[bytes], crop: int) -> float:
    """Mean over pictures, dB."""
    found = []
    for true, data in zip(originals, pictures, strict=True):
        seen = decode.decode(data, crop)
        height, width = (min(a, b) for a, b in zip(true.shape[:2], seen.shape[:2], strict=True))
        difference = true[:height, :width].astype(np.float32) - seen[:height, :width]
        error = float(np.mean(np.square(difference)))
        found.append(min(60.0, 10 * math.log10(255**2 / error)) if error else 60.0)
    return statistics.mean(found)

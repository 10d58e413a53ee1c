"""Shards of real photographs with real captions for `benchmarks.loader`."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.config import MissingInput

SAMPLES = 20_480
SHARDS = 20
SHORT_SIDE = 256


def write(folder: Path) -> None:
    """A packed dataset: `shards/*.tar` and `index.parquet`.

    The photographs are scaled to `SHORT_SIDE` and repeated under keys of their own, each time with
    another caption. Raises `MissingInput` without `$OPENWIT_DATA`.
    """
    pictures, captions = _pictures(), _captions()
    (folder / "shards").mkdir(parents=True)
    keys = sorted(hashlib.md5(str(number).encode()).digest() for number in range(SAMPLES))
    rows = []
    each = SAMPLES // SHARDS
    for number in range(SHARDS):
        name = f"{number:05d}.tar"
        with tarfile.open(folder / "shards" / name, "w:", format=tarfile.USTAR_FORMAT) as tar:
            for place in range(number * each, (number + 1) * each):
                image = pictures[place % len(pictures)]
                text = captions[place * 7919 % len(captions)].encode()
                uid = keys[place]
                begin = tar.offset
                image_at = _add(tar, f"{uid.hex()}.jpg", image)
                text_at = _add(tar, f"{uid.hex()}.txt", text)
                rows.append((uid, name, begin, tar.offset - begin, image_at, text_at))
                rows[-1] += (len(image), len(text))
    names = ["uid", "shard", "offset", "length"]
    names += ["image_offset", "text_offset", "image_bytes", "text_bytes"]
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    pq.write_table(
        pa.table({name: list(values) for name, values in columns.items()}), folder / "index.parquet"
    )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Where in the tar the data begin."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    at = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return at


def _input(path: str) -> Path:
    root = os.environ.get("OPENWIT_DATA", "")
    if not root or not (Path(root) / path).exists():
        raise MissingInput(f"the benchmark needs {path} in $OPENWIT_DATA, a folder of real inputs")
    return Path(root) / path


def _pictures() -> list[bytes]:
    encoded = []
    with tarfile.open(_input("photos/photos-200.tar")) as tar:
        for member in tar:
            if (stream := tar.extractfile(member)) is None:
                continue
            picture = Image.open(stream).convert("RGB")
            scale = SHORT_SIDE / min(picture.size)
            width, height = (max(SHORT_SIDE, round(side * scale)) for side in picture.size)
            scaled = io.BytesIO()
            picture.resize((width, height), Image.Resampling.BICUBIC).save(
                scaled, "JPEG", quality=90
            )
            encoded.append(scaled.getvalue())
    return encoded


def _captions() -> list[str]:
    with gzip.open(_input("captions/flickr8k.token.txt.gz"), "rt", encoding="utf-8") as lines:
        return [line.rstrip("\n").partition("\t")[2] for line in lines]

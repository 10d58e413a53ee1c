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
    rows: list[dict[str, object]] = []
    each = SAMPLES // SHARDS
    for number in range(SHARDS):
        name = f"{number:05d}.tar"
        with tarfile.open(folder / "shards" / name, "w:", format=tarfile.USTAR_FORMAT) as tar:
            for place in range(number * each, (number + 1) * each):
                image = pictures[place % len(pictures)]
                text = captions[place * 7919 % len(captions)].encode()
                row = {"uid": keys[place], "shard": name, "offset": tar.offset}
                row |= _add(tar, keys[place], "image", "jpg", image)
                row |= _add(tar, keys[place], "text", "txt", text)
                rows.append(row | {"length": tar.offset - int(str(row["offset"]))})
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")


def _add(tar: tarfile.TarFile, uid: bytes, what: str, kind: str, data: bytes) -> dict[str, int]:
    """Append a member; the index's columns about it."""
    member = tarfile.TarInfo(f"{uid.hex()}.{kind}")
    member.size = len(data)
    at = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return {f"{what}_offset": at, f"{what}_bytes": len(data)}


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

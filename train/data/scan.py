"""Finding the samples of a tar that has no index, by its headers.

Samples are what WebDataset makes of it: files side by side whose names agree up to the first dot of
the base name. Anything that no tar should have is an error; a guess would shift every sample after.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from pipeline import tar
from pipeline.tar import Member, Tar
from train.data import storage
from train.data.index import DatasetError, text_of
from train.data.storage import Shard

PICTURES = ("jpg", "jpeg", "png", "webp")
"""Extensions of a picture; the first of them that a sample has is its picture."""

SCANNED = pa.schema(
    [
        ("uid", pa.binary(16)),  # xxh3-128 of shard name, 0, key
        ("key", pa.string()),
        ("shard", pa.uint32()),  # position among the shards of one file of the index
        ("offset", pa.int64()),  # of the sample's first tar header, bytes
        ("length", pa.int64()),  # of all its members with headers and padding
        ("image_offset", pa.int64()),
        ("image_bytes", pa.int64()),
        ("text_offset", pa.int64()),
        ("text_bytes", pa.int64()),
        ("image_check", pa.uint64()),  # xxh3-64, or 0 where no checksums are asked for
        ("text_check", pa.uint64()),  # xxh3-64
    ]
)

_MAX_TEXT_BYTES = 16 << 20
_MAX_SAMPLE_BYTES = 256 << 20
_WINDOW = {"local": 1 << 14, "remote": 8 << 20}
"""Bytes read at once: between the pictures of a file it is quick to skip, far away it is not."""
_META = re.compile(r"__[^/]*__($|/)")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)

Read = Callable[[int, int], memoryview]
Row = tuple[Any, ...]
"""The values of `SCANNED`'s columns, in their order."""


@dataclass(frozen=True)
class Scan:
    """What is in one shard."""

    samples: pa.Table
    """Of schema `SCANNED`."""
    left_out: Counter[str]
    """Samples that cannot be trained on, by reason."""


@dataclass
class _Sample:
    key: str
    offset: int
    end: int
    members: dict[str, Member] = field(default_factory=dict)
    repeats: bool = False


def scan(
    shard: Shard, name: str, number: int, *, caption: str, checksums: bool, timeout_s: float
) -> Scan:
    """The samples of a shard whose identity is `name`, wherever it lies. Raises `BrokenTar`.

    A uid is made of the shard's name and the sample's key: headers alone tell it, it is the same
    with and without checksums, and equal pictures stay two samples.
    """
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    try:
        with _opened(shard, checksums, timeout_s) as source:
            for sample in _samples(tar.foreign_members(source)):
                row = _row(sample, source.read, caption, checksums)
                if isinstance(row, str):
                    left_out[row] += 1
                    continue
                identity = xxhash.xxh3_128_digest(f"{name}\0{sample.key}".encode())
                rows.append((identity, sample.key, number, *row))
    except OSError as error:
        raise DatasetError(f"{shard.address}: cannot be read ({error.strerror})") from None
    columns = zip(*rows, strict=True) if rows else [()] * len(SCANNED)
    arrays = [pa.array(values, kind) for values, kind in zip(columns, SCANNED.types, strict=True)]
    return Scan(pa.table(arrays, schema=SCANNED), left_out)


def _row(sample: _Sample, read: Read, caption: str, checksums: bool) -> tuple[int, ...] | str:
    """What the index has of a sample, or the reason why it is left out."""
    if sample.repeats:
        return "repeated_member"
    picture = next((sample.members[kind] for kind in PICTURES if kind in sample.members), None)
    if picture is None or not picture.size:
        return "no_picture"
    text = sample.members.get(caption.partition(":")[0])
    if text is None:
        return "no_text"
    if text.size > _MAX_TEXT_BYTES or sample.end - sample.offset > _MAX_SAMPLE_BYTES:
        return "too_large"
    data = read(text.offset, text.size)
    try:
        text_of(data, caption)
    except UnicodeDecodeError:
        return "text_not_utf8"
    except ValueError:
        return "no_text"
    image_check = xxhash.xxh3_64_intdigest(read(picture.offset, picture.size)) if checksums else 0
    return (
        *(sample.offset, sample.end - sample.offset),
        *(picture.offset, picture.size, text.offset, text.size),
        *(image_check, xxhash.xxh3_64_intdigest(data)),
    )


def _samples(members: Iterator[Member]) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for member in members:
        if _META.match(member.name) or (match := _NAME.fullmatch(member.name)) is None:
            continue
        key, extension = match[1], match[2].lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key, member.header, member.end)
        sample.repeats |= extension in sample.members
        sample.members[extension] = member
        sample.end = member.end
    if sample is not None:
        yield sample


@contextmanager
def _opened(shard: Shard, whole: bool, timeout_s: float) -> Iterator[Tar]:
    if not storage.is_remote(shard.address):
        ahead = _WINDOW["remote" if whole else "local"]
        with tar.opened(Path(shard.address), ahead, shard.bytes) as local:
            yield local
        return

    def fetch(offset: int, size: int) -> memoryview:
        return storage.read(shard.address, offset, size, timeout_s=timeout_s)

    window = tar.Window(shard.address, shard.bytes, fetch, _WINDOW["remote"])
    yield Tar(shard.address, shard.bytes, window.read)

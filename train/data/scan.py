"""Finding the samples of a tar that has no index, by its headers.

Samples are what WebDataset makes of it: files side by side whose names agree up to the first dot of
the base name. Anything that no tar should have is an error; a guess would shift every sample after.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash

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

_BLOCK = 512
_LARGEST_NAME = 1 << 20
_WINDOW = {"local": 1 << 14, "remote": 8 << 20}
"""Bytes read at once: between the pictures of a file it is quick to skip, far away it is not."""
_META = re.compile(r"__[^/]*__($|/)")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)

Read = Callable[[int, int], memoryview]
Row = tuple[Any, ...]
"""The values of `SCANNED`'s columns, in their order."""


class BrokenTar(DatasetError):
    """A shard that is no whole tar."""


@dataclass(frozen=True)
class Scan:
    """What is in one shard."""

    samples: pa.Table
    """Of schema `SCANNED`."""
    left_out: Counter[str]
    """Samples that cannot be trained on, by reason."""


class _Member(NamedTuple):
    name: str
    header: int
    """Where its first header begins; an extended one comes before its own."""
    offset: int
    """Of its bytes."""
    size: int

    @property
    def end(self) -> int:
        return self.offset + _padded(self.size)


@dataclass
class _Sample:
    key: str
    offset: int
    end: int
    members: dict[str, _Member] = field(default_factory=dict)
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
        with _Window(shard, checksums, timeout_s) as window:
            for sample in _samples(_members(shard, window.read)):
                row = _row(sample, window.read, caption, checksums)
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


def _samples(members: Iterator[_Member]) -> Iterator[_Sample]:
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


def _members(shard: Shard, read: Read) -> Iterator[_Member]:
    """The regular files in a tar, ustar, pax or GNU with long names."""
    at = begin = 0
    extended: dict[str, str] = {}
    while True:
        header = read(at, _BLOCK) if at + _BLOCK <= shard.bytes else b""
        if not header:
            raise _broken(shard, at, "it ends without the mark of its end; it was cut short")
        if not any(header):
            return
        kind, name, size = _parse(shard, at, header)
        size = int(extended.get("size", size))
        offset = at + _BLOCK
        at = offset + _padded(size)
        if at > shard.bytes:
            raise _broken(shard, begin, f"{size} bytes do not fit into the {shard.bytes} it has")
        if kind in "xL":
            if size > _LARGEST_NAME:
                raise _broken(shard, begin, f"a name of {size} bytes")
            data = bytes(read(offset, size))
            extended |= _records(shard, begin, data) if kind == "x" else {"path": _text(data)}
            continue
        if kind in "gK" or kind in "12345":  # links, devices and folders hold no bytes
            if kind not in "gK" and size:
                raise _broken(shard, begin, f"a {kind!r} entry of {size} bytes")
        elif kind in "0\0" and "GNU.sparse.map" not in extended:
            yield _Member(extended.get("path", name), begin, offset, size)
        else:
            raise _broken(shard, begin, f"an entry of kind {kind!r}, which no dataset has")
        extended = {}
        begin = at


def _parse(shard: Shard, at: int, header: bytes | memoryview) -> tuple[str, str, int]:
    """Kind, name and size of a header."""
    header = bytes(header)
    if header[257:262] != b"ustar":
        hint = "; decompress it" if header[:2] in (b"\x1f\x8b", b"BZ", b"\x28\xb5") else ""
        raise _broken(shard, at, f"no tar header{hint}")
    try:
        checksum = int(header[148:156].strip(b"\0 "), 8)
        if header[124] & 0x80:  # GNU's and star's way to write 8 GiB and more
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise _broken(shard, at, "a header whose numbers are none") from None
    # The checksum's own bytes count as spaces: 8 x 32 = 256.
    if sum(header) - sum(header[148:156]) + 256 != checksum:
        raise _broken(shard, at, "a header whose checksum is wrong")
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    return chr(header[156]), name, size


def _records(shard: Shard, at: int, data: bytes) -> dict[str, str]:
    """A pax header's records: `LENGTH KEY=VALUE` and a newline, the length that of the record."""
    found = {}
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise _broken(shard, at, "an extended header that cannot be read")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        found[_text(key)] = _text(value)
        data = data[int(length) :]
    if not found.get("size", "0").isdigit():
        raise _broken(shard, at, "an extended header whose size is no number")
    return found


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _broken(shard: Shard, at: int, reason: str) -> BrokenTar:
    return BrokenTar(f"{shard.address}: broken at byte {at}: {reason}")


class _Window:
    """Reads ranges of a shard that mostly ascend, a window of bytes at a time."""

    def __init__(self, shard: Shard, whole: bool, timeout_s: float) -> None:
        self._shard = shard
        self._timeout_s = timeout_s
        remote = storage.is_remote(shard.address)
        self._size = _WINDOW["remote" if whole or remote else "local"]
        self._file = None if remote else os.open(shard.address, os.O_RDONLY)
        self._start = 0
        self._held = memoryview(b"")

    def read(self, offset: int, size: int) -> memoryview:
        if offset < self._start or offset + size > self._start + len(self._held):
            wanted = min(max(size, self._size), self._shard.bytes - offset)
            self._start, self._held = offset, self._fetch(offset, wanted)
            if len(self._held) < size:
                raise _broken(self._shard, offset, "it is shorter than its folder says")
        return self._held[offset - self._start :][:size]

    def _fetch(self, offset: int, size: int) -> memoryview:
        if self._file is None:
            return storage.read(self._shard.address, offset, size, timeout_s=self._timeout_s)
        return memoryview(os.pread(self._file, size, offset))

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            os.close(self._file)

"""Tars of samples: the project's one reader of them, and its writer.

The libraries of the field read most damaged tars in silence, and hostile ones as they ask to be
read. Here a tar is files one after the other: nothing is guessed, followed, inflated or unpacked,
and a name is only ever compared, never made a path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

from pipeline.config import UserError

BLOCK = 512
MAX_MEMBER_BYTES = 256 << 20
"""Of a file in a tar that we wrote; a picture of 25 megapixels has fewer, whatever its format."""

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_OCTAL = re.compile(rb" *[0-7]+[\0 ]*")
_DECIMAL = re.compile(r"[0-9]{1,19}")
_MAGIC = slice(257, 265)
_USTAR = b"ustar\x0000"
_OWNERS, _TIME = b"0000644\0" + 2 * b"0000000\0", b"\0" + b"00000000000\0"
_REST = b"0".ljust(101, b"\0") + _USTAR.ljust(255, b"\0")
# Of what a canonical header has but for name and size. Its own eight bytes count as spaces.
_CHECKSUM = sum(_OWNERS) + sum(_TIME) + sum(_REST) + 8 * 32
_MAX_EXTENDED_BYTES = 1 << 20
_MAX_END_BYTES = 16 << 20  # writers fill up to a record, whose size is the user's choice
_CHUNK = 1 << 20
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")


class BrokenTar(UserError):
    """A file that is no whole tar of samples; the message says where it stops being one."""

    exit_code: ClassVar[int] = 4


@dataclass(frozen=True)
class Tar:
    """A tar that can be read, wherever it lies."""

    name: str
    """For messages."""
    bytes: int
    read: Callable[[int, int], memoryview]
    """(offset, size) -> so many bytes from there."""


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    header: int
    """Where its first header begins; an extended one comes before its own."""
    offset: int
    """Of its bytes."""
    size: int

    @property
    def end(self) -> int:
        """Where its padding ends."""
        return self.offset + _padded(self.size)


class Window:
    """Ranges of a file that mostly ascend, read `ahead` bytes at a time; `fetch` reads them."""

    def __init__(
        self, name: str, size: int, fetch: Callable[[int, int], memoryview], ahead: int
    ) -> None:
        self._name, self._size, self._fetch, self._ahead = name, size, fetch, ahead
        self._start = 0
        self._held = memoryview(b"")

    def read(self, offset: int, size: int) -> memoryview:
        """As `Tar.read`. Raises `BrokenTar` if the file is shorter than it was said to be."""
        if offset < self._start or offset + size > self._start + len(self._held):
            wanted = min(max(size, self._ahead), self._size - offset)
            self._start, self._held = offset, self._fetch(offset, wanted)
            if len(self._held) < size:
                raise broken(self._name, offset, "it is shorter than its folder says")
        return self._held[offset - self._start :][:size]


@contextmanager
def opened(path: Path, ahead: int = _CHUNK, size: int | None = None) -> Iterator[Tar]:
    """A local file as a tar; `size`: how large it must be, if that is known."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size if size is None else size

        def fetch(offset: int, wanted: int) -> memoryview:
            data = os.pread(descriptor, wanted, offset)
            # A network file system may return less than it was asked for.
            while len(data) < wanted:
                more = os.pread(descriptor, wanted - len(data), offset + len(data))
                if not more:
                    break
                data += more
            return memoryview(data)

        yield Tar(str(path), size, Window(str(path), size, fetch, ahead).read)
    finally:
        os.close(descriptor)


def members(
    tar: Tar,
    names: re.Pattern[str] = _PLAIN,
    *,
    canonical: bool = False,
    max_bytes: int = MAX_MEMBER_BYTES,
) -> Iterator[Member]:
    """The files of a tar that the project wrote, in their order.

    Raises `BrokenTar` unless every byte of it belongs to a header of a regular file of plain ustar,
    to a file, or is zero where zero must be; if a name does not match `names` or comes twice; and
    if a file is larger than `max_bytes`. `canonical`: every header must be the one that
    `write_member` writes, and the end that of `finish`. A file is checked for what follows it when
    the next one is asked for.
    """
    at = 0
    seen: set[str] = set()
    while header := _header(tar, at):
        name, size, is_canonical = _parse_canonical(header)
        if not is_canonical:
            kind, name, size = _parse(tar, at, header)
            if kind != "0":
                raise broken(tar.name, at, f"an entry of kind {kind!r}, not a regular file")
        if not names.fullmatch(name) or name in seen:
            raise broken(tar.name, at, f"{name!r} is no name for a file here")
        if size > max_bytes:
            raise broken(tar.name, at, f"a file of {size} bytes; {max_bytes} are allowed")
        if not is_canonical and (canonical or not _is_plain(header, name)):
            raise broken(tar.name, at, "a header that is not the one that was written")
        member = Member(name, at, at + BLOCK, size)
        if member.end > tar.bytes:
            raise broken(tar.name, at, f"{size} bytes do not fit into the {tar.bytes} it has")
        seen.add(name)
        yield member
        after = member.offset + size
        if member.end > after and bytes(tar.read(after, member.end - after)).strip(b"\0"):
            raise broken(tar.name, after, "data between two files")
        at = member.end
    if canonical and tar.bytes != at + 2 * BLOCK:
        raise broken(tar.name, at, f"{tar.bytes - at} bytes after the last file, not {2 * BLOCK}")
    _check_end(tar, at)


def foreign_members(tar: Tar) -> Iterator[Member]:
    """The regular files of a tar that something else wrote: ustar, pax, or GNU with long names.

    Folders, links and devices hold no bytes and are passed over; whatever else a tar may hold, such
    as sparse files, raises `BrokenTar`, as does a number, a checksum or an end that is not right.
    """
    at = begin = 0
    extended: dict[str, str] = {}
    while header := _header(tar, at):
        kind, name, size = _parse(tar, at, header)
        if kind in "0\0":
            size = int(extended.get("size", size))
        offset = at + BLOCK
        at = offset + _padded(size)
        if at > tar.bytes:
            raise broken(tar.name, begin, f"{size} bytes do not fit into the {tar.bytes} it has")
        if kind in "0\0":
            yield Member(extended.get("path", name), begin, offset, size)
        elif kind in "xgKL":
            if size > _MAX_EXTENDED_BYTES:
                raise broken(tar.name, begin, f"a name of {size} bytes")
            data = bytes(tar.read(offset, size))
            if kind == "x":
                extended |= _records(tar, begin, data)
            elif kind == "L":
                extended["path"] = _text(data)
            if kind != "g":
                continue
            # Of use for comments only: it is for all files that follow.
            if not _records(tar, begin, data).keys().isdisjoint(("path", "size")):
                raise broken(tar.name, begin, "one name or size for all its files")
        elif kind not in "12345":  # links, devices and folders hold no bytes
            raise broken(tar.name, begin, f"an entry of kind {kind!r}, which no dataset has")
        elif size:
            raise broken(tar.name, begin, f"a {kind!r} entry of {size} bytes")
        extended = {}
        begin = at
    if extended:
        raise broken(tar.name, begin, "an extended header of nothing")
    _check_end(tar, at)


def write_member(stream: BinaryIO, name: str, data: bytes) -> int:
    """Append one file; the offset of its bytes. The same name and data give the same bytes."""
    stream.write(_canonical_header(name, len(data)))
    offset = stream.tell()
    stream.write(data)
    stream.write(bytes(_padded(len(data)) - len(data)))
    return offset


def finish(stream: BinaryIO) -> None:
    """Mark the end of a tar."""
    stream.write(bytes(2 * BLOCK))


def broken(name: str, at: int, reason: str) -> BrokenTar:
    """The error for the tar `name`, whose byte `at` is the first that is wrong."""
    return BrokenTar(f"{name}: broken at byte {at}: {reason}")


def _canonical_header(name: str, size: int) -> bytes:
    """A regular file (POSIX.1-1988) of nobody, from the beginning of time, that all may read."""
    encoded = name.encode("ascii")
    assert len(encoded) <= 100 and size < 8**11, name
    digits = b"%011o" % size
    checksum = _CHECKSUM + sum(encoded) + sum(digits)
    before = encoded.ljust(100, b"\0") + _OWNERS + digits + _TIME
    return before + b"%06o\0 " % checksum + _REST


def _parse_canonical(header: bytes) -> tuple[str, int, bool]:
    """Name and size of a header, and whether `write_member` has written it."""
    encoded, digits = header[:100].rstrip(b"\0"), header[124:135]
    if not digits.isdigit() or not encoded.isascii():
        return "", 0, False
    try:
        name, size = encoded.decode("ascii"), int(digits, 8)
    except ValueError:  # a digit 8 or 9
        return "", 0, False
    return name, size, header == _canonical_header(name, size)


def _is_plain(header: bytes, name: str) -> bool:
    """Whether a header has none of what ustar, GNU and others put where a plain one has zeros."""
    return (
        header[_MAGIC] == _USTAR
        and header[:100] == name.encode().ljust(100, b"\0")
        and header[124] < 0x80
        and not header[157:257].strip(b"\0")  # whom it links to
        and not header[345:].strip(b"\0")  # the rest of a long name
    )


def _header(tar: Tar, at: int) -> bytes:
    """The header at `at`; empty at the end."""
    if at + BLOCK > tar.bytes:
        raise broken(tar.name, at, "it ends without the mark of its end; it was cut short")
    header = bytes(tar.read(at, BLOCK))
    return header if header[0] or header.strip(b"\0") else b""


def _parse(tar: Tar, at: int, header: bytes) -> tuple[str, str, int]:
    """Kind, name and size of a header."""
    if header[257:262] != b"ustar":
        hint = "; decompress it" if header.startswith(_COMPRESSED) else ""
        raise broken(tar.name, at, f"no tar header{hint}")
    checksum, size = header[148:156], header[124:136]
    if size[0] == 0x80:  # GNU's and star's way to write 8 GiB and more
        count = int.from_bytes(size[1:], "big")
    elif _OCTAL.fullmatch(size):
        count = int(size.strip(b"\0 "), 8)
    else:
        raise broken(tar.name, at, "a header whose numbers are none")
    # The checksum's own bytes count as spaces: 8 x 32 = 256.
    if not _OCTAL.fullmatch(checksum) or sum(header) - sum(checksum) + 256 != int(
        checksum.strip(b"\0 "), 8
    ):
        raise broken(tar.name, at, "a header whose checksum is wrong")
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    return chr(header[156]), name, count


def _records(tar: Tar, at: int, data: bytes) -> dict[str, str]:
    """A pax header's records: `LENGTH KEY=VALUE` and a newline, the length that of the record."""
    found = {}
    while data:
        digits = data[:20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) < length <= len(data) or data[length - 1 : length] != b"\n":
            raise broken(tar.name, at, "an extended header that cannot be read")
        key, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
        found[_text(key)] = _text(value)
        data = data[length:]
    if any(key.startswith("GNU.sparse") for key in found):
        raise broken(tar.name, at, "a sparse file, which no dataset has")
    if not _DECIMAL.fullmatch(found.get("size", "0")):
        raise broken(tar.name, at, "an extended header whose size is no number")
    return found


def _check_end(tar: Tar, at: int) -> None:
    """Nothing but zeros, two blocks of them or more."""
    left = tar.bytes - at
    if left < 2 * BLOCK:
        raise broken(tar.name, at, "the mark of its end was cut short")
    if left > _MAX_END_BYTES:
        raise broken(tar.name, at, f"{left} bytes after its end")
    for start in range(at, tar.bytes, _CHUNK):
        rest = bytes(tar.read(start, min(_CHUNK, tar.bytes - start)))
        if ahead := rest.lstrip(b"\0"):
            raise broken(tar.name, start + len(rest) - len(ahead), "data after its end")


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK

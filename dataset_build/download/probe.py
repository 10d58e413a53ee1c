"""What a picture claims to be, read from its first bytes: nothing is decoded before this passes.

Only JPEG, PNG, WebP and, if asked for, GIF have a way to the decoder. The pixel size comes from the
format's own header, so a decompression bomb is refused for the price of reading a few bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC_BYTES = 12
"""How many bytes `kind` needs."""

# Start-of-frame markers: all of C0..CF except DHT (C4), JPG (C8) and DAC (CC). ITU-T T.81, B.1.1.3.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset({0xC0, 0xC1, 0xC9})
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length: TEM, RSTn, SOI
_MAX_SCANNED = 1_000_000_000
"""Pixels of all scans of a JPEG together; encoders make a dozen scans."""


class NotPicture(Exception):
    """Refused; `reason` is the name under which the pair is dropped."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Probe:
    """A picture's format, its size in pixels, and bits per channel."""

    kind: str
    width: int
    height: int
    bits: int = 8


def kind(head: bytes) -> str:
    """`jpeg`, `png`, `webp`, `gif`, or "" for anything else."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return ""


def probe(data: bytes) -> Probe:
    """Format and size of a whole picture file.

    Raises `NotPicture` with reason `not_an_image` (unknown format), `undecodable` (a header that
    makes no sense) or `truncated` (the file stops before the format's end mark).
    """
    readers = {"jpeg": _jpeg, "png": _png, "webp": _webp, "gif": _gif}
    if (reader := readers.get(kind(data))) is None:
        raise NotPicture("not_an_image", f"begins with {data[:8].hex()}")
    if len(data) < 30:  # every reader's fixed fields lie below
        raise NotPicture("truncated", f"{len(data)} bytes")
    try:
        found = reader(data)
    except (struct.error, IndexError):
        raise NotPicture("truncated", "ends within its header") from None
    if not found.width or not found.height:
        raise NotPicture("undecodable", f"{found.width} x {found.height} pixels")
    return found


def _jpeg(data: bytes) -> Probe:
    position, size, bits, frame, components = 2, None, 8, 0, 0
    while True:
        if data[position] != 0xFF:
            raise NotPicture("undecodable", "no marker where JPEG has one")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _BARE:
            position += 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker in _FRAMES:
            frame = marker
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            size = width, height
        elif marker in (0xDA, 0xD9):  # the scan begins, or there is none
            break
        position += 2 + length
    if size is None:
        raise NotPicture("undecodable", "no frame header")
    if data.rfind(b"\xff\xd9", position) < 0:
        raise NotPicture("truncated", "no end-of-image marker")
    # A scan may be a few bytes and yet go over every pixel. In coded data FF is followed by 00.
    # libjpeg reads no second one where the first has all components of a sequential frame.
    if frame not in _SEQUENTIAL or data[position + 4] < components:
        scans = data.count(b"\xff\xda", position)
        if scans * size[0] * size[1] > _MAX_SCANNED:
            raise NotPicture("too_many_pixels", f"{scans} scans of {size[0]} x {size[1]}")
    return Probe("jpeg", *size, bits)


def _png(data: bytes) -> Probe:
    if data[12:16] != b"IHDR":
        raise NotPicture("undecodable", "no IHDR chunk")
    width, height, bits = struct.unpack_from(">IIB", data, 16)
    end = data.rfind(b"IEND")
    if end < 0 or len(data) < end + 8:  # its checksum follows
        raise NotPicture("truncated", "no IEND chunk")
    return Probe("png", width, height, bits)


def _webp(data: bytes) -> Probe:
    (size,) = struct.unpack_from("<I", data, 4)
    if len(data) < size + 8:
        raise NotPicture("truncated", f"{len(data)} of {size + 8} bytes")
    chunk = data[12:16]
    if chunk == b"VP8X":  # 24-bit little-endian, minus one
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif chunk == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    elif chunk == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise NotPicture("undecodable", f"first chunk {chunk!r}")
    return Probe("webp", width, height)


def _gif(data: bytes) -> Probe:
    width, height = struct.unpack_from("<HH", data, 6)
    return Probe("gif", width, height)

"""Hostile pictures turned into plain 8-bit pixels, for a bounded price.

Only what makes pixels reaches a decoder: a PNG's compressed texts and colour profiles, which may
unfold to gigabytes, do not, nor do frames after the first. What has more than 8 bits or
transparency is brought down here: img2dataset does it in float64, 75 bytes a pixel.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from dataset_build.download import probe

_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_DEFLATE_RATIO = 1032  # at most, of zeros
_STEP_BYTES = 1 << 20
_UNCHECKED_BYTES = 1 << 30  # inflated in some 2 s


def pixels(data: bytes) -> npt.NDArray[np.uint8]:
    """A picture as 8-bit grey [height, width] or BGR [height, width, 3], on white if transparent.

    Raises `probe.NotPicture` with reason `undecodable`.
    """
    kind = probe.kind(data)
    if kind == "png":
        data = png_essence(data)
    elif kind == "gif":
        data = gif_essence(data)
    found: npt.NDArray[Any] | None = cv2.imdecode(
        np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED
    )
    if found is None:
        raise probe.NotPicture("undecodable", "the decoder refuses it")
    if found.dtype == np.uint16:  # the upper byte; img2dataset would cut off at 255
        found = cv2.convertScaleAbs(np.right_shift(found, 8, out=found))
    if found.dtype != np.uint8:
        raise probe.NotPicture("undecodable", f"pixels of {found.dtype}")
    if found.ndim == 3 and found.shape[2] == 4:
        found = _on_white(found)
    return np.ascontiguousarray(found)


def _on_white(bgra: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """alpha / 255 x colour + 255 - alpha, rounded: no product of bytes / 255 lies at a half."""
    alpha: npt.NDArray[Any] = cv2.cvtColor(bgra[..., 3], cv2.COLOR_GRAY2BGR)
    colour = cv2.multiply(cv2.cvtColor(bgra, cv2.COLOR_BGRA2BGR), alpha, scale=1 / 255)
    return np.asarray(cv2.add(colour, cv2.bitwise_not(alpha)), np.uint8)


def png_essence(data: bytes) -> bytes:
    """A PNG without chunks that no pixel depends on (ISO/IEC 15948, 5.3).

    Raises `probe.NotPicture` if the chunks do not add up, or unfold to more than the pixels.
    """
    kept, position = [data[:8]], 8
    stream, left = zlib.decompressobj(), _png_bytes(data)
    may_be_long = len(data) * _DEFLATE_RATIO > _UNCHECKED_BYTES
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        name, end = data[position + 4 : position + 8], position + 12 + length
        if end > len(data):
            raise probe.NotPicture("undecodable", f"a chunk {name!r} beyond the end")
        if name in _PNG_PIXELS:
            kept.append(data[position:end])
        if name == b"IDAT" and may_be_long:
            left -= _inflated(stream, data[position + 8 : end - 4], left)
        if name == b"IEND":
            break
        position = end
    return b"".join(kept)


def _png_bytes(data: bytes) -> int:
    """What the pixels of a PNG take before compression, or a little more; a byte a row is added,
    and up to four a row by interlacing."""
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    if colour not in _PNG_CHANNELS:
        raise probe.NotPicture("undecodable", f"colour type {colour}")
    row = -(-width * bits * _PNG_CHANNELS[colour] // 8)
    return int(height * (row + 5) + 64)


def _inflated(stream: zlib._Decompress, data: bytes, most: int) -> int:
    """How many bytes come out of a stream for these; more than `most` are not waited for."""
    total = 0
    try:
        while data and not stream.eof:
            total += len(stream.decompress(data, _STEP_BYTES))
            if total > most:
                raise probe.NotPicture("undecodable", "more data than pixels")
            data = stream.unconsumed_tail
    except zlib.error as error:
        raise probe.NotPicture("undecodable", str(error)) from None
    return total


def gif_essence(data: bytes) -> bytes:
    """A GIF up to the end of its first picture (GIF89a, appendix B).

    Raises `probe.NotPicture` if the blocks do not add up.
    """
    try:
        position = 13 + _table_bytes(data[10])
        while data[position] == 0x21:  # an extension: a label, then blocks
            position = _after_blocks(data, position + 2)
        if data[position] != 0x2C:
            raise probe.NotPicture("undecodable", "no picture in it")
        position = _after_blocks(data, position + 11 + _table_bytes(data[position + 9]))
    except IndexError:
        raise probe.NotPicture("truncated", "ends within its first picture") from None
    return data[:position] + b"\x3b"


def _table_bytes(packed: int) -> int:
    """Size of the colour table that a packed field announces."""
    return 3 << (packed & 7) + 1 if packed & 0x80 else 0


def _after_blocks(data: bytes, position: int) -> int:
    while size := data[position]:
        position += 1 + size
    return position + 1

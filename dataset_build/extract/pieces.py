"""One piece of a WARC or WAT file, read exactly: is it whole, and where does it end?

A piece is what a damaged place can spoil: in a compressed file a gzip member, which holds one
record (WARC 1.1, annex D), in a plain one a record. It is whole if its checksum is right and each
record ends, after as many bytes as it says, in two line breaks, as the format demands.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from dataclasses import dataclass, field
from typing import IO

from fastwarc.warc import ArchiveIterator, WarcRecord

MAX_RECORD_BYTES = 64 << 20
"""Common Crawl cuts pages at 1 MiB; a larger record is no page, and its body is not read."""

_MAX_HEAD_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 16
# Of a member: as much is read, and inflated, at a time; its first bytes must be in the first part.
_STEP_BYTES, _MAX_STEP_BYTES = 1 << 12, 1 << 14
_VAIN_PER_BYTE = 64  # pages are compressed to a fifth
_FIND_BYTES = 1 << 12, 1 << 20
_VERSION = b"WARC/"
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_RECORD_END = re.compile(rb"\r\n\r\n[\r\n]*")  # more line breaks do no harm
_RECORD_END_BYTES = 4
_MEMBER_BEGIN = re.compile(rb"\x1f\x8b\x08")
# Pages, too, may say `WARC/`; zeros are what a disk or a broken transfer leaves of a record.
_RECORD_BEGIN = re.compile(rb"WARC/1\.(?<=(?:\r\n\r\n|\0\0\0\0)WARC/1\.)")
_MAX_PATTERN_BYTES = 11

Record = tuple[WarcRecord, bytes]
"""A record and its body, which is empty if it is larger than `MAX_RECORD_BYTES`."""


@dataclass
class Piece:
    """What begins at a position of a file."""

    end: int = -1
    """Position after it (bytes), if it is whole."""
    records: list[Record] = field(default_factory=list)
    """What it holds, if it is whole."""
    is_cut: bool = False
    """Whether the file ends within it."""
    is_foreign: bool = False
    """Whether it begins like no record: not a piece, but a part of one that looks so."""

    next_try: int = 0
    """Position where the next one may begin at the earliest, if it is beyond the next byte."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is damaged."""
        return self.end >= 0


class Members:
    """Pieces of a file of which every record is a gzip member.

    In what is damaged, or made to be slow, thousands of members may seem to begin, one within the
    other, and each be inflated for nothing. What is no record is left after its first bytes. Of
    what begins like one, those within others are tried too, until more has been inflated in vain
    than `MAX_RECORD_BYTES` and `_VAIN_PER_BYTE` for each byte of the file up to there; then the
    next is looked for where the last try ended. So the work grows with the file's size.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._in_vain = 0

    def find(self, start: int) -> int:
        """Position of what may be a member from `start` on (bytes); -1 if there is none."""
        return _find(self._raw, _MEMBER_BEGIN, start)

    def read(self, position: int) -> Piece:
        """The member at a position."""
        self._raw.seek(position)
        member = zlib.decompressobj(wbits=31)
        kept, size, is_cut, after = bytearray(), 0, False, position
        try:
            while not (member.eof or is_cut):
                chunk = member.unconsumed_tail or self._raw.read(_STEP_BYTES)
                text = member.decompress(chunk, _MAX_STEP_BYTES)
                size += len(text)
                if len(kept) <= MAX_RECORD_BYTES + _MAX_HEAD_BYTES:
                    kept += text
                is_cut = not chunk
                after = self._raw.tell() - len(member.unconsumed_tail)
                is_late = after - position >= _STEP_BYTES and size < len(_VERSION)
                if is_late or not kept.startswith(_VERSION[:size]):
                    return Piece(is_foreign=True)
        except zlib.error:
            pass
        if member.eof and (records := _records(bytes(kept), size)) is not None:
            return Piece(self._raw.tell() - len(member.unused_data), records)
        is_much = size > 0 and self._in_vain > MAX_RECORD_BYTES + _VAIN_PER_BYTE * position
        self._in_vain += size
        return Piece(is_cut=is_cut, next_try=after if is_much else 0)


class PlainRecords:
    """Pieces of a file that is not compressed. Nothing tells whether a body has been changed."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._size = os.fstat(raw.fileno()).st_size

    def find(self, start: int) -> int:
        """Position of what may be a record from `start` on (bytes); -1 if there is none."""
        return _find(self._raw, _RECORD_BEGIN, start)

    def read(self, position: int) -> Piece:
        """The record at a position."""
        self._raw.seek(position)
        head = self._raw.read(_MAX_HEAD_BYTES)
        if not head.startswith(_VERSION[: len(head)]):
            return Piece(is_foreign=True)
        if not (blank := _HEAD_END.search(head)):
            return Piece(is_cut=position + len(head) == self._size)
        if (record := _first_record(head)) is None:
            return Piece()
        start = position + blank.end()
        end = start + record.content_length
        if end + _RECORD_END_BYTES > self._size:
            return Piece(is_cut=True)
        self._raw.seek(end)
        after = self._raw.read(_CHUNK_BYTES)
        if line_breaks := _RECORD_END.match(after):
            next_one = end + line_breaks.end()
        elif after.startswith(_VERSION, _RECORD_END_BYTES):
            next_one = end + _RECORD_END_BYTES  # only what is between the two is damaged
        else:
            return Piece()
        self._raw.seek(start)
        is_read = record.content_length <= MAX_RECORD_BYTES
        body = self._raw.read(record.content_length) if is_read else b""
        return Piece(next_one, [(record, body)])


def is_one_stream(begin: bytes) -> bool:
    """Whether the first gzip member has several records, as where a whole file was compressed."""
    member, text = zlib.decompressobj(wbits=31), bytearray()
    try:
        for start in range(0, len(begin), 4096):
            text += member.decompress(begin[start : start + 4096])
            if member.eof or len(text) > _CHUNK_BYTES << 6:
                break
    except zlib.error:
        pass  # what was read before tells
    record, blank = _first_record(bytes(text)), _HEAD_END.search(text)
    if record is None or blank is None:
        return False
    after = blank.end() + record.content_length + _RECORD_END_BYTES
    return text.startswith(_VERSION, after)


def _first_record(data: bytes) -> WarcRecord | None:
    try:
        return next(iter(ArchiveIterator(io.BytesIO(data), parse_http=False)), None)
    except OSError:
        return None


def _records(data: bytes, size: int) -> list[Record] | None:
    """Records that a member of `size` bytes is made of, by its first bytes; None if it is not."""
    found: list[Record] = []
    position = 0
    try:
        for record in ArchiveIterator(io.BytesIO(data), parse_http=False):
            if not (blank := _HEAD_END.search(data, position)):
                return None
            start, end = blank.end(), blank.end() + record.content_length
            if record.content_length > MAX_RECORD_BYTES:
                found.append((record, b""))
                position = end + _RECORD_END_BYTES
            elif after := _RECORD_END.match(data, end):
                found.append((record, data[start:end]))
                position = after.end()
            else:
                return None
    except OSError:  # what follows on a record is none
        return None
    return found if position == size else None


def _find(raw: IO[bytes], pattern: re.Pattern[bytes], start: int) -> int:
    """Position of the next `pattern` from `start` on; -1 if there is none."""
    position = max(0, start - _MAX_PATTERN_BYTES)
    raw.seek(position)
    text, (size, most) = b"", _FIND_BYTES
    while chunk := raw.read(size):
        text, size = text + chunk, min(2 * size, most)  # it may be near, again and again
        if found := pattern.search(text, max(0, start - position)):
            return position + found.start()
        done = max(0, len(text) - _MAX_PATTERN_BYTES)
        text, position = text[done:], position + done
    return -1

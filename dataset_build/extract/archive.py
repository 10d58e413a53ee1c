"""Records of a WARC or WAT file, past whatever of it is broken.

Every record of a compressed archive is a gzip member of its own (WARC 1.1, annex D), so what a
damaged one spoils is itself: reading resumes at the next member that opens, or, uncompressed, at
the next record's header. A file that was cut off is recognised by its end.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fastwarc.warc import ArchiveIterator, WarcRecord

from pipeline.config import UserError
from pipeline.manifest import Stats

_MAX_RECORD_BYTES = 64 << 20  # Common Crawl cuts pages at 1 MiB; a larger record is no page
_GZIP_MEMBER = b"\x1f\x8b\x08"
_HEADER = b"WARC/"


def records(path: Path, kind: Any, stats: Stats) -> Iterator[tuple[int, WarcRecord, bytes]]:
    """Position in the file (bytes), record and body of each record of a `WarcRecordType`.

    Counts in `stats.counts`: `archive_records`, `broken_members` (places where reading had to
    resume), `truncated_files`. Raises `UserError` for what is no archive at all.
    """
    counts = stats.counts
    size = path.stat().st_size
    start, last, found, was_broken, cut = 0, -1, 0, False, False
    with path.open("rb") as raw:
        compressed = raw.read(3) == _GZIP_MEMBER or path.suffix == ".gz"
        while 0 <= start < size:
            raw.seek(start)
            try:
                for record in ArchiveIterator(raw, record_types=kind, parse_http=False):
                    last = record.stream_pos
                    body = b""
                    if record.content_length <= _MAX_RECORD_BYTES:
                        body = record.reader.read()
                        if len(body) < record.content_length:
                            raise EOFError
                    else:
                        counts["oversized_records"] += 1
                    found, was_broken = found + 1, False
                    if body:
                        yield last, record, body
                break
            except EOFError:  # the end of the file cut the body short, or its length is a lie
                start = _find(raw, _GZIP_MEMBER if compressed else _HEADER, last + 1)
                cut = start < 0
                counts["broken_members"] += not cut
            except OSError as error:
                if error.errno is not None:
                    raise  # the disk's fault, not the archive's
                # One damaged place makes several tries fail; it counts once.
                counts["broken_members"] += not was_broken
                was_broken = True
                start = _find(raw, _GZIP_MEMBER if compressed else _HEADER, max(start, last) + 1)
        if size and not found and was_broken:
            raise UserError(
                f"{path}: not a WARC or WAT archive, or damaged from end to end; check the "
                "patterns of the extract section, and download the file again"
            )
        counts["archive_records"] += found
        damaged = was_broken or cut or not size
        if damaged or not _ends_whole(raw, max(last, start), size, compressed):
            counts["truncated_files"] += 1


def _find(raw: IO[bytes], pattern: bytes, start: int) -> int:
    """Position of the next `pattern` from `start` on; -1 if there is none."""
    raw.seek(start)
    tail = b""
    while chunk := raw.read(1 << 20):
        if (found := (tail + chunk).find(pattern)) >= 0:
            return start - len(tail) + found
        start += len(chunk)
        tail = chunk[1 - len(pattern) :]
    return -1


def _ends_whole(raw: IO[bytes], position: int, size: int, compressed: bool) -> bool:
    """Whether the file ends where a record does; `position` is where some late record begins."""
    if not compressed:
        raw.seek(max(0, size - 4))
        return raw.read() == b"\r\n\r\n"
    raw.seek(position)
    rest = b""
    while chunk := rest or raw.read(1 << 16):
        member = zlib.decompressobj(wbits=31)
        try:
            member.decompress(chunk)
            while not member.eof:
                if not (chunk := raw.read(1 << 16)):
                    return False
                member.decompress(chunk)
        except zlib.error:
            return False
        rest = member.unused_data
    return True

"""Records of a WARC or WAT file, past whatever of it is broken.

FastWARC reads ahead at full speed. Where it stumbles, at the last record, and wherever a body may
be longer than it says, pieces are read exactly until one is whole: what is damaged loses itself
only, and a file that was cut off is recognised by its end.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fastwarc.warc import ArchiveIterator, WarcRecord

from dataset_build.extract.pieces import (
    MAX_RECORD_BYTES,
    Members,
    Piece,
    PlainRecords,
    is_one_stream,
)
from pipeline.config import BadInput
from pipeline.stats import Stats

_ONE_RECORD_BYTES = 1 << 20  # where Common Crawl cuts pages
_GZIP, _VERSION = b"\x1f\x8b\x08", b"WARC/"

Found = tuple[int, WarcRecord, bytes]


def records(path: Path, kind: Any, stats: Stats) -> Iterator[Found]:
    """Position in the file (bytes), record and body of each record of a `WarcRecordType`.

    Counts in `stats.counts`: `archive_records`, `oversized_records`, `truncated_files`,
    `broken_members` (damaged records, as far as it shows where they begin), and `lost_bytes` of the
    file, from the end of what is whole to where reading resumed. Raises `BadInput` for what is no
    archive at all.
    """
    counts = stats.counts
    with path.open("rb") as raw, path.open("rb") as again:
        begin = raw.read(1 << 20)
        if not begin:
            counts["truncated_files"] += 1
        # The first bytes tell how the file is written; its name does if they are damaged.
        if begin.startswith(_VERSION) or (path.suffix != ".gz" and not begin.startswith(_GZIP)):
            found = _resuming(path, raw, PlainRecords(again), kind, counts)
        elif is_one_stream(begin):
            found = _up_to_damage(path, raw, kind, counts)
        else:
            found = _resuming(path, raw, Members(again), kind, counts)
        number = 0
        for position, record, body in found:
            number += 1
            if body:
                yield position, record, body
            elif record.content_length:
                counts["oversized_records"] += 1
        counts["archive_records"] += number


def losses(name: str, size: int, counts: Counter[str], max_lost: float) -> str:
    """What an archive of `size` bytes has lost, by the counts of `records`; "" for nothing.

    Raises `BadInput` if that is a larger share than `max_lost` and more than one damaged record
    or a cut, which any file bears; if `max_lost` is 0, if it is damaged at all.
    """
    damaged, cut, lost = (counts[n] for n in ("broken_members", "truncated_files", "lost_bytes"))
    if not damaged + cut:
        return ""
    what = [f"{damaged} damaged record{'s' * (damaged > 1)}"] * (damaged > 0)
    what += ["cut off at its end"] * (cut > 0)
    told = f"{', '.join(what)}; {lost:,} of {size:,} bytes are lost" if size else "empty"
    is_one = damaged + cut == 1 and lost <= _ONE_RECORD_BYTES
    if not max_lost or (lost > max_lost * size and not is_one):
        raise BadInput(
            f"{name}: {told}, {lost / max(1, size):.1%}: extract.max_lost is {max_lost:.1%}; fetch"
            " the file again, or raise extract.max_lost"
        )
    return told


def _resuming(
    path: Path, raw: IO[bytes], pieces: Members | PlainRecords, kind: Any, counts: Counter[str]
) -> Iterator[Found]:
    """What is whole of an archive whose records can be told apart."""
    size = path.stat().st_size
    start = 0
    while start < size:
        # A record is handed on when the next one follows on it: so its checksum was right.
        held: Found | None = None
        position = start
        raw.seek(start)
        try:
            for record in ArchiveIterator(raw, parse_http=False):
                if held:
                    yield held
                held, position = None, record.stream_pos
                if record.record_type != kind:
                    continue
                body = b""
                if record.content_length <= MAX_RECORD_BYTES:
                    body = record.reader.read()
                    if len(body) < record.content_length:
                        break
                # A length that is too large by a little takes in the line breaks after the body.
                if body.endswith((b"\r", b"\r\n")) and not pieces.read(position).is_whole:
                    break
                held = position, record, body
        except OSError as error:
            if error.errno is not None:
                raise  # the disk's fault, not the archive's
        found, piece = _next_whole(path, pieces, position, size, counts)
        for record, body in piece.records:
            if record.record_type == kind:
                yield found, record, body
        start = piece.end


def _next_whole(
    path: Path, pieces: Members | PlainRecords, start: int, size: int, counts: Counter[str]
) -> tuple[int, Piece]:
    """Position of the next whole piece from `start` on, and the piece; an empty one at the end."""
    position, broken, cut = start, 0, 0
    while position >= 0 and not (piece := pieces.read(position)).is_whole:
        cut += piece.is_cut
        broken += not piece.is_cut and (position == start or not piece.is_foreign)
        position = pieces.find(max(position + 1, piece.next_try))
    if position < 0:
        position, piece = size, Piece(size)
    else:
        # Another follows: its length is wrong, or its end is missing, but not the file's.
        broken, cut = broken + cut, 0
    if position - start == size and broken:
        raise BadInput(
            f"{path}: not a WARC or WAT archive, or damaged from end to end; check the "
            "patterns of the extract section, and download the file again"
        )
    if position > start:
        counts["broken_members"] += broken
        counts["truncated_files"] += cut > 0
        counts["lost_bytes"] += position - start
    return position, piece


def _up_to_damage(path: Path, raw: IO[bytes], kind: Any, counts: Counter[str]) -> Iterator[Found]:
    """Records of an archive that was compressed as one: what follows on damage is not legible."""
    raw.seek(0)
    stream = _UntilDamage(fileobj=raw)
    is_broken = False
    try:
        for record in ArchiveIterator(stream, parse_http=False):
            if record.record_type != kind:
                continue
            is_read = record.content_length <= MAX_RECORD_BYTES
            body = record.reader.read() if is_read else b""
            if is_read and len(body) < record.content_length:
                is_broken = True
                break
            yield raw.tell(), record, body
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's fault, not the archive's
        is_broken = True
    if isinstance(stream.fault, EOFError):
        counts["truncated_files"] += 1
    elif is_broken or stream.fault:
        counts["broken_members"] += 1
        counts["lost_bytes"] += path.stat().st_size - raw.tell()


class _UntilDamage(gzip.GzipFile):
    """A gzip stream that ends where it is damaged."""

    fault: Exception | None = None

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes; none at the end."""
        try:
            return b"" if self.fault else self.read1(-1 if size is None else size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
            self.fault = fault
            return b""

"""Records of a WARC or WAT file, past whatever of it is broken.

FastWARC reads ahead at full speed. Where it stumbles, at the last record, and wherever a body may
be longer than it says, pieces are read exactly until one is whole: what is damaged loses itself
only, and a file that was cut off is recognised by its end.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fastwarc.warc import ArchiveIterator, WarcRecord

from dataset_build.extract.pieces import MAX_RECORD_BYTES, Members, Piece, PlainRecords
from pipeline.config import UserError
from pipeline.manifest import Stats

log = logging.getLogger(__name__)

_ONE_RECORD_BYTES = 1 << 20  # where Common Crawl cuts pages
_GZIP, _VERSION = b"\x1f\x8b\x08", b"WARC/"

Found = tuple[int, WarcRecord, bytes]


def records(path: Path, kind: Any, stats: Stats) -> Iterator[Found]:
    """Position in the file (bytes), record and body of each record of a `WarcRecordType`.

    Counts in `stats.counts`: `archive_records`, `oversized_records`, `truncated_files`,
    `broken_members` (damaged records, as far as it shows where they begin), and `lost_bytes` of the
    file, from the end of what is whole to where reading resumed. Raises `UserError` for what is no
    archive at all.
    """
    counts = stats.counts
    with path.open("rb") as raw, path.open("rb") as again:
        begin = raw.read(1 << 20)
        counts["truncated_files"] += not begin
        # The first bytes tell how the file is written; its name does if they are damaged.
        if begin.startswith(_VERSION) or (path.suffix != ".gz" and not begin.startswith(_GZIP)):
            found = _resuming(path, raw, PlainRecords(again), kind, counts)
        elif _is_one_stream(begin):
            found = _up_to_damage(path, raw, kind, counts)
        else:
            found = _resuming(path, raw, Members(again), kind, counts)
        for position, record, body in found:
            counts["archive_records"] += 1
            counts["oversized_records"] += record.content_length > MAX_RECORD_BYTES
            if body:
                yield position, record, body


def judge_losses(name: str, size: int, counts: Counter[str], max_lost: float) -> None:
    """Warn of what an archive of `size` bytes has lost, by the counts of `records`.

    Raises `UserError` if that is a larger share than `max_lost`; if not 0, it bears one damaged
    record, or a cut, in any file.
    """
    lost, damaged, cut = (counts[n] for n in ("lost_bytes", "broken_members", "truncated_files"))
    if not damaged + cut:
        return
    what = " and ".join([f"{damaged} damaged records"] * (damaged > 0) + ["cut off"] * (cut > 0))
    told = f"{name}: {what}; {lost:,} of {size:,} bytes are lost"
    is_one = damaged + cut == 1 and lost <= _ONE_RECORD_BYTES
    if lost > max_lost * size and not (is_one and max_lost):
        raise UserError(
            f"{told}, {lost / size:.1%}: more than extract.max_lost, {max_lost:.1%}; fetch the file"
            " again, or raise extract.max_lost"
        )
    log.warning("%s", told)


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
        position = pieces.find(position + 1)
    if position < 0:
        position, piece = size, Piece(size)
    else:
        # Another follows: its length is wrong, or its end is missing, but not the file's.
        broken, cut = broken + cut, 0
    if position - start == size and broken:
        raise UserError(
            f"{path}: not a WARC or WAT archive, or damaged from end to end; check the "
            "patterns of the extract section, and download the file again"
        )
    counts["broken_members"] += broken
    counts["truncated_files"] += cut > 0
    counts["lost_bytes"] += position - start
    return position, piece


def _is_one_stream(begin: bytes) -> bool:
    """Whether the first gzip member has several records, as where a whole file was compressed."""
    try:
        return b"\r\n\r\nWARC/1." in zlib.decompressobj(wbits=31).decompress(begin, 4 << 20)
    except zlib.error:
        return False


def _up_to_damage(path: Path, raw: IO[bytes], kind: Any, counts: Counter[str]) -> Iterator[Found]:
    """Records of an archive that was compressed as one: what follows on damage is not legible."""
    size = path.stat().st_size
    position = 0
    raw.seek(0)
    try:
        for record in ArchiveIterator(gzip.GzipFile(fileobj=raw), parse_http=False):
            body = b""
            if record.record_type == kind and record.content_length <= MAX_RECORD_BYTES:
                body = record.reader.read()
                if len(body) < record.content_length:
                    raise EOFError
            position = raw.tell()
            if record.record_type == kind:
                yield position, record, body
        return
    except EOFError:
        counts["truncated_files"] += 1
    except (OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the archive's
        counts["broken_members"] += 1
    counts["lost_bytes"] += size - position

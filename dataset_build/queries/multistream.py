"""Parts of a multistream dump, so that many tasks read one: bz2 streams of a hundred pages each.

Where a stream begins is told by its first bytes, so the index, a gigabyte of text, is not read; but
only that it lies beside a dump says that streams begin with pages, for programs that compress in
parallel cut them anywhere. A damaged stream loses itself.
"""

from __future__ import annotations

import bz2
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.stats import Stats

_BEGIN = re.compile(rb"BZh[1-9]1AY&SY")  # level, and the mark of a stream's first block
_BEGIN_BYTES = 10
_CHUNK = 1 << 20
_MOST = 256 << 20  # bytes of a stream: a hundred pages of MediaWiki's limit of 2 MiB, and some
_END = b"</mediawiki>"


def index_of(path: Path) -> Path:
    """Where the index of a dump lies, if it has one: beside it, by Wikimedia's names."""
    name = path.name.replace("-multistream", "-multistream-index", 1).replace(".xml", ".txt", 1)
    return path.with_name(name)


def is_multistream(path: Path) -> bool:
    """Whether the streams of a dump hold whole pages each, and the first of them none."""
    if path.suffix != ".bz2" or index_of(path) == path or not index_of(path).is_file():
        return False
    decompressor = bz2.BZ2Decompressor()
    try:
        with path.open("rb") as raw:  # a stream of all pages does not end in the first megabyte
            head = decompressor.decompress(raw.read(_CHUNK), _CHUNK)
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's fault
        return False
    return decompressor.eof and b"<page>" not in head


class Part:
    """The dump's head and the pages of the streams that begin from `start` on and before `end`,
    bytes of the file, as XML that can be read like a file. Counts `broken_streams` in `stats`, and
    `truncated_files` if the last of them is not the dump's end."""

    def __init__(self, raw: IO[bytes], start: int, end: int, stats: Stats) -> None:
        self._data = self._xml(raw, start, end, stats)
        self._stream = io.BytesIO()

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; none at the end."""
        while not (taken := self._stream.read(size)) and size:
            if (more := next(self._data, None)) is None:
                break
            self._stream = io.BytesIO(more)
        return taken

    def _xml(self, raw: IO[bytes], start: int, end: int, stats: Stats) -> Iterator[bytes]:
        last = b""
        if start > 0:  # what says which namespaces there are
            last = next(_streams(raw, 0, 1, Stats()), b"")
            yield last
        for last in _streams(raw, start, end, stats):
            yield last
        if not last.rstrip().endswith(_END):
            stats.counts["truncated_files"] += end >= raw.seek(0, io.SEEK_END)
            yield _END


def _streams(raw: IO[bytes], start: int, end: int, stats: Stats) -> Iterator[bytes]:
    """What each whole stream holds that begins within the bounds; some megabytes each, and none
    more than `_MOST` bytes."""
    at = _next(raw, start)
    while at is not None and at < end:
        raw.seek(at)
        decompressor, parts, read, held = bz2.BZ2Decompressor(), [], 0, 0
        try:
            while not decompressor.eof and held < _MOST:
                chunk = raw.read(_CHUNK) if decompressor.needs_input else b""
                if decompressor.needs_input and not chunk:
                    break
                read += len(chunk)
                parts.append(decompressor.decompress(chunk, _MOST - held))
                held += len(parts[-1])
        except OSError as error:
            if error.errno is not None:
                raise  # the disk's fault
        if decompressor.eof:
            yield b"".join(parts)
            after = at + read - len(decompressor.unused_data)
            at = _next(raw, after)
            if at != after and after < raw.seek(0, io.SEEK_END):  # the next has no beginning
                stats.counts["broken_streams"] += 1
        else:
            stats.counts["broken_streams"] += 1
            at = _next(raw, at + 1)


def _next(raw: IO[bytes], start: int) -> int | None:
    """Where the first stream from `start` on begins."""
    raw.seek(start)
    tail = b""
    while chunk := raw.read(_CHUNK):
        if found := _BEGIN.search(tail + chunk):
            return start - len(tail) + found.start()
        start += len(chunk)
        tail = (tail + chunk)[1 - _BEGIN_BYTES :]
    return None

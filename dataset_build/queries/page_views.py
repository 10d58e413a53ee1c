"""Views of encyclopedia titles, summed over Wikimedia's hourly `pageviews-*.gz` files.

Lines are `domain title views bytes`; a wiki's desktop and mobile sites ("en", "en.m") count as one.
Format: https://dumps.wikimedia.org/other/pageviews/readme.html

A day has millions of titles, so they are sorted in blocks and merged range by range, in memory that
depends on neither.
"""

from __future__ import annotations

import gzip
import itertools
import tempfile
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import dataset

from pipeline.config import BadInput
from pipeline.stats import Stats

_SUBJECTS = (
    "user", "wikipedia", "project", "file", "image", "mediawiki", "template", "help", "category",
    "portal", "draft", "module", "book", "timedtext", "topic",
)  # fmt: skip
_NAMESPACES = frozenset(
    ["media", "special", "talk", "wp", "wt", *_SUBJECTS, *(f"{name} talk" for name in _SUBJECTS)]
)
_NO_ARTICLES = frozenset(["-", "Main Page", "404.php", "undefined"])
_FIELDS = r"^[^ ]+ (?P<title>[^ ]*) (?P<views>[0-9]{1,12})(?: |\n|$)"
# Most titles: no "%", no ":", no space but single ones within, no byte beyond ASCII.
_PLAIN = r"^[!-$&-9;-^`-~]+(?:_[!-$&-9;-^`-~]+)*$"
_READ = 1 << 20  # bytes
_BLOCK = 16 << 20  # bytes of lines that are sorted at a time
_RANGE = 1 << 19  # rows that are merged at a time
_STEP = 1 << 12  # rows of a block for each title that may end a range
_GROUP = 1 << 15  # rows of a block that are read at a time
_VIEWS = pa.schema([("title", pa.string()), ("views", pa.uint64())])


def count_views(
    paths: Sequence[Path],
    folder: Path,
    name: str,
    *,
    wiki: str,
    progress: Callable[[int, int], None],
) -> Stats:
    """Write `counts-views-NAME.parquet`: every title that was viewed in `paths`, sorted.

    `progress(done, total)` is called with numbers of files, several times a second.
    """
    stats = Stats()
    marks: list[str] = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        runs = Path(place)
        numbers = itertools.count()
        for done, path in enumerate(paths):
            seen = stats.counts["view_lines"]
            for block in _blocks(path, stats):
                progress(done, len(paths))
                views = _sum(_views(block, wiki, stats))
                views.write_parquet(
                    runs / f"{next(numbers)}.parquet", row_group_size=_GROUP, compression="lz4"
                )
                # Strings of their own: a Series would keep the whole block in memory.
                marks += views["title"].gather_every(_STEP).to_list()
            if stats.counts["view_lines"] == seen:
                raise BadInput(
                    f"{path}: no page views of {wiki!r} in it; expected Wikimedia's hourly format, "
                    f"`{wiki} Title views bytes` a line; check queries.page_views and queries.wiki"
                )
        target = folder / f"counts-views-{name}.parquet"
        with pq.ParquetWriter(target, _VIEWS, compression="zstd") as writer:
            for views in _merged(runs, marks):
                progress(len(paths), len(paths))
                writer.write_table(views.to_arrow().cast(_VIEWS))
    return stats


def decode_title(raw: bytes) -> str | None:
    """The title as an article shows it, or None for what is no article's title."""
    try:
        title = raw.decode()
    except UnicodeDecodeError:
        return None
    if "%" in title:
        title = urllib.parse.unquote(title)
    title = " ".join(title.replace("_", " ").split())
    prefix, colon, _ = title.partition(":")
    if not title or title in _NO_ARTICLES or (colon and prefix.strip().lower() in _NAMESPACES):
        return None
    return title


def _sum(views: pl.DataFrame) -> pl.DataFrame:
    """One row a title, sorted."""
    return views.group_by("title").agg(pl.col("views").sum()).sort("title")


def _merged(runs: Path, marks: list[str]) -> Iterator[pl.DataFrame]:
    """All titles of sorted blocks and their views, in order, about `_RANGE` rows at a time; `marks`
    are every `_STEP`th title of each."""
    ends = sorted(set(sorted(marks)[_RANGE // _STEP :: _RANGE // _STEP]))
    rows, title = dataset.dataset(runs, format="parquet"), dataset.field("title")
    for first, end in itertools.pairwise(["", *ends, None]):
        within = title >= first if end is None else (title >= first) & (title < end)
        table = rows.to_table(filter=within, use_threads=False, fragment_readahead=1)
        yield _sum(cast("pl.DataFrame", pl.from_arrow(table)))


def _views(block: bytes, wiki: str, stats: Stats) -> pl.DataFrame:
    """Titles and views of a wiki's lines; a title comes as often as there are lines of it."""
    lines = _lines(block)
    sites = (pc.starts_with(lines, f"{site} ") for site in (wiki, f"{wiki}.m"))
    own = lines.filter(pc.or_(*sites))
    fields = pc.extract_regex(own, _FIELDS).drop_null()
    undivided = pc.invert(pc.match_substring_regex(lines, r"^\n?$| "))
    stats.counts["malformed_lines"] += _count(undivided) + len(own) - len(fields)
    stats.counts["view_lines"] += len(fields)
    raw, views = fields.flatten()
    plain = pc.match_substring_regex(raw, _PLAIN)
    decoded = [decode_title(title) for title in raw.filter(pc.invert(plain)).to_pylist()]
    spaced = pc.replace_substring(raw.filter(plain).cast(pa.string()), "_", " ")
    titles = pa.concat_arrays([spaced, pa.array(decoded, pa.string())])
    numbers = pa.concat_arrays([views.filter(plain), views.filter(pc.invert(plain))])
    read = pl.DataFrame({"title": titles, "views": numbers.cast(pa.string()).cast(pa.uint64())})
    kept = read.filter(~pl.col("title").is_in(_NO_ARTICLES))  # nor null
    stats.counts["no_title_lines"] += len(read) - len(kept)
    return kept


def _lines(block: bytes) -> pa.Array:
    """Each with its line end."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")).astype(np.int32) + 1
    if not block.endswith(b"\n"):
        ends = np.append(ends, np.int32(len(block)))
    offsets = np.concatenate([[np.int32(0)], ends]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block)]
    return pa.Array.from_buffers(pa.binary(), len(ends), buffers)


def _count(chosen: pa.Array) -> int:
    return int(pc.sum(chosen).as_py() or 0)


def _blocks(path: Path, stats: Stats) -> Iterator[bytes]:
    """The lines of a file, some `_BLOCK` bytes of whole lines at a time; none is as long."""
    with path.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        read = bytearray()
        is_endless = False
        try:
            while data := stream.read1(_READ):
                if is_endless:
                    _, end, data = data.partition(b"\n")
                    is_endless = not end
                read += data
                if len(read) >= _BLOCK:
                    if cut := read.rfind(b"\n") + 1:
                        yield bytes(memoryview(read)[:cut])
                    else:
                        stats.counts["malformed_lines"] += 1
                        is_endless = True
                    del read[: cut or len(read)]
        except (EOFError, gzip.BadGzipFile, zlib.error):  # cut off: what came before it counts
            stats.counts["truncated_files"] += 1
            stats.warn(path.name, "cut off or damaged: what follows on that is not counted")
        if read:
            yield bytes(read)

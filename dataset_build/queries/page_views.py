"""Views of encyclopedia titles, summed over Wikimedia's hourly `pageviews-*.gz` files.

Lines are `domain title views bytes`; a wiki's desktop and mobile sites ("en", "en.m") count as one.
Format: https://dumps.wikimedia.org/other/pageviews/readme.html
"""

from __future__ import annotations

import gzip
import urllib.parse
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import UserError
from pipeline.manifest import Stats

_SUBJECTS = (
    "user", "wikipedia", "project", "file", "image", "mediawiki", "template", "help", "category",
    "portal", "draft", "module", "book", "timedtext", "topic",
)  # fmt: skip
_NAMESPACES = frozenset(
    ["media", "special", "talk", "wp", "wt", *_SUBJECTS, *(f"{name} talk" for name in _SUBJECTS)]
)
_LINES_A_CHECK = 100_000
_NO_ARTICLES = frozenset(["-", "Main Page", "404.php", "undefined"])


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
    views: defaultdict[bytes, int] = defaultdict(int)
    for done, path in enumerate(paths):
        domains = frozenset({wiki.encode(), f"{wiki}.m".encode()})
        seen = stats.counts["view_lines"]
        for number, line in enumerate(_lines(path, stats)):
            if number % _LINES_A_CHECK == 0:
                progress(done, len(paths))
            domain, space, rest = line.partition(b" ")
            if not space:
                stats.counts["malformed_lines"] += bool(line)
            elif domain in domains:
                title, _, numbers = rest.partition(b" ")
                try:
                    views[title] += int(numbers.split(b" ", 1)[0])
                except ValueError:
                    stats.counts["malformed_lines"] += 1
                    continue
                stats.counts["view_lines"] += 1
        if stats.counts["view_lines"] == seen:
            raise UserError(
                f"{path}: no page views of {wiki!r} in it; expected Wikimedia's hourly format, "
                f"`{wiki} Title views bytes` a line; check queries.page_views and queries.wiki"
            )
    titles: defaultdict[str, int] = defaultdict(int)
    for raw, number in views.items():
        title_text = decode_title(raw)
        if title_text is None:
            stats.counts["no_title_lines"] += 1
        else:
            titles[title_text] += number
    rows = sorted(titles.items())
    columns = {
        "title": pa.array([title for title, _ in rows], pa.string()),
        "views": pa.array([number for _, number in rows], pa.uint64()),
    }
    pq.write_table(pa.table(columns), folder / f"counts-views-{name}.parquet", compression="zstd")
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


def _lines(path: Path, stats: Stats) -> Iterator[bytes]:
    with path.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            for line in stream:
                yield line.rstrip(b"\n")
        except (EOFError, gzip.BadGzipFile, zlib.error):  # cut off: what came before it counts
            stats.counts["truncated_files"] += 1

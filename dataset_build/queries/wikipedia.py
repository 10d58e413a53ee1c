"""Words, neighbouring pairs of words, titles and redirects of a Wikipedia dump, streamed.

Reads `pages-articles` dumps (.xml, .xml.bz2, .xml.gz), whole or in parts. Words are those of
articles: redirects and other namespaces have none. A dump that was cut off gives what came before
the cut.
"""

from __future__ import annotations

import bz2
import gzip
import xml.etree.ElementTree
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

import mwxml
import mwxml.errors
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build.queries.counts import WordCounts
from dataset_build.queries.multistream import Part
from dataset_build.queries.wikitext import words
from dataset_build.text import clean
from pipeline.config import BadInput
from pipeline.stats import Stats

_TITLES = pa.schema([("title", pa.string()), ("target", pa.string())])
_TITLES_HELD = 1 << 16
_BROKEN = (
    *(EOFError, OSError, zlib.error, xml.etree.ElementTree.ParseError, mwxml.errors.MalformedXML),
    *(AssertionError, AttributeError, LookupError, ValueError),  # mwxml's, of what it misses
)


def count_dump(
    path: Path,
    folder: Path,
    name: str,
    *,
    fold_case: bool,
    max_held: int,
    progress: Callable[[int, int], None],
    bounds: tuple[int, int] | None = None,
) -> Stats:
    """Write `counts-titles-NAME.parquet` and, one or several, `counts-{words,pairs}-NAME-*.parquet`
    for one dump into `folder`; with `bounds`, for the streams of a multistream dump that begin
    within, bytes of the file.

    Titles are in the dump's order, with the target of those that are redirects.

    Pairs hold row numbers of the words file of the same name, whose metadata has the totals. There
    is another once there are more than `max_held` words and pairs in memory. `progress(done,
    total)` is called for every page with bytes of the file.
    """
    stats = Stats()
    counts, part = WordCounts(), 0
    first_byte, last_byte = bounds or (0, path.stat().st_size)
    bytes_read = last_byte - first_byte
    with path.open("rb") as raw, _Titles(folder / f"counts-titles-{name}.parquet") as titles:
        for page in pages(raw, str(path), stats, bounds):
            titles.add(page)
            counts.add(words(page.text, fold_case))
            if counts.held > max_held:
                _write_counts(counts, folder, f"{name}-{part:04d}", stats)
                counts, part = WordCounts(), part + 1
            progress(raw.tell() - first_byte, bytes_read)
    _write_counts(counts, folder, f"{name}-{part:04d}", stats)
    if wrong := _wrong(stats.counts, bounds is not None):
        stats.warn(str(path), wrong)
    return stats


def _wrong(counts: Counter[str], is_part: bool) -> str:
    """What is wrong with a dump, or a part of one, that was read to its end."""
    what = []
    if broken := counts["broken_streams"]:
        what += [f"{broken} damaged bz2 streams, some hundred pages each, are lost"]
    if is_part and counts["truncated_files"]:
        what += ["cut off: its end is missing"]
    if not is_part and not counts["words_read"]:
        what += ["no article with a word in it; is it a pages-articles dump?"]
    return "; ".join(what)


def _write_counts(counts: WordCounts, folder: Path, name: str, stats: Stats) -> None:
    distinct, word_counts = counts.words()
    first, second, pair_counts = counts.word_pairs()
    totals = {"words": str(counts.total_words), "pairs": str(counts.total_pairs)}
    table = pa.table({"word": pa.array(distinct, pa.string()), "count": word_counts})
    _write(table.replace_schema_metadata(totals), folder / f"counts-words-{name}.parquet")
    numbers = {"first": first, "second": second, "count": pair_counts}
    table = pa.table({column: values.astype("uint32") for column, values in numbers.items()})
    _write(table, folder / f"counts-pairs-{name}.parquet")
    stats.counts["words_read"] += counts.total_words


class Page(NamedTuple):
    """An article, or a redirect to one."""

    title: str
    target: str
    """Where a redirect leads, else ""."""
    text: str
    """Wikitext; of a redirect there is none."""


def pages(
    raw: IO[bytes], name: str, stats: Stats, bounds: tuple[int, int] | None = None
) -> Iterator[Page]:
    """Each article and redirect; counts them, and what was skipped, in `stats.counts`."""
    counts = stats.counts
    try:
        stream = Part(raw, *bounds, stats) if bounds else _decompressed(raw, name)
        for page in mwxml.Dump.from_file(stream):
            if page.namespace != 0:
                counts["other_namespaces"] += 1
            elif page.redirect is not None:
                counts["redirects"] += 1
                yield Page(page.title, page.redirect, "")
            else:
                text = ""
                for revision in page:  # a pages-articles dump has the newest only
                    text = revision.text or ""
                counts["articles"] += 1
                yield Page(page.title, "", text)
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the dump's
        why = str(error).partition(": b'")[0][:100]  # there mwxml quotes what it read
        if not counts["articles"] and not counts["redirects"]:
            raise BadInput(
                f"{name}: not a Wikipedia dump ({why}); expected a pages-articles XML file, "
                "plain, .bz2 or .gz"
            ) from None
        counts["truncated_files"] += 1
        read = counts["articles"] + counts["redirects"] + counts["other_namespaces"]
        stats.warn(name, f"damaged or cut off after {read:,} pages: the rest is lost ({why})")


class _Titles:
    """A parquet file of titles, written as they come: an encyclopedia has twenty million."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, _TITLES, compression="zstd")
        self._rows: list[tuple[str, str]] = []

    def add(self, page: Page) -> None:
        """One more."""
        self._rows.append((clean(page.title), clean(page.target)))
        if len(self._rows) == _TITLES_HELD:
            self._flush()

    def _flush(self) -> None:
        columns = list(zip(*self._rows, strict=True)) or [(), ()]
        self._writer.write_table(pa.table([pa.array(c, pa.string()) for c in columns], _TITLES))
        self._rows = []

    def __enter__(self) -> _Titles:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()


def _decompressed(raw: IO[bytes], name: str) -> IO[bytes]:
    if name.endswith(".bz2"):
        return cast("IO[bytes]", bz2.open(raw))  # one stream or many, as in the multistream dumps
    if name.endswith(".gz"):
        return cast("IO[bytes]", gzip.open(raw))
    return raw


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", row_group_size=1 << 20)

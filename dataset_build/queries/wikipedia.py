"""Words, neighbouring pairs of words and titles of a Wikipedia dump, streamed.

Reads `pages-articles` dumps (.xml, .xml.bz2, .xml.gz), whole or in parts. Articles only: redirects
and other namespaces are skipped. A dump that was cut off gives what came before the cut.
"""

from __future__ import annotations

import bz2
import gzip
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

import mwxml
import mwxml.errors
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build.queries.counts import WordCounts
from dataset_build.queries.wikitext import phrases
from dataset_build.text import clean, normalise
from pipeline.config import UserError
from pipeline.manifest import Stats


def count_dump(
    path: Path,
    folder: Path,
    name: str,
    *,
    fold_case: bool,
    max_words: int,
    max_pairs: int,
    progress: Callable[[int, int], None],
) -> Stats:
    """Write `counts-{words,pairs,titles}-NAME.parquet` for one dump into `folder`.

    Pairs hold row numbers of the words file. The words file's metadata has the totals and how much
    a count can be short. `progress(done, total)` is called for every page with bytes of the file.
    """
    counts = WordCounts(max_words, max_pairs)
    stats = Stats()
    titles: list[str] = []
    size = path.stat().st_size
    with path.open("rb") as raw:
        for title, text in articles(raw, path.name, stats):
            counts.add(normalise(phrase, fold_case).split() for phrase in phrases(text))
            titles.append(clean(title))
            progress(raw.tell(), size)
    words, word_counts = counts.words()
    first, second, pair_counts = counts.word_pairs()
    stats.counts["words_read"] = counts.total_words
    stats.counts["distinct_words"] = len(words)
    stats.counts["distinct_pairs"] = len(pair_counts)
    totals = {
        "words": str(counts.total_words),
        "pairs": str(counts.total_pairs),
        "undercount": str(max(counts.undercount, counts.pairs.undercount)),
    }
    table = pa.table({"word": pa.array(words, pa.string()), "count": word_counts})
    _write(table.replace_schema_metadata(totals), folder / f"counts-words-{name}.parquet")
    numbers = {"first": first, "second": second, "count": pair_counts}
    table = pa.table({column: values.astype("uint32") for column, values in numbers.items()})
    _write(table, folder / f"counts-pairs-{name}.parquet")
    table = pa.table({"title": pa.array(sorted(titles), pa.string())})
    _write(table, folder / f"counts-titles-{name}.parquet")
    return stats


def articles(raw: IO[bytes], name: str, stats: Stats) -> Iterator[tuple[str, str]]:
    """Title and wikitext of each article; counts what was skipped in `stats.counts`."""
    counts = stats.counts
    try:
        for page in mwxml.Dump.from_file(_decompressed(raw, name)):
            if page.namespace != 0:
                counts["other_namespaces"] += 1
            elif page.redirect is not None:
                counts["redirects"] += 1
            else:
                text = ""
                for revision in page:  # a pages-articles dump has the newest only
                    text = revision.text or ""
                counts["articles"] += 1
                yield page.title, text
    except (
        EOFError,
        OSError,
        xml.etree.ElementTree.ParseError,
        mwxml.errors.MalformedXML,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the dump's
        if not counts["articles"] and not counts["redirects"]:
            raise UserError(
                f"{name}: not a Wikipedia dump ({error}); expected a pages-articles XML file, "
                "plain, .bz2 or .gz"
            ) from None
        counts["truncated_files"] += 1


def _decompressed(raw: IO[bytes], name: str) -> IO[bytes]:
    if name.endswith(".bz2"):
        return cast("IO[bytes]", bz2.open(raw))  # one stream or many, as in the multistream dumps
    if name.endswith(".gz"):
        return cast("IO[bytes]", gzip.open(raw))
    return raw


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", row_group_size=1 << 20)

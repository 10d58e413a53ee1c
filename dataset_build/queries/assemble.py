"""One list of queries out of counts, views, WordNet and the user's own: merged, ranked, cut.

Order of admission: the user's own, words by count, bigrams by pointwise mutual information, titles
by views, all of WordNet in alphabetical order, whose places are kept free; `limit` in all. Ties by
string, so that the same inputs give the same bytes. What is equal after normalisation is one query
with all its sources.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build.queries import wordnet
from dataset_build.queries.counts import U64, packed, summed, unpacked
from dataset_build.records import QUERIES
from dataset_build.text import clean, normalise
from pipeline import files
from pipeline.config import BadInput, ConfigError
from pipeline.stats import Stats

# "Mercury (planet)": what tells homonyms apart is no part of the name.
_DISAMBIGUATOR = re.compile(r"\s*\(([^()]*)\)$")
_PAIR = np.dtype([("key", np.uint64), ("count", np.uint32)])
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, near 2**64 / golden ratio: spreads keys (Knuth, 6.4)


@dataclass(frozen=True)
class Rules:
    """The thresholds; the meaning of each is documented in `QueriesSettings`."""

    min_word_count: int
    max_bigrams: int
    min_bigram_count: int
    min_bigram_pmi: float
    max_titles: int | None
    min_views: int
    limit: int
    fold_case: bool


def assemble(
    counts: Sequence[Path],
    data: Sequence[Path],
    own: Sequence[Path],
    folder: Path,
    rules: Rules,
    *,
    max_held: int,
) -> Stats:
    """Write `queries.parquet` from the counted files, WordNet's data files and the user's lists;
    and `wordnet.parquet`, if there is any of `data`. Of bigrams, some `max_held` are in memory at a
    time; while they are sorted, all lie in files without a name in `folder`, 12 bytes each.

    Raises `ConfigError` if WordNet alone has more queries than `limit`.
    """
    stats = Stats()
    synsets = [synset for path in data for synset in wordnet.synsets(path)]
    lemmas = Counter(lemma for synset in synsets for lemma in set(synset.lemmas))
    kinds: dict[str, list[Path]] = {"words": [], "pairs": [], "titles": [], "views": []}
    for path in counts:
        kinds[path.name.split("-")[1]].append(path)
    admitted = _Admitted(rules, stats)
    admitted.reserve(lemmas)
    for path in own:
        empty = True
        for line in _own_lines(path):
            admitted.add(line, "file")
            empty = False
        if empty:
            stats.warn(str(path), "no query in it")
    if kinds["words"]:
        words = _words(kinds["words"], rules, stats)
        bigrams = list(_bigrams(kinds, words, rules, stats, folder, max_held))
        enough = words.filter(pl.col("count") >= rules.min_word_count)
        stats.drop("below_min_count", len(words) - len(enough))
        for word, count in enough.sort(["count", "word"], descending=[True, False]).iter_rows():
            admitted.add(word, "word", word_count=count)
        for text, count, pmi in bigrams:
            admitted.add(text, "bigram", pair_count=count, pmi=pmi)
    if kinds["views"]:
        for title, views in _titles(kinds, rules, stats):
            admitted.add(title, "title", rules.max_titles, views=views)
    for lemma in sorted(lemmas):
        admitted.add(lemma, "wordnet", synsets=lemmas[lemma])
    stats.dropped = +stats.dropped  # without reasons that met no term
    stats.rows_out = len(admitted.rows)
    stats.rows_in = stats.rows_out + sum(stats.dropped.values())
    if not admitted.rows:
        if not stats.dropped:
            raise BadInput("queries: none of the sources holds anything; add one that does")
        raise ConfigError(
            f"no query passed the thresholds ({dict(stats.dropped)}); lower "
            "queries.min_word_count or queries.min_views, or add sources"
        )
    _write(admitted.rows, folder / "queries.parquet")
    if synsets:
        ids = {norm: number for number, norm in enumerate(admitted.rows)}
        by_lemma = {lemma: ids[norm] for lemma in lemmas if (norm := admitted.norm(lemma)) in ids}
        table = wordnet.table(synsets, by_lemma)
        pq.write_table(table, folder / "wordnet.parquet", compression="zstd")
        stats.counts["synsets"] = len(synsets)
    return stats


@dataclass
class _Admitted:
    """The queries so far, by their normalised form."""

    rules: Rules
    stats: Stats
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    _of_source: dict[str, int] = field(default_factory=dict)
    _reserved: set[str] = field(default_factory=set)
    """Of those that WordNet brings, the ones that are not there yet."""
    _refused: set[int] = field(default_factory=set)

    def norm(self, text: str) -> str:
        """What a query is known by."""
        return normalise(clean(text), self.rules.fold_case)

    def reserve(self, texts: Iterable[str]) -> None:
        """Keep places free. Raises `ConfigError` if there are not so many."""
        self._reserved = {norm for text in texts if (norm := self.norm(text))}
        if len(self._reserved) > self.rules.limit:
            raise ConfigError(
                f"queries.limit is {self.rules.limit}, and WordNet alone has {len(self._reserved)}"
                " queries, which are always all of the list: set it higher, or queries.wordnet=[]"
            )

    def add(self, text: str, source: str, limit: int | None = None, **numbers: float) -> None:
        """Admit a query, or note one more source of it; every refusal is counted."""
        text = clean(text)
        norm = normalise(text, self.rules.fold_case)
        row = self.rows.get(norm)
        if not norm:
            self.stats.drop("no_letter_or_number")
        elif row is not None:
            self.stats.drop("duplicate")
            if source not in row["sources"]:
                row["sources"].append(source)
                self.stats.observe("source", source)
            for name, number in numbers.items():
                row.setdefault(name, number)
        elif limit is not None and self._of_source.get(source, 0) >= limit:
            self.stats.drop(f"over_max_{source}s")
        elif norm not in self._reserved and len(self.rows) + len(self._reserved) >= (
            self.rules.limit
        ):
            # By its hash alone, for there are millions; another spelling of it comes no more in.
            is_known = hash(norm) in self._refused
            self._refused.add(hash(norm))
            self.stats.drop("duplicate" if is_known else "over_limit")
            if not is_known:
                self.stats.observe("cut_off", source)
        else:
            self._reserved.discard(norm)
            self.rows[norm] = {"text": text, "norm": norm, "sources": [source], **numbers}
            self._of_source[source] = self._of_source.get(source, 0) + 1
            self.stats.observe("source", source)
            self.stats.observe("admitted_by", source)


def _words(files: list[Path], rules: Rules, stats: Stats) -> pl.DataFrame:
    """Columns word, count over all dumps, sorted by word; only those any rule can still want.

    A bigram occurs no more often than its words, so with them go no bigrams that would be admitted.
    """
    counted = pl.scan_parquet(files).group_by("word").agg(pl.col("count").sum())
    floor = min(rules.min_word_count, rules.min_bigram_count)
    distinct = pl.scan_parquet(files).select(pl.col("word").n_unique()).collect(engine="streaming")
    words = counted.filter(pl.col("count") >= floor).sort("word").collect(engine="streaming")
    stats.drop("below_min_count", distinct.item() - len(words))
    return words


def _bigrams(
    kinds: Mapping[str, list[Path]],
    words: pl.DataFrame,
    rules: Rules,
    stats: Stats,
    folder: Path,
    max_held: int,
) -> Iterator[tuple[str, int, float]]:
    """Text, count and PMI in bits of each bigram admitted, best first.

    PMI = log2(p(a, b) / (p(a) p(b))), Church and Hanks, Computational Linguistics 1990.
    """
    totals = [pq.read_schema(path).metadata for path in kinds["words"]]
    total_words, total_pairs = (sum(int(t[name]) for t in totals) for name in (b"words", b"pairs"))
    vocabulary = words.with_row_index("number", offset=1).select("word", "number")
    frequent = []
    for keys, counts in _pairs(kinds, vocabulary, folder, max_held):
        often = counts >= rules.min_bigram_count
        stats.drop("below_min_bigram_count", int(np.count_nonzero(~often)))
        frequent.append((keys[often], counts[often]))
    keys, counts = (np.concatenate(columns) for columns in zip(*frequent, strict=True))
    first, second = unpacked(keys)
    single = np.concatenate([[1.0], words["count"].to_numpy().astype(np.float64)])
    ratio = (counts / max(total_pairs, 1)) / (single[first] * single[second] / total_words**2)
    pmi = np.round(np.log2(ratio), 6)  # rounded, lest another machine's last digit reorders ties
    close = pmi >= rules.min_bigram_pmi
    stats.drop("below_min_bigram_pmi", int(np.count_nonzero(~close)))
    first, second, counts, pmi = first[close], second[close], counts[close], pmi[close]
    # Words are numbered in alphabetical order, so identifiers break ties like strings.
    order = np.lexsort((second, first, -pmi))
    stats.drop("over_max_bigrams", max(0, len(order) - rules.max_bigrams))
    text = words["word"].to_list()
    for row in order[: rules.max_bigrams]:
        a, b = text[int(first[row]) - 1], text[int(second[row]) - 1]
        yield f"{a} {b}", int(counts[row]), float(pmi[row])


def _pairs(
    kinds: Mapping[str, list[Path]], vocabulary: pl.DataFrame, folder: Path, max_held: int
) -> Iterator[tuple[U64, U64]]:
    """Keys and counts, over all files, of the pairs of words in the vocabulary, in parts.

    Each file has its own words and is sorted by their numbers. So pairs are spread by a hash over
    so many files that the pairs of each fit in memory, even if no two are equal.
    """
    rows = sum(pq.read_metadata(path).num_rows for path in kinds["pairs"])
    parts = max(1, -(-rows // max_held))
    with ExitStack() as stack:
        spread = [stack.enter_context(TemporaryFile(dir=folder)) for _ in range(parts)]
        for words_path, pairs_path in zip(kinds["words"], kinds["pairs"], strict=True):
            for pairs in _renumbered(words_path, pairs_path, vocabulary):
                part_of = (pairs["key"] * _MIX >> np.uint64(32)) % np.uint64(parts)
                for part, file in enumerate(spread):
                    pairs[part_of == part].tofile(file)
        for file in spread:
            file.seek(0)
            pairs = np.fromfile(file, _PAIR)
            yield summed(pairs["key"], pairs["count"].astype(np.uint64))


def _renumbered(
    words_path: Path, pairs_path: Path, vocabulary: pl.DataFrame
) -> Iterator[npt.NDArray[Any]]:
    """The pairs of one file, by the numbers that the vocabulary gives their words."""
    own = pl.read_parquet(words_path, columns=["word"])
    numbers = own.join(vocabulary, on="word", how="left", maintain_order="left")["number"]
    number_of = numbers.fill_null(0).to_numpy().astype(np.uint64)
    with files.open_parquet(pairs_path) as parquet:
        for batch in parquet.iter_batches(batch_size=1 << 22):
            first, second, counts = (column.to_numpy() for column in batch.columns)
            first, second = number_of[first], number_of[second]
            kept = (first > 0) & (second > 0)
            pairs = np.empty(np.count_nonzero(kept), _PAIR)
            pairs["key"], pairs["count"] = packed(first[kept], second[kept]), counts[kept]
            yield pairs


def _titles(
    kinds: Mapping[str, list[Path]], rules: Rules, stats: Stats
) -> Iterator[tuple[str, int]]:
    """Article titles without disambiguators and their views, most viewed first; whoever looked at a
    redirect has seen the article that it leads to."""
    views = pl.scan_parquet(kinds["views"]).group_by("title").agg(pl.col("views").sum())
    if kinds["titles"]:
        titles = pl.scan_parquet(kinds["titles"]).group_by("title").agg(pl.col("target").min())
        articles = titles.filter(pl.col("target") == "").select("title", article=True)
        redirects = titles.filter(pl.col("target") != "")
        led = views.join(redirects, on="title", how="left")
        stats.counts["redirected_titles"] = (
            led.select(pl.col("target").is_not_null().sum()).collect(engine="streaming").item()
        )
        at_articles = led.select(pl.coalesce("target", "title").alias("title"), "views")
        summed = at_articles.group_by("title").agg(pl.col("views").sum())
        joined = summed.join(articles, on="title", how="left")
    else:
        joined = views.with_columns(article=True)
    enough = pl.col("views") >= rules.min_views
    article = pl.col("article").fill_null(False)
    summary = joined.select(
        not_an_article=(~article).sum(), below_min_views=(article & ~enough).sum()
    )
    for reason, rows in summary.collect(engine="streaming").to_dicts()[0].items():
        stats.drop(reason, rows)
    rows = joined.filter(article & enough).select("title", "views")
    ranked = rows.sort(["views", "title"], descending=[True, False]).collect(engine="streaming")
    for title, number in ranked.iter_rows():
        match = _DISAMBIGUATOR.search(title)
        if match and match[1].strip().lower() == "disambiguation":
            stats.drop("disambiguation_page")
        else:
            yield (title[: match.start()] if match else title) or title, number


def _own_lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as lines:
            yield from (line for line in lines if not line.isspace())
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error}); give one query a line") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{path}: damaged or cut off ({error}); take a whole copy") from None


def _write(rows: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    columns: dict[str, list[Any]] = {name: [] for name in QUERIES.names}
    for rank, row in enumerate(rows.values()):
        for name, column in columns.items():
            column.append(rank if name in {"query_id", "rank"} else row.get(name))
    pq.write_table(pa.table(columns, schema=QUERIES), target, compression="zstd")

"""500,000 real queries and 1,000,000 real texts for `benchmarks.match`.

The queries are all of WordNet's lemmas, a large English word list, and the most frequent bigrams of
some Wikipedia articles. The texts are human captions of photos, alt texts of web pages, and
sentences of those articles as long as captions are, drawn with a fixed seed.
"""

from __future__ import annotations

import gzip
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dataset_build.extract import ExtractSettings, warc, wat
from dataset_build.extract.candidates import Candidates
from dataset_build.queries.counts import WordCounts
from dataset_build.queries.wikipedia import pages
from dataset_build.queries.wikitext import plain_text, words
from dataset_build.text import clean, normalise
from pipeline.config import MissingInput
from pipeline.stats import Stats

QUERIES = 500_000
TEXTS = 1_000_000
WORDNET = Path("/usr/share/wordnet")
WORD_LIST = Path("/usr/share/dict/american-english-huge")

_SENTENCE_END = re.compile(r"\n+|(?<=\w\w\w[.!?])\s+")
_CAPTION_LENGTH = range(10, 200)  # characters


@dataclass(frozen=True)
class Inputs:
    """What is searched for, and where."""

    queries: list[str]
    """As they are written; no two are equal once normalised."""
    texts: list[str]
    """As they are stored: `text.clean` of what was read."""
    sizes: dict[str, int]
    """How many of each kind there are."""


def load() -> Inputs:
    """Read everything. Raises `MissingInput` saying what to install or set."""
    wordnet = _files(WORDNET, "data.*", "install Debian's wordnet-base")
    (word_list,) = _files(WORD_LIST.parent, WORD_LIST.name, "install Debian's wamerican-huge")
    folder = os.environ.get("OPENWIT_DATA")
    if not folder:
        raise MissingInput("$OPENWIT_DATA is not set: it names the folder of real inputs")
    data, hint = Path(folder), "$OPENWIT_DATA must name a folder with it"
    dumps = _files(data / "wikipedia", "*.bz2", hint)
    captions = _files(data / "captions", "flickr8k.token.txt.gz", hint)
    pages = _files(data / "webarchive", "*.warc.gz", hint)
    pages += _files(data / "webarchive", "*.warc.wat", hint)

    encyclopedia = [text for dump in dumps for text in _articles(dump)]
    queries: dict[str, str] = {}
    sizes: dict[str, int] = {}
    sources = {
        "wordnet_lemmas": (lemma for path in wordnet for lemma in _lemmas(path)),
        "word_list": iter(word_list.read_text().splitlines()),
        "bigrams": _bigrams(encyclopedia),
    }
    for name, found in sources.items():
        before = len(queries)
        for query in found:
            if len(queries) < QUERIES and (norm := normalise(query)):
                queries.setdefault(norm, query)
        sizes[name] = len(queries) - before
    assert len(queries) == QUERIES, f"the inputs have {len(queries)} queries only"

    texts: dict[str, None] = {}
    kinds = {
        "captions": (caption for path in captions for caption in _captions(path)),
        "alt_texts": (text for path in pages for text in _alt_texts(path)),
        "sentences": (line for text in encyclopedia for line in _sentences(text)),
    }
    for name, lines in kinds.items():
        before = len(texts)
        texts.update((text, None) for line in lines if (text := clean(line)))
        sizes[name] = len(texts) - before
    drawn = np.random.default_rng(0).integers(0, len(texts), TEXTS).tolist()
    listed = list(texts)
    return Inputs(list(queries.values()), [listed[i] for i in drawn], sizes)


def _files(folder: Path, pattern: str, hint: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise MissingInput(f"{folder / pattern} is missing: {hint}")
    return found


def _lemmas(path: Path) -> Iterator[str]:
    """Every word of every synset of a WordNet data file (format: wndb(5WN))."""
    for line in path.read_text().splitlines():
        if not line.startswith("  "):  # the licence
            fields = line.split()
            for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]:
                yield word.partition("(")[0].replace("_", " ")


def _articles(path: Path) -> list[str]:
    with path.open("rb") as raw:
        return [page.text for page in pages(raw, path.name, Stats()) if not page.target]


def _bigrams(encyclopedia: list[str]) -> Iterator[str]:
    """All pairs of neighbouring words, the most frequent first, ties by their words."""
    counts = WordCounts()
    for text in encyclopedia:
        counts.add(words(text))
    distinct, _ = counts.words()
    pairs = zip(*(column.tolist() for column in counts.word_pairs()), strict=True)
    ranked = sorted((-count, f"{distinct[a]} {distinct[b]}") for a, b, count in pairs)
    yield from (bigram for _, bigram in ranked)


def _captions(path: Path) -> Iterator[str]:
    """`photo.jpg#n<TAB>caption`"""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield line.partition("\t")[2]


def _alt_texts(path: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "candidates.parquet"
        with Candidates(target, ExtractSettings(), "", path.name) as candidates:
            extract = wat.extract if path.suffix == ".wat" else warc.extract
            extract(path, candidates, lambda done: None)
        texts: list[str] = pq.read_table(target, columns=["text"])["text"].to_pylist()
    return texts


def _sentences(wikitext: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(plain_text(wikitext)):
        if len(sentence) in _CAPTION_LENGTH and sentence[0] not in "=*#:;|!":  # list, heading
            yield sentence

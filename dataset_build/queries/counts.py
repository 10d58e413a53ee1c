"""Counts of words and of adjacent pairs of words, in bounded memory.

Words are numbered as they appear; a pair is one 64-bit key, so that counting is sorting. Tables
that grow over their limit forget their rarest entries (lossy counting: Manku and Motwani, VLDB
2002); `undercount` bounds what any entry can have lost, and is 0 as long as everything fitted.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dataset_build.queries.wikitext import BREAK

U64 = npt.NDArray[np.uint64]

_BREAK = 0  # number of what stands between phrases; words count from 1
_CHUNK = 24_000_000  # characters counted at a time, some four million words


class PairCounts:
    """A table of 64-bit keys and their counts, held as sorted runs of doubling length."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.undercount = 0
        self._runs: list[tuple[U64, U64]] = []

    def add(self, keys: U64, counts: U64) -> None:
        """Add sorted unique `keys` with their `counts`."""
        self._runs.append((keys, counts))
        while len(self._runs) > 1 and len(self._runs[-1][0]) * 2 > len(self._runs[-2][0]):
            self._runs.append(_merge(self._runs.pop(), self._runs.pop()))
        if sum(len(run[0]) for run in self._runs) > self.limit:
            keys, counts = self.table()
            if len(keys) > self.limit:
                floor = _floor(counts, self.limit // 2)
                self.undercount += floor
                kept = counts > floor
                keys, counts = keys[kept], counts[kept]
            self._runs = [(keys, counts)]

    def table(self) -> tuple[U64, U64]:
        """All keys, sorted, and their counts."""
        while len(self._runs) > 1:
            self._runs.append(_merge(self._runs.pop(), self._runs.pop()))
        if not self._runs:
            self._runs.append((np.empty(0, np.uint64), np.empty(0, np.uint64)))
        return self._runs[0]

    def renumber(self, new: U64) -> None:
        """Replace identifier i in every key by new[i]; pairs with a word that became 0 go."""
        keys, counts = self.table()
        first, second = new[keys >> np.uint64(32)], new[keys & np.uint64(0xFFFFFFFF)]
        kept = (first > 0) & (second > 0)
        self._runs = [(_pack(first[kept], second[kept]), counts[kept])]


class WordCounts:
    """Counts words, and the pairs of those that are neighbours."""

    def __init__(self, max_words: int, max_pairs: int) -> None:
        self.max_words = max_words
        self.pairs = PairCounts(max_pairs)
        self.undercount = 0
        """The most that the count of a word can be short."""
        self.total_words = 0
        self.total_pairs = 0
        self._numbers = _Numbers({BREAK: _BREAK})
        self._counts = np.zeros(1, np.uint64)
        self._pending: list[str] = []
        self._pending_chars = 0

    def add(self, words: str) -> None:
        """Count the words of a page, which spaces part; two with a `BREAK` between are no pair."""
        self._pending.append(f"{words} {BREAK}".lstrip())
        self._pending_chars += len(words)
        if self._pending_chars > _CHUNK:
            self._count()

    def words(self) -> tuple[list[str], U64]:
        """The words in order of appearance, and their counts."""
        self._count()
        return list(self._numbers)[1:], self._counts[1:]

    def word_pairs(self) -> tuple[U64, U64, U64]:
        """Rows of `words()` of the first and second word of each pair, and the pair's count."""
        self._count()
        keys, counts = self.pairs.table()
        one = np.uint64(1)
        return (keys >> np.uint64(32)) - one, (keys & np.uint64(0xFFFFFFFF)) - one, counts

    def _count(self) -> None:
        if not self._pending:
            return
        texts = pa.array(self._pending, pa.string())
        self._pending, self._pending_chars = [], 0
        # Each distinct word is looked up once; the rest is Arrow's.
        words = pc.ascii_split_whitespace(texts).flatten().dictionary_encode()
        numbers = map(self._numbers.__getitem__, words.dictionary.to_pylist())
        ids = np.fromiter(numbers, np.uint64)[words.indices.to_numpy()]
        counts = np.bincount(ids.astype(np.int64), minlength=len(self._numbers))
        counts[: len(self._counts)] += self._counts.astype(np.int64)
        counts[_BREAK] = 0
        self._counts = counts.astype(np.uint64)
        self.total_words += int(np.count_nonzero(ids))
        inside = (ids[:-1] > 0) & (ids[1:] > 0)
        keys = _pack(ids[:-1][inside], ids[1:][inside])
        self.total_pairs += len(keys)
        unique, times = np.unique(keys, return_counts=True)
        self.pairs.add(unique, times.astype(np.uint64))
        if len(self._numbers) - 1 > self.max_words:
            self._forget_words()

    def _forget_words(self) -> None:
        floor = _floor(self._counts[1:], self.max_words // 2)
        self.undercount += floor
        # A pair occurs at most as often as its words, so it lost no more than they did.
        self.pairs.undercount += floor
        kept = self._counts > floor
        new = np.cumsum(kept, dtype=np.uint64)
        new[~kept] = 0
        self.pairs.renumber(new)
        kept[_BREAK] = True
        words = itertools.compress(self._numbers, kept.tolist())
        self._numbers = _Numbers(zip(words, itertools.count()))
        self._counts = self._counts[kept]


class _Numbers(dict[str, int]):
    """Word -> its number; an unknown word gets the next."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


def _pack(first: U64, second: U64) -> U64:
    key: U64 = (first << np.uint64(32)) | second
    return key


def _merge(a: tuple[U64, U64], b: tuple[U64, U64]) -> tuple[U64, U64]:
    keys = np.concatenate([a[0], b[0]])
    order = np.argsort(keys, kind="stable")  # merges sorted runs in linear time
    keys = keys[order]
    counts = np.concatenate([a[1], b[1]])[order]
    if not len(keys):
        return keys, counts
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts)


def _floor(counts: U64, keep: int) -> int:
    """The smallest count f such that at most `keep` entries have more than f."""
    return int(np.partition(counts, len(counts) - keep - 1)[len(counts) - keep - 1])

"""Counts of words and of adjacent pairs of words.

Words are numbered as they appear; a pair is one 64-bit key, so that counting is sorting. Counts of
parts add up: what has become too large is written out, and counting begins anew.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dataset_build.queries.wikitext import BREAK

U64 = npt.NDArray[np.uint64]

_BREAK = 0  # number of what stands between phrases; words count from 1
_CHUNK = 24_000_000  # characters counted at a time, some four million words


class WordCounts:
    """Counts words, and the pairs of those that are neighbours."""

    def __init__(self) -> None:
        self.total_words = 0
        self.total_pairs = 0
        self._numbers = _Numbers({BREAK: _BREAK})
        self._counts = np.zeros(1, np.uint64)
        self._pairs: list[tuple[U64, U64]] = []  # sorted runs of doubling length
        self._pending: list[str] = []
        self._pending_chars = 0

    @property
    def held(self) -> int:
        """Words and pairs in memory, some pairs several times; pages of late are not counted."""
        return len(self._numbers) + sum(len(keys) for keys, _ in self._pairs)

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
        while len(self._pairs) > 1:
            self._merge()
        keys, counts = self._pairs[0]
        first, second = unpacked(keys)
        one = np.uint64(1)
        return first - one, second - one, counts

    def _count(self) -> None:
        # Each distinct word is looked up once; the rest is Arrow's.
        texts = pa.array(self._pending, pa.string())
        self._pending, self._pending_chars = [], 0
        words = pc.ascii_split_whitespace(texts).flatten().dictionary_encode()
        numbers = map(self._numbers.__getitem__, words.dictionary.to_pylist())
        ids = np.fromiter(numbers, np.uint64)[words.indices.to_numpy()]
        counts = np.bincount(ids.astype(np.int64), minlength=len(self._numbers)).astype(np.uint64)
        counts[: len(self._counts)] += self._counts
        counts[_BREAK] = 0
        self._counts = counts
        self.total_words += int(np.count_nonzero(ids))
        inside = (ids[:-1] > 0) & (ids[1:] > 0)
        keys = packed(ids[:-1][inside], ids[1:][inside])
        self.total_pairs += len(keys)
        unique, times = np.unique(keys, return_counts=True)
        self._pairs.append((unique, times.astype(np.uint64)))
        while len(self._pairs) > 1 and len(self._pairs[-1][0]) * 2 > len(self._pairs[-2][0]):
            self._merge()

    def _merge(self) -> None:
        keys, counts = zip(self._pairs.pop(), self._pairs.pop(), strict=True)
        self._pairs.append(summed(np.concatenate(keys), np.concatenate(counts)))


class _Numbers(dict[str, int]):
    """Word -> its number; an unknown word gets the next."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


def packed(first: U64, second: U64) -> U64:
    """One key a pair of numbers below 2**32; keys are in the order of the pairs."""
    key: U64 = (first << np.uint64(32)) | second
    return key


def unpacked(keys: U64) -> tuple[U64, U64]:
    """The first and the second number of each pair."""
    return keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)


def summed(keys: U64, counts: U64) -> tuple[U64, U64]:
    """The distinct keys, sorted, and the sum of the counts of each."""
    order = np.argsort(keys, kind="stable")  # merges sorted runs in linear time
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[len(keys) > 0], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts) if len(keys) else counts

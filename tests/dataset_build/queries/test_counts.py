"""Counting agrees with `collections.Counter`."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_build.queries import counts as counts_module
from dataset_build.queries.counts import WordCounts, packed, summed, unpacked
from dataset_build.queries.wikitext import BREAK

PHRASES = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6), max_size=40)


def count(phrases: list[list[str]]) -> tuple[Counter[str], Counter[tuple[str, str]], WordCounts]:
    counted = WordCounts()
    for phrase in phrases:
        counted.add(" ".join(["", BREAK, *phrase, BREAK, BREAK]))
    words, numbers = counted.words()
    first, second, times = counted.word_pairs()
    pairs = Counter(
        {
            (words[int(a)], words[int(b)]): int(n)
            for a, b, n in zip(first, second, times, strict=True)
        }
    )
    return Counter(dict(zip(words, numbers.tolist(), strict=True))), pairs, counted


def expected(phrases: list[list[str]]) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    words = Counter(word for phrase in phrases for word in phrase)
    pairs = Counter(pair for p in phrases for pair in itertools.pairwise(p))
    return words, pairs


@settings(deadline=None)
@given(PHRASES, st.integers(1, 30))
def test_counts_are_exact(phrases: list[list[str]], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts_module, "_CHUNK", chunk)
        words, pairs, counted = count(phrases)
    assert (words, pairs) == expected(phrases)
    assert (counted.total_words, counted.total_pairs) == (words.total(), pairs.total())
    assert counted.held == 1 + len(words) + len(pairs)  # and what stands between phrases


PAIRS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)))


@given(PAIRS, st.integers(0, 3))
def test_equal_pairs_are_summed(pairs: list[tuple[int, int]], twice: int) -> None:
    pairs = pairs + pairs[:twice]
    first, second = np.array(pairs, np.uint64).reshape(-1, 2).T
    keys, counts = summed(packed(first, second), np.arange(len(pairs), dtype=np.uint64))
    expected: Counter[tuple[int, int]] = Counter()
    for number, pair in enumerate(pairs):
        expected[pair] += number
    found = zip(*(column.tolist() for column in unpacked(keys)), strict=True)
    assert dict(zip(found, counts.tolist(), strict=True)) == expected
    assert list(keys) == sorted(set(keys.tolist()))

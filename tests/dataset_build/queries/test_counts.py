"""Counting agrees with `collections.Counter`, and forgets within its stated bound."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_build.queries import counts as counts_module
from dataset_build.queries.counts import WordCounts
from dataset_build.queries.wikitext import BREAK

PHRASES = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6), max_size=40)


def count(
    phrases: list[list[str]], max_words: int = 1000, max_pairs: int = 1000
) -> tuple[Counter[str], Counter[tuple[str, str]], WordCounts]:
    counted = WordCounts(max_words, max_pairs)
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
def test_counts_are_exact_while_everything_fits(phrases: list[list[str]], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts_module, "_CHUNK", chunk)
        words, pairs, counted = count(phrases)
    assert (words, pairs) == expected(phrases)
    assert counted.undercount == counted.pairs.undercount == 0
    assert (counted.total_words, counted.total_pairs) == (words.total(), pairs.total())


@settings(deadline=None)
@given(PHRASES, st.integers(1, 30), st.integers(2, 6), st.integers(2, 9))
def test_forgetting_stays_within_the_bound(
    phrases: list[list[str]], chunk: int, max_words: int, max_pairs: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts_module, "_CHUNK", chunk)
        words, pairs, counted = count(phrases, max_words, max_pairs)
    true_words, true_pairs = expected(phrases)
    for word, true in true_words.items():
        assert true - counted.undercount <= words[word] <= true
    for pair, true in true_pairs.items():
        assert true - counted.pairs.undercount <= pairs[pair] <= true
    assert len(words) <= max_words
    assert len(pairs) <= max_pairs

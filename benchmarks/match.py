"""Finding 500,000 queries in captions, against two Aho-Corasick libraries.

The peer is pyahocorasick used as MetaCLIP uses it: an automaton of " query ", searched for in
" caption ", a text at a time; the same on ahocorasick_rs is reported beside it. All three give the
same lists. Words follow a Zipf law, so captions hold about eleven queries, as in the wild.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.timing import compete, memory_mb, reset_peak, seconds
from dataset_build.match import Matcher
from dataset_build.text import normalise

Search = Callable[[Sequence[str]], list[list[int]]]

QUERIES = 500_000
CAPTIONS = 100_000
_WORDS = 200_000
_SYLLABLES = re.findall("..", "bakotiramesodalinovoquesinpetaroricafelushu")


def _vocabulary() -> list[str]:
    """Made-up words of two to five syllables, the frequent ones short."""
    words = []
    for number in range(len(_SYLLABLES), len(_SYLLABLES) + _WORDS):
        word = ""
        while number:
            number, syllable = divmod(number, len(_SYLLABLES))
            word += _SYLLABLES[syllable]
        words.append(word)
    return words


def texts(seed: int = 0) -> tuple[list[str], list[str]]:
    """(queries, captions), normalised; the queries are all words and phrases of two to four."""
    rng = np.random.default_rng(seed)
    words = np.array(_vocabulary())
    chance = np.cumsum(1 / np.arange(1, _WORDS + 1))

    def draw(lengths: Any) -> list[str]:
        drawn = words[np.searchsorted(chance, rng.random(int(lengths.sum())) * chance[-1])].tolist()
        stops = np.cumsum(lengths).tolist()
        return [" ".join(drawn[a:b]) for a, b in zip([0, *stops], stops, strict=False)]

    phrases = dict.fromkeys(words.tolist())
    while len(phrases) < QUERIES:
        phrases.update(dict.fromkeys(draw(rng.choice([2, 2, 2, 3, 3, 4], 100_000))))
    return list(phrases)[:QUERIES], draw(rng.poisson(8, CAPTIONS) + 1)


def written(captions: Sequence[str], seed: int = 1) -> list[str]:
    """Captions with capitals and punctuation, which normalising takes away again."""
    rng = np.random.default_rng(seed)
    ends = np.array([".", "!", "", " - photo", ""])[rng.integers(0, 5, len(captions))]
    return [caption.capitalize() + end for caption, end in zip(captions, ends, strict=True)]


def _pyahocorasick(queries: Sequence[str]) -> Search:
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for number, query in enumerate(queries):
        automaton.add_word(f" {query} ", number)
    automaton.make_automaton()

    def search(captions: Sequence[str]) -> list[list[int]]:
        return [sorted({hit for _, hit in automaton.iter(f" {text} ")}) for text in captions]

    return search


def _ahocorasick_rs(queries: Sequence[str]) -> Search:
    import ahocorasick_rs

    spaced = [f" {query} " for query in queries]
    automaton = ahocorasick_rs.AhoCorasick(spaced, store_patterns=False)

    def search(captions: Sequence[str]) -> list[list[int]]:
        find = automaton.find_matches_as_indexes
        return [
            sorted({hit for hit, _, _ in find(f" {text} ", overlapping=True)}) for text in captions
        ]

    return search


MAKERS: dict[str, Callable[[Sequence[str]], object]] = {
    "ours": Matcher,
    "pyahocorasick": _pyahocorasick,
    "ahocorasick_rs": _ahocorasick_rs,
}


def _setup(name: str, queries: pa.Array) -> tuple[float, float]:
    """(seconds, peak MB) of a set-up in the process that calls this, which does nothing else."""
    listed = queries.to_pylist()
    reset_peak()
    before = memory_mb("VmRSS")
    took, made = seconds(lambda: MAKERS[name](listed))
    assert made is not None
    return took, memory_mb("VmHWM") - before


def _in_own_process(name: str, queries: pa.Array) -> tuple[float, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_setup, name, queries).result()


def measure() -> Iterator[dict[str, Any]]:
    """Set-up; then captions a second, normalised before and as written (each side normalises)."""
    queries, captions = texts()
    raw = written(captions)
    array = pa.array(queries)
    matcher = Matcher(queries)
    expected = matcher.match(pa.array(captions)).to_pylist()
    sizes = {
        "queries": QUERIES,
        "captions": CAPTIONS,
        "characters_per_caption": round(sum(map(len, captions)) / CAPTIONS, 1),
        "queries_per_caption": round(sum(map(len, expected)) / CAPTIONS, 1),
    }
    ours_s, ours_mb = _in_own_process("ours", array)
    for name, make in (("pyahocorasick", _pyahocorasick), ("ahocorasick_rs", _ahocorasick_rs)):
        peer_s, peer_mb = _in_own_process(name, array)
        memory = {"ours_peak_mb": round(ours_mb), "peer_peak_mb": round(peer_mb)}
        common = {"peer_name": name, **sizes}
        yield {**_result("match setup", ours_s, peer_s, None), **memory, **common}
        search = make(queries)
        assert search(captions) == expected, f"{name} finds something else"
        times = compete(
            lambda: matcher.match(captions, normalised=True), partial(search, captions), rounds=3
        )
        yield {**_result("match", *times, CAPTIONS), **common}
        times = compete(lambda: matcher.match(raw), partial(_normalised, search, raw), rounds=3)
        yield {**_result("match as written", *times, CAPTIONS), **common}


def _normalised(search: Search, captions: Sequence[str]) -> list[list[int]]:
    return search([normalise(caption) for caption in captions])


def _result(name: str, ours_s: float, peer_s: float, items: int | None) -> dict[str, Any]:
    """Seconds, or with `items` their rate."""
    ours, peer = (round(items / s) if items else round(s, 2) for s in (ours_s, peer_s))
    unit = "captions/s" if items else "s"
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "ratio": round(peer_s / ours_s, 2),
        "unit": unit,
    }

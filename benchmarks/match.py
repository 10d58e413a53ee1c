"""Finding 500,000 real queries in 1,000,000 real texts, against two Aho-Corasick libraries.

The peer is pyahocorasick used as MetaCLIP uses it: an automaton of " query ", searched for in
" caption ", a text at a time; the same on ahocorasick_rs is reported beside it. One process, one
thread; all give the same lists.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import match_inputs
from benchmarks.timing import compete, memory_mb, reset_peak, seconds
from dataset_build.match import Matcher
from dataset_build.text import metaclip_spaced, normalise
from pipeline.config import MissingInput

Search = Callable[[Sequence[str]], list[list[int]]]

_SAMPLE = 100_000  # texts for which all results are compared
_ROUNDS = 2


def _automaton(queries: Sequence[str]) -> Any:
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for number, query in enumerate(queries):
        automaton.add_word(f" {query} ", number)
    automaton.make_automaton()
    return automaton


def _search(automaton: Any, texts: Sequence[str]) -> list[list[int]]:
    return [sorted({hit for _, hit in automaton.iter(f" {text} ")}) for text in texts]


def _pyahocorasick(queries: Sequence[str]) -> Search:
    return partial(_search, _automaton(queries))


def _ahocorasick_rs(queries: Sequence[str]) -> Search:
    import ahocorasick_rs

    spaced = [f" {query} " for query in queries]
    find = ahocorasick_rs.AhoCorasick(spaced, store_patterns=False).find_matches_as_indexes

    def search(texts: Sequence[str]) -> list[list[int]]:
        return [
            sorted({hit for hit, _, _ in find(f" {text} ", overlapping=True)}) for text in texts
        ]

    return search


_PEERS: dict[str, Callable[[Sequence[str]], Search]] = {
    "pyahocorasick": _pyahocorasick,
    "ahocorasick_rs": _ahocorasick_rs,
}
_MAKERS: dict[str, Callable[[Sequence[str]], object]] = {
    "ours": partial(Matcher, normalised=True),
    **_PEERS,
}


def measure() -> Iterator[dict[str, Any]]:
    """Set-up; texts a second, normalised before and as written (each side normalises them).

    Then MetaCLIP's own search on the texts that it makes, and what a worker takes that loads what
    another process has set up.
    """
    pa.set_cpu_count(1)
    try:
        inputs = match_inputs.load()
    except MissingInput as error:
        raise SystemExit(f"match: {error}") from None
    queries = [normalise(query) for query in inputs.queries]
    texts = [normalise(text) for text in inputs.texts]
    matcher = Matcher(queries, normalised=True)
    found = matcher.match(texts, normalised=True)
    expected = found[:_SAMPLE].to_pylist()
    sizes = {
        "queries": len(queries),
        "texts": len(texts),
        "characters_per_text": round(sum(map(len, texts)) / len(texts), 1),
        "queries_per_text": round(len(found.values) / len(texts), 1),
        **inputs.sizes,
    }
    ours_s, ours_mb = _apart(_setup, "ours", queries)
    for name, make in _PEERS.items():
        common = {"peer_name": name, **sizes}
        peer_s, peer_mb = _apart(_setup, name, queries)
        memory = {"ours_peak_mb": round(ours_mb), "peer_peak_mb": round(peer_mb)}
        yield {**_took("match setup", ours_s, peer_s), **memory, **common}
        search = make(queries)
        assert search(texts[:_SAMPLE]) == expected, f"{name} finds something else"
        times = compete(
            lambda: matcher.match(texts, normalised=True), partial(search, texts), _ROUNDS
        )
        yield {**_rate("match", *times), **common}
        written = inputs.texts
        times = compete(
            partial(matcher.match, written), partial(_normalised, search, written), _ROUNDS
        )
        yield {**_rate("match as written", *times), **common}
        del search
    yield {**_metaclip(inputs), "peer_name": "pyahocorasick", **sizes}
    yield {**_load(matcher, queries, texts[:_SAMPLE]), "peer_name": "pyahocorasick", **sizes}


def _normalised(search: Search, texts: Sequence[str]) -> list[list[int]]:
    return search([normalise(text) for text in texts])


def _metaclip(inputs: match_inputs.Inputs) -> dict[str, Any]:
    """Queries as they are written, searched for in texts spaced before."""
    spaced = [metaclip_spaced(text) for text in inputs.texts]
    matcher = Matcher(inputs.queries, compat="metaclip")
    search = _pyahocorasick(inputs.queries)
    expected = matcher.match(inputs.texts[:_SAMPLE]).to_pylist()
    assert search(spaced[:_SAMPLE]) == expected, "MetaCLIP's search finds something else"
    times = compete(
        lambda: matcher.match(spaced, normalised=True), partial(search, spaced), _ROUNDS
    )
    per_text = round(sum(map(len, expected)) / len(expected), 1)
    return {**_rate("match metaclip", *times), "metaclip_queries_per_text": per_text}


def _load(matcher: Matcher, queries: list[str], texts: list[str]) -> dict[str, Any]:
    """A worker that maps a saved matcher, and one that unpickles a saved automaton."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        matcher.save(folder)
        saved_mb = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        automaton = folder / "automaton.pickle"
        automaton.write_bytes(pickle.dumps(_automaton(queries)))
        ours_s, ours_mb, shared_mb = _apart(_loaded, "ours", folder, texts)
        peer_s, peer_mb, _ = _apart(_loaded, "pyahocorasick", automaton, texts)
    return {
        **_took("match load", ours_s, peer_s),
        "ours_private_mb": round(ours_mb),
        "ours_shared_mb": round(shared_mb),
        "ours_saved_mb": round(saved_mb),
        "peer_private_mb": round(peer_mb),
    }


def _apart(work: Callable[..., Any], *arguments: object) -> Any:
    """What `work` returns in a process of its own, which does nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _setup(name: str, queries: list[str]) -> tuple[float, float]:
    """(seconds, peak MB) of a set-up."""
    reset_peak()
    before = memory_mb("VmRSS")
    took, made = seconds(lambda: _MAKERS[name](queries))
    assert made is not None
    return took, memory_mb("VmHWM") - before


def _loaded(name: str, path: Path, texts: list[str]) -> tuple[float, float, float]:
    """(seconds to load, private MB, shared MB) of a worker that has searched some texts."""
    search: Callable[[Sequence[str]], object]
    before = memory_mb("RssAnon"), memory_mb("RssFile")
    if name == "ours":
        took, matcher = seconds(lambda: Matcher.load(path))
        search = partial(matcher.match, normalised=True)
    else:
        took, automaton = seconds(lambda: pickle.loads(path.read_bytes()))
        search = partial(_search, automaton)
    for start in range(0, len(texts), 10_000):
        search(texts[start : start + 10_000])
    return took, memory_mb("RssAnon") - before[0], memory_mb("RssFile") - before[1]


def _took(name: str, ours_s: float, peer_s: float) -> dict[str, Any]:
    ours, peer = round(ours_s, 3), round(peer_s, 3)
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "ratio": round(peer_s / ours_s, 2),
        "unit": "s",
    }


def _rate(name: str, ours_s: float, peer_s: float) -> dict[str, Any]:
    ours, peer = (round(match_inputs.TEXTS / s) for s in (ours_s, peer_s))
    ratio = round(peer_s / ours_s, 2)
    return {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": "texts/s"}

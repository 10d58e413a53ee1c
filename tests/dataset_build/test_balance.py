"""`balance`: exact caps, whatever the partition, the order, the seed or the hash."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_build import selection, thresholds
from dataset_build.balance import BalanceSettings, Mode, choose
from dataset_build.hashing import U64, mix64
from dataset_build.thresholds import (
    NO_LIMIT,
    U32,
    Limit,
    SavedSketch,
    Thresholds,
    by_ranges,
    entries,
    likely_bound,
    merge,
    priority,
    smallest,
)

QUERIES = 12


def make_pairs(number: int, seed: int = 0) -> tuple[list[bytes], list[list[int]]]:
    """Uids, and queries of which the first are frequent and the last occurs nowhere."""
    rng = np.random.default_rng(seed)
    chance = 0.9 / np.arange(1, QUERIES + 1)
    chance[-1] = 0
    hits = rng.random((number, QUERIES)) < chance
    return [rng.bytes(16) for _ in range(number)], [np.flatnonzero(h).tolist() for h in hits]


def tied(high: U64, low: U64, query_id: U32) -> U64:
    """Only three different priorities, the largest possible one among them."""
    return (low % np.uint64(3)) * np.uint64((2**64 - 1) // 2)


def domain_of(uid: bytes) -> str:
    """Three domains, one of them with half of all pairs."""
    return ("flood.example", "flood.example", "a.example", "b.example")[uid[1] % 4]


def by_definition(
    uids: list[bytes],
    query_ids: list[list[int]],
    cap: int,
    mode: Mode,
    hash_of: Any,
    per_domain: int | None = None,
) -> list[list[int]]:
    counts = np.bincount([q for qs in query_ids for q in qs], minlength=QUERIES)
    if mode == "attributed":
        query_ids = [sorted(qs, key=lambda q: (counts[q], q))[:1] for qs in query_ids]
    selected: list[list[int]] = [[] for _ in uids]
    for query in range(QUERIES):
        rows = [row for row, qs in enumerate(query_ids) if query in qs]

        def order(row: int, query: int = query) -> tuple[int, bytes]:
            high, low = (
                np.array([int.from_bytes(half, "big")], np.uint64)
                for half in (uids[row][:8], uids[row][8:])
            )
            return int(hash_of(high, low, np.array([query], np.uint32))[0]), uids[row]

        if mode == "metaclip":
            chosen = [row for row in rows if order(row)[0] / 2**64 < cap / len(rows)]
        else:
            chosen, served = [], Counter[str]()
            for row in sorted(rows, key=order):
                domain = domain_of(uids[row])
                if per_domain is None or served[domain] < per_domain:
                    served[domain] += 1
                    chosen.append(row)
        for row in chosen if mode == "metaclip" else chosen[:cap]:
            selected[row].append(query)
    return selected


def arrow(uids: list[bytes], query_ids: list[list[int]]) -> tuple[pa.Array, pa.Array]:
    return pa.array(uids, pa.binary(16)), pa.array(query_ids, pa.list_(pa.uint32()))


def domains_of(uids: list[bytes]) -> pa.DictionaryArray:
    return pa.array([domain_of(uid) for uid in uids]).dictionary_encode()


@pytest.mark.parametrize("mode", ["quota", "attributed", "metaclip"])
@pytest.mark.parametrize("cap", [1, 5, 50, 1000])
@pytest.mark.parametrize("hash_of", [None, tied])
def test_choose_is_exact_even_among_ties(mode: Mode, cap: int, hash_of: Any) -> None:
    uids, query_ids = make_pairs(300)
    config = BalanceSettings(cap=cap, mode=mode, seed=3)
    found = choose(*arrow(uids, query_ids), QUERIES, config, hash_of).to_pylist()
    assert found == by_definition(uids, query_ids, cap, mode, hash_of or priority(3))


@pytest.mark.parametrize("mode", ["quota", "attributed"])
@pytest.mark.parametrize(("cap", "share"), [(1, 0.5), (5, 0.2), (50, 0.1), (50, 0.3), (1000, 0.01)])
@pytest.mark.parametrize("hash_of", [None, tied])
def test_no_domain_takes_more_than_its_share(
    mode: Mode, cap: int, share: float, hash_of: Any
) -> None:
    uids, query_ids = make_pairs(300)
    config = BalanceSettings(cap=cap, mode=mode, seed=3, domain_share=share)
    per_domain = max(1, int(cap * share))
    found = choose(*arrow(uids, query_ids), QUERIES, config, hash_of, domains_of(uids)).to_pylist()
    expected = by_definition(uids, query_ids, cap, mode, hash_of or priority(3), per_domain)
    assert found == expected
    taken = Counter((q, domain_of(u)) for u, qs in zip(uids, found, strict=True) for q in qs)
    assert max(taken.values()) == per_domain


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_larger_cap_only_adds(data: st.DataObject) -> None:
    uids, query_ids = make_pairs(data.draw(st.integers(0, 80)), data.draw(st.integers(0, 9)))
    small, large = sorted(data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40))))
    columns = arrow(uids, query_ids)
    few = choose(*columns, QUERIES, BalanceSettings(cap=small)).to_pylist()
    more = choose(*columns, QUERIES, BalanceSettings(cap=large)).to_pylist()
    assert all(set(a) <= set(b) for a, b in zip(few, more, strict=True))


some_entries = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 2), st.integers(0, 2)),
    max_size=40,
)


def entry_array(rows: list[tuple[int, ...]], limit: Limit) -> Any:
    """A domain follows from the uid, as it does for pairs."""
    if limit.per_domain is not None:
        rows = [(*row, (row[2] + row[3]) % 2) for row in rows]
    return np.array(rows, limit.entry)


@settings(max_examples=300, deadline=None)
@given(
    some_entries,
    some_entries,
    some_entries,
    st.builds(Limit, st.integers(1, 6), st.none() | st.integers(1, 4)),
)
def test_sketches_merge(a: Any, b: Any, c: Any, limit: Limit) -> None:
    """Small numbers, so repeats, ties and every bit of the key's shift occur."""
    a, b, c = (entry_array(rows, limit) for rows in (a, b, c))
    whole = smallest(np.concatenate([a, b, c]), limit)
    taken: Counter[Any] = Counter()
    kept = []
    for entry in sorted({tuple(e) for e in np.concatenate([a, b, c]).tolist()}):
        query, domain = entry[0], entry[4] if limit.per_domain is not None else None
        if limit.per_domain is not None:
            if taken[query, domain] == limit.per_domain:
                continue
            taken[query, domain] += 1
        if taken[query] < limit.pairs:
            taken[query] += 1
            kept.append(entry)
    assert whole.tolist() == kept
    one, two, three = (smallest(part, limit) for part in (a, b, c))
    assert merge([one, two, three], limit).tolist() == kept
    assert merge([merge([three, one], limit), two], limit).tolist() == kept
    assert merge([three, merge([two, one], limit)], limit).tolist() == kept


def test_keys_that_share_their_upper_bits_are_ordered_by_the_lower() -> None:
    h = np.array([5, 3, 4, 2**63], np.uint64)
    found = entries(h, h, np.array([1000, 1000, 1000, 1000], np.uint32), h)
    assert smallest(found, Limit(2))["h"].tolist() == [3, 4]


def test_thresholds_say_no_limit_where_the_count_is_within_the_cap() -> None:
    h = np.array([9, 1, 5, 2**64 - 1], np.uint64)
    query = np.array([0, 0, 0, 2], np.uint32)
    sketch = smallest(entries(h, h, query, h), Limit(2))
    limits = Thresholds.of(sketch, np.array([3, 0, 1], np.uint64), Limit(2))
    assert limits.tau.tolist() == [5, NO_LIMIT, NO_LIMIT]
    assert limits.admit(h, h, query, h).tolist() == [False, True, True, True]


def test_an_incomplete_sketch_is_refused() -> None:
    h = np.array([1], np.uint64)
    sketch = entries(h, h, np.array([0], np.uint32), h)
    with pytest.raises(AssertionError, match="lacks"):
        Thresholds.of(sketch, np.array([3], np.uint64), Limit(2))


def test_likely_bound_holds_enough_and_little_more() -> None:
    cap, count = 400, 100_000
    bound = likely_bound(np.array([count, cap + 1, cap, 0], np.uint64), Limit(cap))
    assert bound[1:].tolist() == [NO_LIMIT, 0, 0]
    below = [
        int((mix64(np.arange(s * count, (s + 1) * count, dtype=np.uint64)) <= bound[0]).sum())
        for s in range(20)
    ]
    assert cap <= min(below)
    assert max(below) < 1.9 * cap


def test_priorities_are_uniform_and_independent() -> None:
    low = np.arange(40_000, dtype=np.uint64)
    columns = [
        priority(seed)(low, low, np.full(low.size, query, np.uint32)) / 2**64
        for seed, query in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]
    ]
    for column in columns:
        assert abs(column.mean() - 0.5) < 0.01
        assert np.histogram(column, 10, (0, 1))[0].min() > 3_700
    correlation = np.corrcoef(columns)
    assert np.abs(correlation - np.eye(5)).max() < 0.025


def test_probability_is_that_of_the_seeds() -> None:
    uids, query_ids = make_pairs(200)
    columns = arrow(uids, query_ids)
    cap, trials = 20, 400
    row, query = selection.matches(columns[1])
    counts = selection.count(query, QUERIES)
    expected = selection.probability(row, np.minimum(1, cap / counts[query]), len(uids))
    chosen = np.zeros(len(uids))
    for seed in range(trials):
        found = choose(*columns, QUERIES, BalanceSettings(cap=cap, seed=seed))
        chosen += np.array([len(f) > 0 for f in found.to_pylist()])
    assert [p for p, q in zip(expected, query_ids, strict=True) if not q] == [0] * query_ids.count(
        []
    )
    # Five standard deviations of a mean of 400 trials are at most 0.125.
    assert np.abs(chosen / trials - expected).max() < 0.125
    assert abs((chosen / trials - expected).mean()) < 0.01


@pytest.mark.parametrize(("piece", "most"), [(1, 40), (7, 1), (64, 100), (1000, 1000)])
def test_saved_sketches_are_read_by_ranges_of_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, most: int
) -> None:
    monkeypatch.setattr(thresholds, "_PIECE", piece)
    rng = np.random.default_rng(piece)
    sketches = []
    for number, size in enumerate((200, 0, 31)):
        query = np.sort(rng.integers(2, QUERIES - 2, size)).astype(np.uint32)
        high, low, h = (rng.integers(0, 2**63, size).astype(np.uint64) for _ in range(3))
        sketches.append(entries(high, low, query, h))
        np.save(tmp_path / f"{number}.npy", sketches[-1])
    saved = [SavedSketch(tmp_path / f"{number}.npy") for number in range(3)]
    found, edges = [[np.zeros(0, s.dtype)] for s in sketches], [0]
    for first, stop, parts in by_ranges(saved, QUERIES, most):
        assert first == edges[-1] < stop
        edges.append(stop)
        assert sum(part.size for part in parts) <= most or stop == first + 1
        for place, part in zip(found, parts, strict=True):
            assert ((part["query_id"] >= first) & (part["query_id"] < stop)).all()
            place.append(part)
    assert edges[-1] == QUERIES
    for sketch, parts in zip(sketches, found, strict=True):
        assert np.concatenate(parts).tobytes() == sketch.tobytes()

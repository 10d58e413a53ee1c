"""`balance`: exact caps, whatever the partition, the order, the seed or the hash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_build import balance, records, selection, thresholds
from dataset_build.balance import BalanceSettings, Mode, choose
from dataset_build.hashing import U64, mix64
from dataset_build.thresholds import (
    ENTRY,
    NO_LIMIT,
    U32,
    Thresholds,
    entries,
    likely_bound,
    merge,
    priority,
    smallest,
)
from pipeline.config import Settings
from pipeline.manifest import Manifest
from pipeline.stage import Run, Stage

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


def by_definition(
    uids: list[bytes], query_ids: list[list[int]], cap: int, mode: Mode, hash_of: Any
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

        for row in sorted(rows, key=order)[:cap]:
            selected[row].append(query)
    return selected


def arrow(uids: list[bytes], query_ids: list[list[int]]) -> tuple[pa.Array, pa.Array]:
    return pa.array(uids, pa.binary(16)), pa.array(query_ids, pa.list_(pa.uint32()))


@pytest.mark.parametrize("mode", ["quota", "attributed"])
@pytest.mark.parametrize("cap", [1, 5, 50, 1000])
@pytest.mark.parametrize("hash_of", [None, tied])
def test_choose_is_exact_even_among_ties(mode: Mode, cap: int, hash_of: Any) -> None:
    uids, query_ids = make_pairs(300)
    config = BalanceSettings(cap=cap, mode=mode, seed=3)
    found = choose(*arrow(uids, query_ids), QUERIES, config, hash_of).to_pylist()
    assert found == by_definition(uids, query_ids, cap, mode, hash_of or priority(3))


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
).map(lambda rows: np.array(rows, ENTRY))


@settings(max_examples=200, deadline=None)
@given(some_entries, some_entries, some_entries, st.integers(1, 6))
def test_sketches_merge(a: Any, b: Any, c: Any, cap: int) -> None:
    """Small numbers, so repeats, ties and every bit of the key's shift occur."""
    whole = smallest(np.concatenate([a, b, c]), cap)
    expected = sorted({tuple(e) for e in np.concatenate([a, b, c]).tolist()})
    taken: dict[int, int] = {}
    kept = []
    for entry in expected:
        taken[entry[0]] = taken.get(entry[0], 0) + 1
        if taken[entry[0]] <= cap:
            kept.append(entry)
    assert whole.tolist() == kept
    one, two, three = (smallest(part, cap) for part in (a, b, c))
    assert merge([one, two, three], cap).tolist() == kept
    assert merge([merge([three, one], cap), two], cap).tolist() == kept
    assert merge([three, merge([two, one], cap)], cap).tolist() == kept


def test_keys_that_share_their_upper_bits_are_ordered_by_the_lower() -> None:
    h = np.array([5, 3, 4, 2**63], np.uint64)
    found = entries(h, h, np.array([1000, 1000, 1000, 1000], np.uint32), h)
    assert smallest(found, 2)["h"].tolist() == [3, 4]


def test_thresholds_say_no_limit_where_the_count_is_within_the_cap() -> None:
    h = np.array([9, 1, 5, 2**64 - 1], np.uint64)
    query = np.array([0, 0, 0, 2], np.uint32)
    sketch = smallest(entries(h, h, query, h), 2)
    limits = Thresholds.of(sketch, np.array([3, 0, 1], np.uint64), 2)
    assert limits.tau.tolist() == [5, NO_LIMIT, NO_LIMIT]
    assert limits.admit(h, h, query, h).tolist() == [False, True, True, True]


def test_an_incomplete_sketch_is_refused() -> None:
    h = np.array([1], np.uint64)
    sketch = entries(h, h, np.array([0], np.uint32), h)
    with pytest.raises(AssertionError, match="lacks"):
        Thresholds.of(sketch, np.array([3], np.uint64), 2)


def test_likely_bound_holds_enough_and_little_more() -> None:
    cap, count = 400, 100_000
    bound = likely_bound(np.array([count, cap + 1, cap, 0], np.uint64), cap)
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
    expected = selection.probability(row, query, counts, cap, len(uids))
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


class Config(Settings):
    balance: BalanceSettings = BalanceSettings()


def run_balance(
    folder: Path,
    pairs: tuple[list[bytes], list[list[int]]],
    files: int,
    config: BalanceSettings,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish: Callable[..., Manifest],
) -> tuple[Run, pa.Table, list[Manifest]]:
    run = Run(folder, Config(balance=config))

    def queries(folder: Path) -> None:
        pq.write_table(pa.table({"norm": ["x"] * QUERIES}), folder / "queries.parquet")

    def dedup(folder: Path) -> None:
        for number in range(files):
            part: list[dict[str, Any]] = [
                {"uid": u, "query_ids": q, "url": u.hex(), "occurrences": 1}
                for u, q in zip(pairs[0][number::files], pairs[1][number::files], strict=True)
            ]
            part.sort(key=lambda row: row["uid"])
            table = pa.Table.from_pylist(part, schema=records.PAIRS)
            pq.write_table(table, folder / f"pairs-{number:05d}.parquet")

    publish(run, "queries", queries)
    publish(run, "dedup", dedup)
    manifests = run_stage(run, balance.STAGE)
    names = run.find("balance:selected-*.parquet")
    parts = [pq.read_table(run.path(name)) for name in names]
    for part in parts:
        assert part.schema.equals(records.SELECTED)
        assert part["uid"].to_pylist() == sorted(part["uid"].to_pylist())
    return run, pa.concat_tables(parts).sort_by("uid"), manifests


def array(run: Run, name: str) -> npt.NDArray[np.uint64]:
    values: npt.NDArray[np.uint64] = np.load(run.path(f"balance:{name}.npy"))
    return values


@pytest.mark.parametrize(("mode", "partitions"), [("quota", (1, 7, 64)), ("attributed", (1, 7))])
def test_stage_gives_the_same_whatever_the_partition(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
    mode: Mode,
    partitions: tuple[int, ...],
) -> None:
    uids, query_ids = make_pairs(500)
    config = BalanceSettings(cap=40, seed=2, mode=mode)
    expected = by_definition(uids, query_ids, 40, mode, priority(2))
    before = None
    for files in partitions:
        order = np.random.default_rng(files).permutation(500)
        pairs = [uids[i] for i in order], [query_ids[i] for i in order]
        folder = tmp_path / str(files)
        run, selected, manifests = run_balance(
            folder, pairs, files, config, run_stage, publish_files
        )
        found = dict(
            zip(selected["uid"].to_pylist(), selected["selected_by"].to_pylist(), strict=True)
        )
        assert found == {u: s for u, s in zip(uids, expected, strict=True) if s}
        outputs = [array(run, n).tobytes() for n in ("tau", "last", "counts", "charged")]
        coverage = pq.read_table(run.path("balance:coverage.parquet"))
        now = (selected, outputs, coverage)
        if before is not None:
            assert now[0].equals(before[0])
            assert now[1] == before[1]
            assert now[2].equals(before[2])
        before = now
        stats = sum((m.stats for m in manifests), start=type(manifests[0].stats)())
        assert (stats.rows_in, stats.rows_out) == (500, len(found))
        assert stats.dropped["unmatched"] == query_ids.count([])
        assert stats.counts["zero_hit_queries"] == 1
        assert "rescanned_queries" not in stats.counts
    counts = np.bincount([q for qs in query_ids for q in qs], minlength=QUERIES)
    assert array(run, "counts").tolist() == counts.tolist()
    charged = array(run, "charged")
    assert coverage["selected"].to_pylist() == np.minimum(charged, 40).tolist()
    assert stats.counts["capped_queries"] == (charged > 40).sum() > 0
    assert ((array(run, "tau") == NO_LIMIT) == (charged <= 40)).all()
    if mode == "quota":
        assert charged.tolist() == counts.tolist()
        assert max(coverage["in_union"].to_pylist()) > 40
    else:
        assert charged.sum() == 500 - query_ids.count([])


def test_stage_recovers_from_sketches_that_hold_too_little(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = make_pairs(300)
    config = BalanceSettings(cap=30)
    _, expected, _ = run_balance(tmp_path / "a", pairs, 3, config, run_stage, publish_files)
    monkeypatch.setattr(balance, "likely_bound", lambda counts, cap: counts * np.uint64(2**50))
    monkeypatch.setattr(balance, "_RANGE_ENTRIES", 50)
    _, selected, manifests = run_balance(tmp_path / "b", pairs, 3, config, run_stage, publish_files)
    assert sum(m.stats.counts["rescanned_queries"] for m in manifests) > 3
    assert selected.equals(expected)


def test_stage_reports_a_count_that_is_not_exact(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def generous(self: Thresholds, high: U64, low: U64, query_id: U32, h: U64) -> Any:
        return h <= self.tau[query_id] + np.uint64(2**58)

    monkeypatch.setattr(thresholds.Thresholds, "admit", generous)
    config = BalanceSettings(cap=30)
    with pytest.raises(AssertionError, match="did not select min"):
        run_balance(tmp_path, make_pairs(300), 2, config, run_stage, publish_files)

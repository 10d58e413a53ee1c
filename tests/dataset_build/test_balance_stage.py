"""The stage `balance`: its phases give what `choose` gives, and go on from what they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_build import balance, records, selection, thresholds
from dataset_build.balance import BalanceSettings, choose, phases
from dataset_build.dedup import DedupSettings
from dataset_build.hashing import U64
from dataset_build.match import MatchSettings
from dataset_build.thresholds import NO_LIMIT, Limit, Thresholds, likely_bound
from pipeline.config import Settings
from pipeline.manifest import Manifest
from pipeline.stage import Run, Stage
from pipeline.stats import Stats
from tests.dataset_build.inline import InlineExecutor

QUERIES = 12
Pairs = tuple[list[bytes], list[list[int]]]


def make_pairs(number: int, seed: int = 0) -> Pairs:
    """Uids, and queries of which the first are frequent and the last occurs nowhere."""
    rng = np.random.default_rng(seed)
    chance = 0.9 / np.arange(1, QUERIES + 1)
    chance[-1] = 0
    hits = rng.random((number, QUERIES)) < chance
    return [rng.bytes(16) for _ in range(number)], [np.flatnonzero(h).tolist() for h in hits]


def domain_of(uid: bytes) -> str:
    """Three domains, one of them with half of all pairs."""
    return ("flood.example", "flood.example", "a.example", "b.example")[uid[1] % 4]


class Config(Settings):
    match: MatchSettings = MatchSettings()
    dedup: DedupSettings = DedupSettings(buckets_per_task=1)
    balance: BalanceSettings = BalanceSettings()


Balance = Callable[..., tuple[Run, pa.Table, list[Manifest]]]


@pytest.fixture
def run_balance(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
) -> Balance:
    """Balance pairs in 2ⁿ files, a range of uids each; the run, what is selected, manifests."""

    def go(name: str, pairs: Pairs, files: int, **options: Any) -> Any:
        config = Config(match=MatchSettings(buckets=files), balance=BalanceSettings(**options))
        run = Run(tmp_path / name, config)

        def dedup(folder: Path) -> None:
            for number in range(files):
                part: list[dict[str, Any]] = [
                    {
                        "uid": uid,
                        "query_ids": ids,
                        "occurrences": 2,
                        "domain": domain_of(uid),
                        "snapshot": "A",
                    }
                    for uid, ids in sorted(zip(*pairs, strict=True))
                    if uid[0] * files >> 8 == number
                ]
                table = pa.Table.from_pylist(part, schema=records.PAIRS)
                pq.write_table(table, folder / f"pairs-{number:05d}.parquet")
                count = selection.count(selection.matches(table["query_ids"])[1], QUERIES)
                np.save(folder / f"count-{number:05d}.npy", count)
                np.save(folder / f"raw-{number:05d}.npy", 2 * count)

        publish_files(run, "dedup", dedup)
        manifests = run_stage(run, balance.STAGE)
        run = Run(run.folder, config)
        parts = [pq.read_table(run.path(r)) for r in run.find("balance:selected-*.parquet")]
        for part in parts:
            assert part.schema.equals(records.SELECTED)
        selected = pa.concat_tables(parts)
        assert selected["uid"].to_pylist() == sorted(selected["uid"].to_pylist())
        return run, selected.combine_chunks(), manifests

    return go


def array(run: Run, name: str) -> npt.NDArray[np.uint64]:
    values: npt.NDArray[np.uint64] = np.load(run.path(f"balance:{name}.npy"))
    return values


def by_uid(selected: pa.Table, column: str = "selected_by") -> dict[bytes, Any]:
    return dict(zip(selected["uid"].to_pylist(), selected[column].to_pylist(), strict=True))


def chosen(pairs: Pairs, **options: Any) -> dict[bytes, list[int]]:
    uids, query_ids = pairs
    domain = pa.array([domain_of(uid) for uid in uids]).dictionary_encode()
    columns = pa.array(uids, pa.binary(16)), pa.array(query_ids, pa.list_(pa.uint32()))
    found = choose(*columns, QUERIES, BalanceSettings(**options), domain=domain).to_pylist()
    return {uid: ids for uid, ids in zip(uids, found, strict=True) if ids}


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "quota"},
        {"mode": "quota", "spare": 0.3},
        {"mode": "quota", "max_cap": 90},
        {"mode": "quota", "domain_share": 0.2},
        {"mode": "attributed"},
        {"mode": "attributed", "domain_share": 0.2},
        {"mode": "metaclip"},
    ],
)
def test_stage_gives_the_same_whatever_the_partition(
    run_balance: Balance, options: dict[str, Any]
) -> None:
    pairs = make_pairs(500)
    options = {"cap": 40, "seed": 2, **options}
    expected = chosen(pairs, **options)
    before: Any = None
    for files in (1, 8, 64):
        order = np.random.default_rng(files).permutation(500)
        shuffled = [pairs[0][i] for i in order], [pairs[1][i] for i in order]
        run, selected, manifests = run_balance(str(files), shuffled, files, **options)
        assert by_uid(selected) == expected
        outputs = [array(run, n) for n in ("tau", "last", "full", "counts", "charged", "due")]
        tables = [pq.read_table(run.path(f"balance:{n}.parquet")) for n in ("coverage", "domains")]
        now = [selected, *tables, *[o.tobytes() for o in outputs]]
        if before is not None:
            assert all(a == b for a, b in zip(now, before, strict=True))
        before = now
        stats = sum((m.stats for m in manifests), Stats())
        assert (stats.rows_in, stats.rows_out) == (500, len(expected))
        assert stats.dropped["unmatched"] == pairs[1].count([])
        assert stats.counts["zero_hit_queries"] == 1
        if "domain_share" not in options:
            assert "rescanned_queries" not in stats.counts
    counts = np.bincount([q for qs in pairs[1] for q in qs], minlength=QUERIES)
    assert array(run, "counts").tolist() == counts.tolist()
    coverage = tables[0]
    assert coverage["raw"].to_pylist() == (2 * counts).tolist()
    charged = array(run, "charged")
    if options["mode"] == "attributed":
        assert charged.sum() == 500 - pairs[1].count([])
    else:
        assert charged.tolist() == counts.tolist()
        assert max(coverage["in_union"].to_pylist()) > 40
    taken = np.bincount([q for ids in expected.values() for q in ids], minlength=QUERIES)
    assert coverage["selected"].to_pylist() == taken.tolist()
    if "domain_share" not in options and options["mode"] != "metaclip":
        limit = 52 if "spare" in options else 40
        assert taken.tolist() == np.minimum(charged, limit).tolist()
        assert stats.counts["capped_queries"] == (charged > limit).sum() > 0
        assert ((array(run, "tau") == NO_LIMIT) == (charged <= limit)).all()
    served = Counter((q, domain_of(uid)) for uid, ids in expected.items() for q in ids)
    domains = {(r["query_id"], r["domain"]): r["selected"] for r in tables[1].to_pylist()}
    assert domains == served


def test_probability_goes_along(run_balance: Balance) -> None:
    pairs = make_pairs(500)
    _, selected, _ = run_balance("run", pairs, 4, cap=40)
    counts = np.bincount([q for qs in pairs[1] for q in qs], minlength=QUERIES)
    found = by_uid(selected, "probability")
    for uid, ids in zip(*pairs, strict=True):
        if uid in found:
            expected = 1 - np.prod(1 - np.minimum(1, 40 / counts[ids]))
            assert found[uid] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("share", [None, 0.2])
def test_stage_recovers_from_sketches_that_hold_too_little(
    run_balance: Balance, monkeypatch: pytest.MonkeyPatch, share: float | None
) -> None:
    pairs = make_pairs(300)
    options: dict[str, Any] = {"cap": 30, "domain_share": share}
    _, expected, _ = run_balance("a", pairs, 4, **options)

    def too_low(counts: U64, limit: Limit) -> U64:
        return np.where(
            counts > limit.pairs, counts * np.uint64(2**50), likely_bound(counts, limit)
        )

    monkeypatch.setattr(phases, "likely_bound", too_low)
    monkeypatch.setattr(phases, "_RANGE_ENTRIES", 50)
    _, selected, manifests = run_balance("b", pairs, 4, **options)
    assert sum(m.stats.counts["rescanned_queries"] for m in manifests) > 3
    assert selected.equals(expected)


@pytest.mark.parametrize(
    "options", [{}, {"max_cap": 90}, {"mode": "attributed"}, {"domain_share": 0.2}]
)
def test_sketches_of_pieces_make_the_same_thresholds(
    run_balance: Balance, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    pairs = make_pairs(500)
    _, expected, _ = run_balance("a", pairs, 2, cap=40, **options)
    monkeypatch.setattr(phases, "_RANGE_ENTRIES", 60)
    monkeypatch.setattr(phases, "_BATCH_ROWS", 20)
    monkeypatch.setattr(phases, "_SERVED_TABLES", 2)
    run, selected, manifests = run_balance("b", pairs, 2, cap=40, **options)
    assert len(run.find("balance:sketch-*.npy")) > 4
    assert selected.equals(expected)
    entries = sum(m.stats.counts["sketch_entries"] for m in manifests)
    assert entries < sum(map(len, pairs[1])), "a full piece must lower the bound of the next"


def test_stage_reports_a_count_that_is_not_exact(
    run_balance: Balance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generous(self: Thresholds, high: U64, low: U64, query: Any, h: U64, domain: Any) -> Any:
        return h <= self.tau[query] + np.uint64(2**58)

    monkeypatch.setattr(thresholds.Thresholds, "admit", generous)
    with pytest.raises(AssertionError, match="did not select min"):
        run_balance("run", make_pairs(300), 2, cap=30)


def test_another_cap_reads_the_sketches_alone_and_lists_what_changed(
    run_balance: Balance, inline: InlineExecutor
) -> None:
    """Under `max_cap` only thresholds, selection and check run again; the delta adds up."""
    pairs = make_pairs(500)
    run, selected, _ = run_balance("run", pairs, 4, cap=20, max_cap=60)
    inline.advance(run, [balance.STAGE])
    uids = [by_uid(selected)]
    for cap in (50, 30):
        config = Config(
            match=MatchSettings(buckets=4), balance=BalanceSettings(cap=cap, max_cap=60)
        )
        run = Run(run.folder, config)
        inline.ran.clear()
        inline.advance(run, [balance.STAGE])
        assert Counter(task.params["phase"] for task in inline.ran) == {
            "thresholds": 1,
            "select": 4,
            "check": 1,
        }
        run = Run(run.folder, config)
        read = [pq.read_table(run.path(r)) for r in run.find("balance:selected-*.parquet")]
        uids.append(by_uid(pa.concat_tables(read)))
        assert uids[-1] == chosen(pairs, cap=cap)
        delta = pa.concat_tables(
            [pq.read_table(run.path(r)) for r in run.find("balance:delta-*.parquet")]
        )
        changes = by_uid(delta, "came")
        assert {uid for uid, came in changes.items() if came} == uids[-1].keys() - uids[-2].keys()
        assert {u for u, came in changes.items() if not came} == uids[-2].keys() - uids[-1].keys()
        counts = sum((m.stats for m in run.manifests("balance")), Stats()).counts
        assert (counts["came"], counts["went"]) == (
            sum(changes.values()),
            len(changes) - sum(changes.values()),
        )

"""At most `cap` pairs a query, exactly and reproducibly.

Every query selects its `cap` pairs of smallest priority h = hash(uid, query, seed), or all that it
has; the dataset is the union. Six phases: count per file, add up, sketch per file, thresholds,
select per file, check. No result depends on the files' number or order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from dataset_build import records, selection
from dataset_build.hashing import U64, halves
from dataset_build.thresholds import (
    ENTRY,
    NO_LIMIT,
    U32,
    Bool,
    Entries,
    Hash,
    Thresholds,
    by_ranges,
    entries,
    likely_bound,
    merge,
    missing,
    priority,
    smallest,
    wanted,
)
from pipeline.config import Settings
from pipeline.manifest import Stats
from pipeline.stage import Attempt, Run, Stage, Task

Mode = Literal["quota", "attributed"]

_BATCH_ROWS = 65_536
_RANGE_ENTRIES = 8_000_000  # of 28 bytes; with what sorting needs half a gigabyte
_QUERIES = "queries:queries.parquet"
_PAIRS = "dedup:pairs-*.parquet"
_COUNTS = "balance:counts.npy"
_CHARGED = "balance:charged.npy"


class BalanceSettings(Settings):
    """How many pairs a query may bring into the dataset."""

    cap: int = Field(default=20_000, ge=1)
    """Pairs that one query selects at most. CLIP took 20,000."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Another seed selects other pairs, equally good."""
    mode: Mode = "quota"
    """`quota`: every query that occurs in a pair may select it. A pair is in the dataset if any
    query selects it, so frequent queries occur in more pairs than the cap (those that rarer queries
    selected), as in CLIP. `attributed`: a pair is charged to the rarest of its queries, and only
    that one may select it."""


def choose(
    uids: pa.Array,
    query_ids: pa.Array,
    queries: int,
    settings: BalanceSettings,
    hash_of: Hash | None = None,
) -> pa.Array:
    """`selected_by` of pairs that fit into memory: `list<uint32>`, empty where none selects.

    `query_ids`: `list<uint32>` below `queries`. The same as the stage gives for these pairs.
    """
    high, low = halves(uids)
    row, query = selection.matches(query_ids)
    counts = selection.count(query, queries)
    if settings.mode == "attributed":
        row, query = selection.rarest(row, query, counts)
        counts = selection.count(query, queries)
    high, low = high[row], low[row]
    h = (hash_of or priority(settings.seed))(high, low, query)

    def sketch_of(within: Bool) -> Entries:
        at = np.flatnonzero(within)
        return smallest(entries(high[at], low[at], query[at], h[at]), settings.cap)

    sketch = sketch_of(h <= likely_bound(counts, settings.cap)[query])
    if (lacking := missing(sketch, counts, settings.cap)).size:
        sketch = merge([sketch, sketch_of(np.isin(query, lacking))], settings.cap)
    chosen = Thresholds.of(sketch, counts, settings.cap).admit(high, low, query, h)
    return selection.lists(row[chosen], query[chosen], len(uids))


# The phases' plans. A phase sees the plan of those before it, and its tasks count on from there.


def plan(run: Run) -> list[Task]:
    """Count: how many pairs each query occurs in, file by file."""
    return _per_file(run, "count", [_QUERIES], 0)


def _plan_total(run: Run) -> list[Task]:
    counted = run.find("balance:count-*.npy")
    return [Task("balance", len(run.plan("balance")), tuple(counted), {"phase": "total"})]


def _plan_sketch(run: Run) -> list[Task]:
    return _per_file(run, "sketch", [_COUNTS], len(run.plan("balance")))


def _plan_thresholds(run: Run) -> list[Task]:
    # The pairs are there for the queries of which the sketches lack entries: hardly ever read.
    reads = [_COUNTS, *run.find("balance:sketch-*.npy"), *run.find(_PAIRS)]
    if run.settings("balance").mode == "attributed":
        reads += run.find("balance:charged-*.npy")
    return [Task("balance", len(run.plan("balance")), tuple(reads), {"phase": "thresholds"})]


def _plan_select(run: Run) -> list[Task]:
    reads = [_CHARGED, "balance:tau.npy", "balance:last.npy", _COUNTS]
    return _per_file(run, "select", reads, len(run.plan("balance")))


def _plan_check(run: Run) -> list[Task]:
    reads = (_COUNTS, _CHARGED, *run.find("balance:selected-*.parquet"))
    return [Task("balance", len(run.plan("balance")), reads, {"phase": "check"})]


def _per_file(run: Run, phase: str, reads: list[str], first: int) -> list[Task]:
    return [
        Task("balance", first + part, (pairs, *reads), {"phase": phase, "part": part})
        for part, pairs in enumerate(run.find(_PAIRS))
    ]


def work(attempt: Attempt) -> Stats:
    """Do one task of the phase that its parameters name."""
    phases: dict[str, Callable[[Attempt], Stats]] = {
        "count": _work_count,
        "total": _work_total,
        "sketch": _work_sketch,
        "thresholds": _work_thresholds,
        "select": _work_select,
        "check": _work_check,
    }
    return phases[attempt.task.params["phase"]](attempt)


def _work_count(attempt: Attempt) -> Stats:
    pairs, queries_path = attempt.inputs()
    queries = pq.read_metadata(queries_path).num_rows
    counts = np.zeros(queries, np.uint64)
    for batch in _read(attempt, pairs, ["query_ids"]):
        counts += selection.count(selection.matches(batch["query_ids"])[1], queries)
    np.save(attempt.folder / f"count-{attempt.task.params['part']:05d}.npy", counts)
    return Stats()


def _work_total(attempt: Attempt) -> Stats:
    np.save(attempt.folder / "counts.npy", _sum(attempt.inputs()))
    return Stats()


def _sum(paths: Iterable[Path]) -> U64:
    first, *others = paths
    total: U64 = np.load(first)
    for path in others:
        total += np.load(path)
    return total


def _work_sketch(attempt: Attempt) -> Stats:
    settings: BalanceSettings = attempt.settings
    pairs, counts_path = attempt.inputs()
    part = attempt.task.params["part"]
    counts: U64 = np.load(counts_path)
    bound = likely_bound(counts, settings.cap)
    if settings.mode == "attributed":
        charged = np.zeros_like(counts)
        for batch in _read(attempt, pairs, ["query_ids"]):
            charged += selection.count(_matches(batch, settings.mode, counts)[1], counts.size)
        np.save(attempt.folder / f"charged-{part:05d}.npy", charged)
        # How many pairs are charged to a query in all files is not known yet: keep `cap` of each.
        bound = np.full_like(bound, NO_LIMIT)
    sketch = _sketch(attempt, pairs, counts, bound)
    np.save(attempt.folder / f"sketch-{part:05d}.npy", sketch)
    return Stats(counts=Counter(sketch_entries=sketch.size))


def _sketch(
    attempt: Attempt, pairs: Path, counts: U64, bound: U64, only: Bool | None = None
) -> Entries:
    """The sketch of a file's matches whose priority is within its query's bound.

    `only`: a mask of the queries wanted. Memory: twice the sketch and `_RANGE_ENTRIES` more.
    """
    settings: BalanceSettings = attempt.settings
    hash_of = priority(settings.seed)
    sketch, found, pending = np.zeros(0, ENTRY), [], 0
    for batch in _read(attempt, pairs, ["uid", "query_ids"]):
        high, low = halves(batch["uid"])
        row, query = _matches(batch, settings.mode, counts)
        if only is not None:
            row, query = row[only[query]], query[only[query]]
        h = hash_of(high[row], low[row], query)
        near = np.flatnonzero(h <= bound[query])
        row, query, h = row[near], query[near], h[near]
        found.append(entries(high[row], low[row], query, h))
        pending += near.size
        if pending > _RANGE_ENTRIES:
            sketch, found, pending = merge([sketch, *found], settings.cap), [], 0
    return merge([sketch, *found], settings.cap)


def _work_thresholds(attempt: Attempt) -> Stats:
    settings: BalanceSettings = attempt.settings
    cap = settings.cap
    paths = dict(zip(attempt.task.reads, attempt.inputs(), strict=True))
    counts: U64 = np.load(paths[_COUNTS])
    sketches = [np.load(p, mmap_mode="r") for n, p in paths.items() if "sketch-" in n]
    pairs = [p for n, p in paths.items() if n.startswith("dedup:")]
    charged = counts
    if settings.mode == "attributed":
        charged = _sum(p for n, p in paths.items() if "charged-" in n)
    stats = Stats()
    found = []
    expected = np.minimum(charged, np.uint64(wanted(cap)))
    for first, stop, parts in by_ranges(sketches, expected, _RANGE_ENTRIES):
        attempt.stop.check()
        attempt.progress(first, counts.size, "queries")
        sketch = merge(parts, cap)
        lacking = missing(sketch, charged[first:stop], cap, first)
        if lacking.size:
            stats.counts["rescanned_queries"] += lacking.size
            only = np.zeros(counts.size, bool)
            only[lacking] = True
            unbounded = np.full_like(counts, NO_LIMIT)
            for path in pairs:
                sketch = merge([sketch, _sketch(attempt, path, counts, unbounded, only)], cap)
        found.append(Thresholds.of(sketch, charged[first:stop], cap, first))
    np.save(attempt.folder / "charged.npy", charged)
    np.save(attempt.folder / "tau.npy", np.concatenate([t.tau for t in found]))
    np.save(attempt.folder / "last.npy", np.concatenate([t.last for t in found]))
    return stats


def _work_select(attempt: Attempt) -> Stats:
    settings: BalanceSettings = attempt.settings
    pairs, *arrays = attempt.inputs()
    charged, tau, last, counts = (np.load(path) for path in arrays)
    thresholds = Thresholds(tau, last)
    hash_of = priority(settings.seed)
    stats = Stats()
    path = attempt.folder / f"selected-{attempt.task.params['part']:05d}.parquet"
    with pq.ParquetWriter(path, records.SELECTED, compression="zstd") as writer:
        for batch in _read(attempt, pairs, records.PAIRS.names):
            high, low = halves(batch["uid"])
            row, query = _matches(batch, settings.mode, counts)
            chosen = thresholds.admit(
                high[row], low[row], query, hash_of(high[row], low[row], query)
            )
            selected_by = selection.lists(row[chosen], query[chosen], batch.num_rows)
            probability = selection.probability(row, query, charged, settings.cap, batch.num_rows)
            number = pc.list_value_length(selected_by).to_numpy()
            kept = np.flatnonzero(number)
            unmatched = batch.num_rows - np.unique(row).size
            stats.rows_in += batch.num_rows
            stats.rows_out += kept.size
            stats.drop("unmatched", unmatched)
            stats.drop("over_cap", batch.num_rows - unmatched - kept.size)
            for queries, rows in zip(*np.unique(number[kept], return_counts=True), strict=True):
                stats.observe("selected_by", queries, int(rows))
            columns = [*batch.columns, selected_by, pa.array(probability)]
            table = pa.Table.from_arrays(columns, schema=records.SELECTED)
            writer.write_table(table.take(pa.array(kept)))
    return stats


def _work_check(attempt: Attempt) -> Stats:
    """Prove that every query selected exactly min(count, cap) pairs; write what became of each."""
    cap: int = attempt.settings.cap
    counts_path, charged_path, *paths = attempt.inputs()
    counts, charged = np.load(counts_path), np.load(charged_path)
    selected, in_union = np.zeros_like(counts), np.zeros_like(counts)
    for path in paths:
        for batch in _read(attempt, path, ["query_ids", "selected_by"]):
            in_union += selection.count(selection.matches(batch["query_ids"])[1], counts.size)
            selected += selection.count(selection.matches(batch["selected_by"])[1], counts.size)
    wrong = np.flatnonzero(selected != np.minimum(charged, np.uint64(cap)))
    assert not wrong.size, (
        f"{wrong.size} queries did not select min(count, cap) pairs, the first is {wrong[0]}: "
        f"{selected[wrong[0]]} of {charged[wrong[0]]} with cap {cap}"
    )
    table = {
        "query_id": pa.array(np.arange(counts.size, dtype=np.uint32)),
        "count": pa.array(counts),
        "charged": pa.array(charged),
        "selected": pa.array(selected),
        "in_union": pa.array(in_union),
    }
    pq.write_table(pa.table(table), attempt.folder / "coverage.parquet", compression="zstd")
    numbers = {
        "queries": counts.size,
        "zero_hit_queries": np.count_nonzero(counts == 0),
        "capped_queries": np.count_nonzero(charged > cap),
        "over_cap_in_union": np.count_nonzero(in_union > cap),
        "matches": counts.sum(),
        "selections": selected.sum(),
    }
    return Stats(counts=Counter({name: int(number) for name, number in numbers.items()}))


def _matches(batch: pa.RecordBatch, mode: Mode, counts: U64) -> tuple[selection.Rows, U32]:
    """The matches of a batch by which a query may select a pair."""
    row, query = selection.matches(batch["query_ids"])
    return (row, query) if mode == "quota" else selection.rarest(row, query, counts)


def _read(attempt: Attempt, path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of a parquet file; a stop is honoured between them."""
    with pq.ParquetFile(path) as parquet:
        done = 0
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=columns):
            attempt.stop.check()
            yield batch
            done += batch.num_rows
            attempt.progress(done, parquet.metadata.num_rows)


STAGE = Stage(
    name="balance",
    needs=("queries", "dedup"),
    plan=plan,
    work=work,
    then=(_plan_total, _plan_sketch, _plan_thresholds, _plan_select, _plan_check),
    unit="pairs",
)

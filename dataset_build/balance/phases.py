"""The work of balance's five phases; memory is bounded by the query list, a batch and a range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build import domains, records, selection
from dataset_build.balance import BalanceSettings, Mode
from dataset_build.balance.delta import Delta
from dataset_build.hashing import U64, halves
from dataset_build.neighbours import place_in_run
from dataset_build.thresholds import (
    NO_LIMIT,
    U32,
    Bool,
    Entries,
    Limit,
    SavedSketch,
    Thresholds,
    by_ranges,
    entries,
    likely_bound,
    merge,
    missing,
    priority,
)
from pipeline import files
from pipeline.stage import Attempt
from pipeline.stats import Stats

_BATCH_ROWS = 65_536
_ROW_GROUP = 16_384
_RANGE_ENTRIES = 1_000_000  # of 28 bytes (36 with domains); sorting takes three times as much
_HEADS = 30  # queries whose domains are reported; up to cap rows each while they are counted
_DOMAINS = 10  # domains reported of each
_SERVED_TABLES = 16  # held before they are added up

HEAD_DOMAINS = pa.schema(
    [("query_id", pa.uint32()), ("domain", pa.string()), ("selected", pa.uint64())]
)
"""How many of the pairs that a query selected, a fair sample of its pairs, a domain serves."""


@dataclass(frozen=True)
class Matches:
    """Matches by which a query may select a pair, of one batch; arrays of one length."""

    row: selection.Rows
    query: U32
    high: U64
    low: U64
    domain: U64 | None
    """Hashes; None where domains are not limited."""

    @classmethod
    def of(cls, batch: pa.RecordBatch, mode: Mode, counts: U64, limit: Limit) -> Matches:
        """Those of a batch with columns uid, query_ids and, where it is limited, domain."""
        row, query = selection.matches(batch["query_ids"])
        if mode == "attributed":
            row, query = selection.rarest(row, query, counts)
        high, low = halves(batch["uid"])
        domain = None if limit.per_domain is None else domains.hashed(batch["domain"])[row]
        return cls(row, query, high[row], low[row], domain)

    def where(self, mask: Bool) -> Matches:
        """A part of them."""
        (at,) = np.nonzero(mask)
        domain = None if self.domain is None else self.domain[at]
        return Matches(self.row[at], self.query[at], self.high[at], self.low[at], domain)


def _total(attempt: Attempt) -> Stats:
    np.save(attempt.folder / "counts.npy", _sum(attempt.inputs()))
    return Stats()


def _sketch(attempt: Attempt) -> Stats:
    settings: BalanceSettings = attempt.settings
    pairs, counts_path = attempt.inputs()
    counts: U64 = np.load(counts_path)
    bound = likely_bound(counts, settings.depth)
    if settings.max_cap is not None:
        bound[bound == 0] = NO_LIMIT  # a smaller cap may bind those as well
    if settings.mode == "attributed":
        charged = np.zeros_like(counts)
        for batch in _read(attempt, pairs, ["uid", "query_ids"]):
            matches = Matches.of(batch, settings.mode, counts, Limit(1))
            charged += selection.count(matches.query, counts.size)
        np.save(attempt.folder / f"charged-{_part(attempt)}.npy", charged)
        # How many pairs are charged to a query in all files is not known yet: keep all it may take.
        bound = np.full_like(bound, NO_LIMIT)
    stats = Stats()
    for number, run in enumerate(_sketches(attempt, pairs, counts, bound)):
        np.save(attempt.folder / f"sketch-{_part(attempt)}-{number:03d}.npy", run)
        stats.counts["sketch_entries"] += run.size
    return stats


def _sketches(
    attempt: Attempt, pairs: Path, counts: U64, bound: U64, only: Bool | None = None
) -> Iterator[Entries]:
    """Sketches of pieces of a file: of its matches whose priority is within its query's bound.

    `only`: a mask of the queries wanted. Where a piece fills a query, `bound` is lowered for the
    next ones.
    """
    settings: BalanceSettings = attempt.settings
    limit, hash_of = settings.depth, priority(settings.seed)
    columns = ["uid", "query_ids", *(["domain"] if limit.per_domain else [])]
    found, pending = [], 0
    for batch in _read(attempt, pairs, columns):
        matches = Matches.of(batch, settings.mode, counts, limit)
        if only is not None:
            matches = matches.where(only[matches.query])
        h = hash_of(matches.high, matches.low, matches.query)
        near = h <= bound[matches.query]
        matches, h = matches.where(near), h[near]
        found.append(entries(matches.high, matches.low, matches.query, h, matches.domain))
        pending += h.size
        if pending > _RANGE_ENTRIES:
            yield (sketch := merge(found, limit))
            found, pending = [], 0
            held = selection.count(sketch["query_id"], counts.size)
            (full,) = np.nonzero(held == limit.pairs)
            last = np.searchsorted(sketch["query_id"], full, side="right") - 1
            bound[full] = np.minimum(bound[full], sketch["h"][last])
    yield merge(found, limit)


def _thresholds(attempt: Attempt) -> Stats:
    """tau, last and full; `due`, what each query must select, where it is known."""
    settings: BalanceSettings = attempt.settings
    limit, depth = settings.limit, settings.depth
    paths = dict(zip(attempt.task.reads, attempt.inputs(), strict=True))
    counts: U64 = np.load(next(iter(paths.values())))
    stats = Stats()
    charged, due = counts, np.zeros(0, np.uint64)
    if settings.mode == "metaclip":
        thresholds = Thresholds.independent(counts, limit.pairs)
    else:
        if settings.mode == "attributed":
            charged = _sum(path for name, path in paths.items() if "charged-" in name)
        due = np.minimum(charged, np.uint64(limit.pairs))
        sketches = [SavedSketch(path) for name, path in paths.items() if "sketch-" in name]
        pairs = [path for name, path in paths.items() if name.startswith("dedup:")]
        found = []
        for first, stop, parts in by_ranges(sketches, counts.size, _RANGE_ENTRIES):
            attempt.stop.check()
            attempt.progress(first, counts.size, "queries")
            sketch = merge(parts, depth)
            lacking = missing(sketch, charged[first:stop], depth, first)
            if lacking.size:
                stats.counts["rescanned_queries"] += lacking.size
                only = np.zeros(counts.size, bool)
                only[lacking] = True
                unbounded = np.full_like(counts, NO_LIMIT)
                for path in pairs:
                    for more in _sketches(attempt, path, counts, unbounded, only):
                        sketch = merge([sketch, more], depth)
            sketch = merge([sketch], limit)
            found.append(Thresholds.of(sketch, charged[first:stop], limit, first))
            if limit.per_domain is not None:
                held = selection.count(sketch["query_id"], counts.size)[first:stop]
                binds = limit.may_bind(charged[first:stop])
                due[first:stop][binds] = held[binds]
        thresholds = Thresholds.join(found)
    np.save(attempt.folder / "charged.npy", charged)
    np.save(attempt.folder / "due.npy", due)
    for name in ("tau", "last", "full"):
        np.save(attempt.folder / f"{name}.npy", getattr(thresholds, name))
    return stats


def _select(attempt: Attempt) -> Stats:
    settings: BalanceSettings = attempt.settings
    pairs, *arrays = attempt.inputs()
    counts, charged, tau, last, full = (np.load(path) for path in arrays)
    thresholds, limit = Thresholds(tau, last, full), settings.limit
    hash_of = priority(settings.seed)
    heads = np.zeros(counts.size, bool)
    heads[np.argsort(-counts.astype(np.int64), kind="stable")[:_HEADS]] = True
    served = [HEAD_DOMAINS.empty_table()]
    stats = Stats()
    selected, in_union = np.zeros_like(counts), np.zeros_like(counts)
    path = attempt.folder / f"selected-{_part(attempt)}.parquet"
    with (
        records.writer(path, records.SELECTED) as writer,
        closing(Delta(attempt)) as changes,
    ):
        for batch in _read(attempt, pairs, records.PAIRS.names):
            matches = Matches.of(batch, settings.mode, counts, limit)
            row, query = matches.row, matches.query
            h = hash_of(matches.high, matches.low, query)
            chosen = thresholds.admit(matches.high, matches.low, query, h, matches.domain)
            selected_by = selection.lists(row[chosen], query[chosen], batch.num_rows)
            chance = thresholds.chance(query, matches.domain, limit, charged)
            probability = selection.probability(row, chance, batch.num_rows)
            number = pc.list_value_length(selected_by).to_numpy()
            kept = np.flatnonzero(number)
            unmatched = batch.num_rows - np.unique(row).size
            stats.rows_in += batch.num_rows
            stats.rows_out += kept.size
            stats.drop("unmatched", unmatched)
            stats.drop("over_cap", batch.num_rows - unmatched - kept.size)
            for queries, rows in enumerate(np.bincount(number[kept]).tolist()):
                if rows:
                    stats.observe("selected_by", queries, rows)
            head = np.flatnonzero(chosen & heads[query])
            served.append(_served(query[head], batch["domain"].take(pa.array(row[head]))))
            if len(served) > _SERVED_TABLES:
                served = [_ranked(served)]
            columns = {name: batch[name] for name in batch.schema.names if name != "domain"}
            columns |= {"selected_by": selected_by, "probability": pa.array(probability)}
            table = pa.table(columns, schema=records.SELECTED).take(pa.array(kept))
            writer.write_table(table, row_group_size=_ROW_GROUP)
            selected += selection.count(query[chosen], counts.size)
            in_union += selection.count(selection.matches(table["query_ids"])[1], counts.size)
            changes.add(batch["uid"], table["uid"])
        changes.finish(stats)
    np.save(attempt.folder / f"chosen-{_part(attempt)}.npy", np.stack([selected, in_union]))
    domains_path = attempt.folder / f"domains-{_part(attempt)}.parquet"
    pq.write_table(_ranked(served), domains_path, compression="zstd")
    return stats


def _served(query: U32, domain: pa.DictionaryArray) -> pa.Table:
    """`HEAD_DOMAINS` of some matches."""
    names = len(domain.dictionary) or 1
    key = query.astype(np.int64) * names + domain.indices.to_numpy()
    key, number = np.unique(key, return_counts=True)
    columns = [(key // names).astype(np.uint32), domain.dictionary.take(pa.array(key % names))]
    return pa.table([*columns, number.astype(np.uint64)], schema=HEAD_DOMAINS)


def _ranked(served: Sequence[pa.Table]) -> pa.Table:
    """`HEAD_DOMAINS` added up: by query, the domains with the most pairs first."""
    added = (
        pa.concat_tables(served).group_by(["query_id", "domain"]).aggregate([("selected", "sum")])
    )
    added = added.rename_columns(["query_id", "domain", "selected"]).cast(HEAD_DOMAINS)
    order = [("query_id", "ascending"), ("selected", "descending"), ("domain", "ascending")]
    return added.sort_by(order)


def _check(attempt: Attempt) -> Stats:
    """Prove that every query selected exactly what is due; write what became of each."""
    settings: BalanceSettings = attempt.settings
    paths = dict(zip(attempt.task.reads, attempt.inputs(), strict=True))
    counts_path, charged_path, due_path = list(paths.values())[:3]
    counts, charged, due = np.load(counts_path), np.load(charged_path), np.load(due_path)
    raw = _sum(path for name, path in paths.items() if name.startswith("dedup:raw-"))
    selected, in_union = _sum(path for name, path in paths.items() if "chosen-" in name)
    served = [pq.read_table(path) for name, path in paths.items() if "domains-" in name]
    if due.size:
        wrong = np.flatnonzero(selected != due)
        assert not wrong.size, (
            f"{wrong.size} queries did not select min(count, cap) pairs, the first is {wrong[0]}: "
            f"{selected[wrong[0]]} of {charged[wrong[0]]}, due {due[wrong[0]]}"
        )
    top = _ranked(served)
    place = place_in_run(top["query_id"].to_numpy())
    top = top.filter(pa.array(place < _DOMAINS))
    pq.write_table(top, attempt.folder / "domains.parquet", compression="zstd")
    table = {
        "query_id": pa.array(np.arange(counts.size, dtype=np.uint32)),
        "raw": pa.array(raw),
        "count": pa.array(counts),
        "charged": pa.array(charged),
        "selected": pa.array(selected),
        "in_union": pa.array(in_union),
    }
    pq.write_table(pa.table(table), attempt.folder / "coverage.parquet", compression="zstd")
    limit = settings.limit.pairs
    numbers = {
        "queries": counts.size,
        "zero_hit_queries": np.count_nonzero(counts == 0),
        "capped_queries": np.count_nonzero(selected < charged),
        "over_cap_selected": np.count_nonzero(selected > limit),
        "over_cap_in_union": np.count_nonzero(in_union > limit),
        "matches": counts.sum(),
        "selections": selected.sum(),
    }
    return Stats(counts=Counter({name: int(number) for name, number in numbers.items()}))


def _part(attempt: Attempt) -> str:
    return f"{attempt.task.params['part']:05d}"


def _sum(paths: Iterable[Path]) -> U64:
    first, *others = paths
    total: U64 = np.load(first)
    for path in others:
        total += np.load(path)
    return total


def _read(attempt: Attempt, path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of a parquet file; a stop is honoured between them."""
    with files.open_parquet(path) as parquet:
        done = 0
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=columns):
            attempt.stop.check()
            yield batch
            done += batch.num_rows
            attempt.progress(done, parquet.metadata.num_rows)


PHASES: dict[str, Callable[[Attempt], Stats]] = {
    "total": _total,
    "sketch": _sketch,
    "thresholds": _thresholds,
    "select": _select,
    "check": _check,
}

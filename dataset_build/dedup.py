"""One row a pair, and a few captions an image address.

Two phases. First each snapshot by itself: equal (address, text) become one row, whose text is put
aside (`texts-*`) from what deciding about it takes (`found-*`). Then all snapshots together, which
reads the small half only: so a dataset grows by a snapshot without reading the texts of those it
has. All captions of an address are in one bucket of `match`, and a task owns some buckets; what
survives depends on the set of rows alone, not on their order, files, tasks or snapshots. Memory is
bounded by ranges of uids, into which a large bucket is sorted out on the disk.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from dataset_build import domains, records, selection, uid_range
from dataset_build.hashing import U64, halves
from dataset_build.neighbours import changes, place_in_run
from pipeline import files
from pipeline.config import Settings
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats


class DedupSettings(Settings):
    """How repeated pairs and addresses with many captions are treated."""

    captions_per_url: int = Field(default=4, ge=1)
    """Different captions that one image address may have. Those that contain a query come first,
    then those that occurred most often, then those with the smallest uid, which is as good as drawn
    at random."""
    buckets_per_task: int = Field(default=16, ge=1)
    """Buckets of `match` that one task reads and that make one output file."""


# Which of a pair's occurrences in a snapshot stands for it: a total order, so that no other
# circumstance decides.
_FIRST = ("uid", "file", "page_url", "source", "text", "url")
_MATCHED = re.compile(r"match:matched-(?P<snapshot>.+)-\d+-\d+\.parquet")
_ROW_GROUP = 16_384  # rows; a reader of a range of uids skips the others
_RANGE_ROWS = 65_536  # held in memory and sorted, some 500 bytes each
_MOST_RANGES = 512  # files open at one time
MOST_ROWS = _MOST_RANGES * _RANGE_ROWS
"""Rows in a bucket, 33 million, from which on memory grows with them."""


def groups(run: Run) -> list[tuple[int, int]]:
    """The neighbouring buckets that make one output file: [(first, one past the last)]."""
    buckets: int = run.settings("match").buckets
    step: int = run.settings("dedup").buckets_per_task
    return [(start, min(start + step, buckets)) for start in range(0, buckets, step)]


def group_bounds(run: Run, number: int) -> tuple[bytes, bytes]:
    """The first and the last uid of a group."""
    buckets: int = run.settings("match").buckets
    start, stop = groups(run)[number]
    return uid_range.bounds(start, buckets)[0], uid_range.bounds(stop - 1, buckets)[1]


def group_of(run: Run, uids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """The number of each uid's group."""
    buckets: int = run.settings("match").buckets
    step: int = run.settings("dedup").buckets_per_task
    # Twice, as a shift by all 64 bits is none.
    bucket = halves(uids)[0] >> np.uint64(1) >> np.uint64(63 - (buckets.bit_length() - 1))
    number: npt.NDArray[np.int64] = bucket.astype(np.int64) // step
    return number


def within(run: Run, first: bytes, last: bytes) -> list[int]:
    """The numbers of the groups with uids from `first` to `last`."""
    bounds = [group_bounds(run, number) for number in range(len(groups(run)))]
    return [n for n, (lowest, highest) in enumerate(bounds) if lowest <= last and highest >= first]


def plan(run: Run) -> list[Task]:
    """For each snapshot one task a group; it reads every file of the snapshot."""
    by_snapshot: dict[str, list[str]] = {}
    for reference in run.find("match:matched-*.parquet"):
        found = _MATCHED.fullmatch(reference)
        assert found, reference
        by_snapshot.setdefault(found["snapshot"], []).append(reference)
    tasks: list[Task] = []
    for snapshot, matched in sorted(by_snapshot.items()):
        for number, bounds in enumerate(groups(run)):
            params = {"phase": "snapshot", "snapshot": snapshot, "group": number, "buckets": bounds}
            tasks.append(
                Task("dedup", len(tasks), tuple(matched), params, ignores=("captions_per_url",))
            )
    return tasks


def _plan_merge(run: Run) -> list[Task]:
    first = len(run.plan("dedup"))
    return [
        Task(
            "dedup",
            first + number,
            ("queries:queries.parquet", *run.find(f"dedup:found-*-{number:05d}.parquet")),
            {"phase": "merge", "group": number},
        )
        for number in range(len(groups(run)))
    ]


def work(attempt: Attempt) -> Stats:
    """Do one task of the phase that its parameters name."""
    phases = {"snapshot": _work_snapshot, "merge": _work_merge}
    return phases[attempt.task.params["phase"]](attempt)


def _work_snapshot(attempt: Attempt) -> Stats:
    """A snapshot's pairs in a group of buckets, sorted by uid, bucket after bucket."""
    params = attempt.task.params
    (start, stop), inputs = params["buckets"], attempt.inputs()
    name = f"{params['snapshot']}-{params['group']:05d}.parquet"
    stats = Stats()
    texts_path, found_path = attempt.folder / f"texts-{name}", attempt.folder / f"found-{name}"
    with (
        records.writer(texts_path, records.TEXTS) as texts,
        records.writer(found_path, records.FOUND) as found,
    ):
        for bucket in range(start, stop):
            for rows in _ranges(attempt, inputs, bucket):
                table, occurrences = first_occurrences(rows)
                stats.counts["pairs_of_snapshots"] += table.num_rows
                texts.write_table(table.select(records.TEXTS.names), row_group_size=_ROW_GROUP)
                domain = domains.of_urls(table["url"])
                columns = [table["uid"], domain, table["query_ids"], pa.array(occurrences)]
                found.write_table(
                    pa.table(columns, schema=records.FOUND), row_group_size=_RANGE_ROWS
                )
            attempt.progress(bucket - start + 1, stop - start, "buckets")
    return stats


def _ranges(attempt: Attempt, paths: Sequence[Path], bucket: int) -> Iterator[pa.Table]:
    """A bucket's rows, range of uids after range: of each all rows, some `_RANGE_ROWS`, unsorted.

    A bucket with more rows is first sorted out into a file a range, on the disk.
    """

    def read() -> Iterator[pa.Table]:
        for path in paths:
            attempt.stop.check()
            with files.open_parquet(path) as matched:
                yield matched.read_row_group(bucket, columns=records.MATCHED.names)

    rows = sum(pq.read_metadata(path).row_group(bucket).num_rows for path in paths)
    if rows <= _RANGE_ROWS:
        yield pa.concat_tables(read())
        return
    buckets: int = attempt.run.settings("match").buckets
    bounds = uid_range.bounds(bucket, buckets)
    cuts = uid_range.cuts(*bounds, min(-(-rows // _RANGE_ROWS), _MOST_RANGES))
    with tempfile.TemporaryDirectory(prefix=".ranges-", dir=attempt.folder) as folder:
        parts = [Path(folder, f"{number}.arrow") for number in range(len(cuts) + 1)]
        with ExitStack() as stack:
            writers = [
                stack.enter_context(pa.ipc.new_stream(str(part), records.MATCHED)) for part in parts
            ]
            for table in read():
                edges = [0, *(uid_range.position(table["uid"], cut) for cut in cuts), len(table)]
                for writer, start, stop in zip(writers, edges[:-1], edges[1:], strict=True):
                    writer.write_table(table.slice(start, stop - start))
        for part in parts:
            attempt.stop.check()
            with pa.OSFile(str(part)) as stream, pa.ipc.open_stream(stream) as reader:
                yield reader.read_all()
            part.unlink()


def first_occurrences(matched: pa.Table) -> tuple[pa.Table, npt.NDArray[np.uint32]]:
    """`records.MATCHED` rows of a snapshot -> its pairs, sorted by uid, and their occurrences."""
    if not matched.num_rows:
        return matched, np.zeros(0, np.uint32)
    order = pc.sort_indices(matched, sort_keys=[(name, "ascending") for name in _FIRST])
    matched = matched.take(order)
    high, low = halves(matched["uid"])
    first = np.flatnonzero(changes(high, low))
    occurrences = np.diff(np.append(first, matched.num_rows)).astype(np.uint32)
    return matched.take(pa.array(first)), occurrences


def _work_merge(attempt: Attempt) -> Stats:
    """All snapshots' pairs of a group; what each query occurs in, with and without repeats."""
    settings: DedupSettings = attempt.settings
    queries_path, *paths = attempt.inputs()
    number = attempt.task.params["group"]
    snapshots = [_snapshot(reference) for reference in attempt.task.reads[1:]]
    stats = Stats()
    queries = pq.read_metadata(queries_path).num_rows
    raw, count = np.zeros(queries, np.uint64), np.zeros(queries, np.uint64)
    rows = sum(pq.read_metadata(path).num_rows for path in paths)
    bounds = group_bounds(attempt.run, number)
    cuts = [*uid_range.cuts(*bounds, max(1, -(-rows // _RANGE_ROWS))), None]
    with ExitStack() as stack:
        files = [
            stack.enter_context(closing(uid_range.Ascending(path, records.FOUND.names)))
            for path in paths
        ]
        writer = stack.enter_context(
            records.writer(attempt.folder / f"pairs-{number:05d}.parquet", records.PAIRS)
        )
        for done, cut in enumerate(cuts, 1):
            attempt.stop.check()
            parts = [file.before(cut) for file in files]
            pairs = merge(parts, snapshots, settings.captions_per_url, raw, stats)
            count += selection.count(selection.matches(pairs["query_ids"])[1], queries)
            writer.write_table(pairs, row_group_size=_ROW_GROUP)
            attempt.progress(done, len(cuts), "ranges")
    np.save(attempt.folder / f"raw-{number:05d}.npy", raw)
    np.save(attempt.folder / f"count-{number:05d}.npy", count)
    return stats


def _snapshot(reference: str) -> str:
    return reference.removeprefix("dedup:found-").rpartition("-")[0]


def merge(
    parts: Sequence[pa.Table],
    snapshots: Sequence[str],
    captions_per_url: int,
    raw: U64,
    stats: Stats,
) -> pa.Table:
    """`records.FOUND` of some snapshots -> `records.PAIRS`, sorted by uid.

    All rows of an address must be there. A pair takes its row from the snapshot whose name is
    smallest. Adds to `raw`, per query, every occurrence, those of captions over the limit too.
    Drops are counted in `stats` as `duplicate` and `captions_per_url`.
    """
    rank = np.argsort(np.argsort(np.array(snapshots)))
    source = np.repeat(rank, [part.num_rows for part in parts])
    found = pa.concat_tables(parts)
    high, low = halves(found["uid"])
    occurrences: npt.NDArray[np.uint32] = found["occurrences"].to_numpy()
    rows = int(occurrences.sum(dtype=np.int64))
    stats.rows_in += rows
    if not found.num_rows:
        return records.PAIRS.empty_table()
    order = np.lexsort((source, low, high))
    high, low = high[order], low[order]
    new_address = changes(high)
    first = np.flatnonzero(changes(high, low))
    occurrences = np.add.reduceat(occurrences[order].astype(np.int64), first).astype(np.uint32)
    stats.drop("duplicate", rows - first.size)

    order = order[first]
    query_ids = found["query_ids"].combine_chunks().take(pa.array(order))
    row, query = selection.matches(query_ids)
    raw += np.bincount(query, weights=occurrences[row], minlength=raw.size).astype(np.uint64)

    address = np.cumsum(new_address)[first] - 1
    captions = np.bincount(address)
    for number, urls in zip(*np.unique(captions, return_counts=True), strict=True):
        stats.observe("captions_per_url", min(int(number), 100), int(urls))
    kept = np.arange(first.size)
    if captions.max() > captions_per_url:
        unmatched = pc.equal(pc.list_value_length(query_ids), 0).to_numpy(zero_copy_only=False)
        # Stable: equal ones stay in the order of uids.
        best = np.lexsort((-occurrences.astype(np.int64), unmatched, address))
        kept = np.sort(best[place_in_run(address[best]) < captions_per_url])
    stats.drop("captions_per_url", first.size - kept.size)
    stats.rows_out += kept.size
    order = order[kept]
    names = pa.array(sorted(snapshots), pa.string())
    columns = {
        "uid": found["uid"].combine_chunks().take(pa.array(order)),
        "domain": found["domain"].combine_chunks().take(pa.array(order)),
        "query_ids": query_ids.take(pa.array(kept)),
        "occurrences": pa.array(occurrences[kept]),
        "snapshot": names.take(pa.array(source[order])),
    }
    return pa.table([columns[name] for name in records.PAIRS.names], schema=records.PAIRS)


STAGE = Stage(
    name="dedup",
    needs=("queries", "match"),
    plan=plan,
    work=work,
    then=(_plan_merge,),
    unit="pairs",
    version=3,
)

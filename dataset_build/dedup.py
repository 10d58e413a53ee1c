"""One row a pair, and a few captions an image address.

All captions of an address are in one bucket, and a task reads its buckets from every file of
`match`. What survives depends on the set of rows alone: not on their order, nor on how they were
spread over files, buckets and tasks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from dataset_build import records
from dataset_build.hashing import halves
from pipeline.config import Settings
from pipeline.manifest import Stats
from pipeline.stage import Attempt, Run, Stage, Task


class DedupSettings(Settings):
    """How repeated pairs and addresses with many captions are treated."""

    captions_per_url: int = Field(default=4, ge=1)
    """Different captions that one image address may have. Those that contain a query come first,
    then those that occurred most often, then those with the smallest uid, which is as good as drawn
    at random."""
    buckets_per_task: int = Field(default=16, ge=1)
    """Buckets of `match` that one task reads and holds in memory, and that make one output file."""


# Which of a pair's occurrences stands for it: a total order, so that no other circumstance decides.
_FIRST = ("uid", "snapshot", "file", "page_url", "source", "text", "url")


def plan(run: Run) -> list[Task]:
    """One task per group of neighbouring buckets; each reads every file of `match`."""
    settings: DedupSettings = run.settings("dedup")
    buckets: int = run.settings("match").buckets
    matched = tuple(run.find("match:matched-*.parquet"))
    step = settings.buckets_per_task
    return [
        Task("dedup", index, matched, {"buckets": [start, min(start + step, buckets)]})
        for index, start in enumerate(range(0, buckets, step))
    ]


def work(attempt: Attempt) -> Stats:
    """Deduplicate a group of buckets, one by one; write the survivors of all, sorted by uid."""
    settings: DedupSettings = attempt.settings
    start, stop = attempt.task.params["buckets"]
    stats = Stats()
    parts = [records.PAIRS.empty_table()]
    inputs = attempt.inputs()
    for bucket in range(start, stop):
        rows = [records.MATCHED.empty_table()]
        for path in inputs:
            attempt.stop.check()
            with pq.ParquetFile(path) as matched:
                rows.append(matched.read_row_group(bucket, columns=records.MATCHED.names))
        parts.append(deduplicate(pa.concat_tables(rows), settings.captions_per_url, stats))
        attempt.progress(bucket - start + 1, stop - start, "buckets")
    pairs = pa.concat_tables(parts)
    pairs = pairs.take(pc.sort_indices(pairs, sort_keys=[("uid", "ascending")]))
    path = attempt.folder / f"pairs-{attempt.task.index:05d}.parquet"
    pq.write_table(pairs, path, compression="zstd", row_group_size=65_536)
    return stats


def deduplicate(matched: pa.Table, captions_per_url: int, stats: Stats) -> pa.Table:
    """`records.MATCHED` rows -> `records.PAIRS` rows, one a uid, in no useful order.

    All rows of an address must be in `matched`. Drops are counted in `stats` as `duplicate` and
    `captions_per_url`.
    """
    stats.rows_in += matched.num_rows
    if not matched.num_rows:
        return records.PAIRS.empty_table()
    matched = matched.take(
        pc.sort_indices(matched, sort_keys=[(name, "ascending") for name in _FIRST])
    )
    high, low = halves(matched["uid"])
    first = np.flatnonzero(np.concatenate([[True], (np.diff(high) != 0) | (np.diff(low) != 0)]))
    occurrences = np.diff(np.append(first, matched.num_rows)).astype(np.uint32)
    stats.drop("duplicate", matched.num_rows - first.size)
    pairs = matched.take(pa.array(first)).append_column("occurrences", pa.array(occurrences))

    # Codes tell addresses apart even if their hashes collide; their order does not matter.
    address = pairs["url"].combine_chunks().dictionary_encode().indices.to_numpy()
    unmatched = pc.equal(pc.list_value_length(pairs["query_ids"]), 0).to_numpy()
    rare = -occurrences.astype(np.int64)
    order = np.lexsort((low[first], high[first], rare, unmatched, address))
    place = _place_in_group(address[order])
    for captions, urls in zip(*np.unique(np.bincount(address), return_counts=True), strict=True):
        stats.observe("captions_per_url", min(int(captions), 100), int(urls))
    kept = order[place < captions_per_url]
    stats.drop("captions_per_url", first.size - kept.size)
    stats.rows_out += kept.size
    return pairs.take(pa.array(np.sort(kept))).select(records.PAIRS.names).cast(records.PAIRS)


def _place_in_group(sorted_groups: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """0, 1, 2 … within each run of equal numbers."""
    starts = np.flatnonzero(np.concatenate([[True], np.diff(sorted_groups) != 0]))
    lengths = np.diff(np.append(starts, sorted_groups.size))
    return np.arange(sorted_groups.size) - np.repeat(starts, lengths)


STAGE = Stage(name="dedup", needs=("match",), plan=plan, work=work, unit="pairs")

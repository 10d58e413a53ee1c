"""What came into the selection and what went out of it, against the last complete one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build import dedup, records, uid_range
from dataset_build.hashing import halves
from pipeline.manifest import Stats
from pipeline.stage import Attempt

DELTA = pa.schema([("uid", records.UID), ("came", pa.bool_())])
"""What differs from the selection before: in now, or out."""


def write(attempt: Attempt, now: pa.Array, stats: Stats) -> None:
    """`delta-*.parquet`: this file's uids against the last complete selection, if there is one."""
    run = attempt.run
    before = [
        run.stage_folder("balance") / "store" / manifest.store / output.name
        for manifest in run.completed("balance")
        for output in manifest.outputs
        if output.name.startswith("selected-")
    ]
    if not before:
        return
    buckets: int = run.settings("match").buckets
    start, stop = dedup.groups(run)[attempt.task.params["part"]]
    first, last = uid_range.bounds(start, buckets)[0], uid_range.bounds(stop - 1, buckets)[1]
    earlier = uid_range.read(before, first, last, ["uid"], attempt.stop.check)
    both = pa.concat_arrays([*earlier["uid"].chunks, now])
    high, low = halves(both)
    order = np.lexsort((low, high))
    same = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    alone = order[~np.append(same, False) & ~np.append(False, same)]
    came = alone >= earlier.num_rows
    stats.counts["came"] += int(came.sum())
    stats.counts["went"] += int((~came).sum())
    table = pa.table([both.take(pa.array(alone)), pa.array(came)], schema=DELTA)
    path = attempt.folder / f"delta-{attempt.task.params['part']:05d}.parquet"
    pq.write_table(table, path, compression="zstd", row_group_size=1 << 20)

"""What came into the selection and what went out of it, against the last complete one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build import dedup, records, uid_range
from dataset_build.hashing import halves
from pipeline.stage import Attempt
from pipeline.stats import Stats

DELTA = pa.schema([("uid", records.UID), ("came", pa.bool_())])
"""What differs from the selection before: in now, or out."""


class Delta:
    """Writes `delta-*.parquet`, one file's part of the changes, as the selection is made.

    Where there is no earlier selection, nothing is written.
    """

    def __init__(self, attempt: Attempt) -> None:
        run, part = attempt.run, attempt.task.params["part"]
        bounds = dedup.group_bounds(run, part)
        self._earlier = [
            uid_range.Ascending(
                run.stage_folder("balance") / "store" / manifest.store / output.name,
                ["uid"],
                *bounds,
            )
            for manifest in run.completed("balance")
            for output in manifest.outputs
            if output.name.startswith("selected-")
        ]
        self._end = _following(bounds[1])
        self._writer: pq.ParquetWriter | None = None
        if self._earlier:
            path = attempt.folder / f"delta-{part:05d}.parquet"
            self._writer = pq.ParquetWriter(path, DELTA, compression="zstd")
        self._rows = {"came": 0, "went": 0}

    def add(self, pairs: pa.Array, now: pa.ChunkedArray) -> None:
        """The next uids, ascending, and those of them that are selected now."""
        if self._writer is not None and len(pairs):
            self._compare(_following(pairs[-1].as_py()), now.combine_chunks())

    def finish(self, stats: Stats) -> None:
        """Count what changed, with what stood behind the last pair before."""
        if self._writer is not None:
            self._compare(self._end, pa.array([], records.UID))
            stats.counts.update(self._rows)

    def close(self) -> None:
        """Close all files."""
        for earlier in self._earlier:
            earlier.close()
        if self._writer is not None:
            self._writer.close()

    def _compare(self, after: bytes | None, now: pa.Array) -> None:
        assert self._writer is not None
        before = [c for e in self._earlier for c in e.before(after)["uid"].chunks]
        both = pa.concat_arrays([*before, now])
        if not len(both):
            return
        high, low = halves(both)
        order = np.lexsort((low, high))
        same = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
        alone = order[~np.append(same, False) & ~np.append(False, same)]
        came = alone >= len(both) - len(now)
        self._rows["came"] += int(came.sum())
        self._rows["went"] += int((~came).sum())
        if alone.size:
            columns = [both.take(pa.array(alone)), pa.array(came)]
            self._writer.write_table(pa.table(columns, schema=DELTA))


def _following(uid: bytes) -> bytes | None:
    """The next uid; None after the last one."""
    number = int.from_bytes(uid, "big") + 1
    return number.to_bytes(16, "big") if number < 1 << 128 else None

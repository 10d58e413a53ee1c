"""Rows of a range of uids out of parquet files: how stages cut their work, and bound its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataset_build.hashing import halves
from pipeline import files

_BATCH_ROWS = 16_384
_ANY = pa.binary()  # comparisons and sorting know this type, not the fixed-size one


def bounds(part: int, parts: int) -> tuple[bytes, bytes]:
    """First and last uid, both included, of one of `parts` equal ranges that cover all uids."""
    space = 1 << 128
    first = -(-part * space // parts)
    after = -(-(part + 1) * space // parts)
    return first.to_bytes(16, "big"), (after - 1).to_bytes(16, "big")


def of_file(name: str) -> tuple[bytes, bytes]:
    """The bounds of a file called `…-PART-of-PARTS.parquet`."""
    part, parts = name.removesuffix(".parquet").split("-of-")
    return bounds(int(part.rpartition("-")[2]), int(parts))


def cuts(first: bytes, last: bytes, parts: int) -> list[bytes]:
    """The first uids of all but the first of `parts` about equal ranges, no address in two."""
    low = int.from_bytes(first[:8], "big")
    width = int.from_bytes(last[:8], "big") + 1 - low
    return [(low + part * width // parts).to_bytes(8, "big") + bytes(8) for part in range(1, parts)]


def position(uids: pa.Array | pa.ChunkedArray, uid: bytes) -> int:
    """How many of some sorted uids come before `uid`."""
    high, low = halves(uids)
    upper, lower = (np.uint64(int.from_bytes(half, "big")) for half in (uid[:8], uid[8:]))
    start, stop = np.searchsorted(high, upper, "left"), np.searchsorted(high, upper, "right")
    return int(start + np.searchsorted(low[start:stop], lower, "left"))


class Ascending:
    """Rows of a file sorted by uid, taken range after range; a batch of them is in memory.

    Row groups that end before `first` or begin after `last` are not read.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        first: bytes = bytes(16),
        last: bytes = b"\xff" * 16,
    ) -> None:
        self._parquet = files.open_parquet(path)
        metadata = self._parquet.metadata
        groups = [
            group
            for group in range(metadata.num_row_groups)
            if not _outside(metadata.row_group(group), first, last)
        ]
        self._empty = self._parquet.schema_arrow.empty_table().select(columns)
        self._batches = self._parquet.iter_batches(_BATCH_ROWS, groups, columns=list(columns))
        self._held: pa.RecordBatch | None = None
        self.before(first)

    def before(self, uid: bytes | None) -> pa.Table:
        """The next rows, those that come before `uid`; all that are left if it is None."""
        taken = []
        while True:
            batch = next(self._batches, None) if self._held is None else self._held
            self._held = None
            if batch is None:
                break
            rows = batch.num_rows if uid is None else position(batch["uid"], uid)
            taken.append(batch.slice(0, rows))
            if rows < batch.num_rows:
                self._held = batch.slice(rows)
                break
        return pa.Table.from_batches(taken) if taken else self._empty

    def close(self) -> None:
        """Close the file."""
        self._parquet.close()


def read(
    paths: Iterable[Path],
    first: bytes,
    last: bytes,
    columns: Sequence[str],
    check: Callable[[], None] = lambda: None,
    among: pa.Array | None = None,
) -> pa.Table:
    """All rows with `first <= uid <= last`, sorted by uid, from files in any order.

    Row groups whose statistics lie outside the range are not read, so files sorted by uid cost
    little. `columns` must name `uid`; `check` is called before each file; of `among`, if given, are
    the uids that are wanted.
    """
    names = list(columns)
    pieces: list[pa.Table] = []
    schema = None
    for path in paths:
        check()
        with files.open_parquet(path) as parquet:
            schema = pa.schema([parquet.schema_arrow.field(name) for name in names])
            for group in range(parquet.num_row_groups):
                if _outside(parquet.metadata.row_group(group), first, last):
                    continue
                table = parquet.read_row_group(group, columns=names).select(names)
                uid = table["uid"].cast(_ANY)
                above = pc.greater_equal(uid, pa.scalar(first, _ANY))
                below = pc.less_equal(uid, pa.scalar(last, _ANY))
                wanted = pc.and_(above, below)
                if among is not None:
                    wanted = pc.and_(wanted, pc.is_in(uid, value_set=among.cast(_ANY)))
                pieces.append(table.filter(wanted))
    assert schema is not None, "no files"
    table = pa.concat_tables(pieces) if pieces else schema.empty_table()
    return table.take(pc.sort_indices(table["uid"].cast(_ANY)))


def _outside(group: Any, first: bytes, last: bytes) -> bool:
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema == "uid":
            known = column.statistics is not None and column.statistics.has_min_max
            return known and (column.statistics.max < first or column.statistics.min > last)
    return False

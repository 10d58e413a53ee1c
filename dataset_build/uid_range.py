"""Rows of a range of uids out of many parquet files: how `download` and `pack` cut their work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
        with pq.ParquetFile(path) as parquet:
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

"""Pairs and the queries that occur in them, as flat arrays: (row, query) a match."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dataset_build.hashing import U64
from dataset_build.thresholds import U32

Rows = npt.NDArray[np.int64]


def matches(query_ids: pa.Array | pa.ChunkedArray) -> tuple[Rows, U32]:
    """(row numbers, query ids) of every entry of a `list<uint32>` column, rows ascending."""
    lengths = pc.fill_null(pc.list_value_length(query_ids), 0).to_numpy()
    return np.repeat(np.arange(len(query_ids)), lengths), pc.list_flatten(query_ids).to_numpy()


def rarest(row: Rows, query: U32, counts: U64) -> tuple[Rows, U32]:
    """Of each row's matches the one whose query has the smallest count; ties by query id."""
    order = np.lexsort((query, counts[query], row))
    first = order[np.concatenate([[True], np.diff(row[order]) != 0])] if row.size else order
    return row[first], query[first]


def probability(row: Rows, chance: npt.NDArray[np.float64], rows: int) -> npt.NDArray[np.float32]:
    """Over the seeds, the probability that any of a row's queries selects it.

    1 - ∏ (1 - p): priorities for different queries are independent. `chance`: p of each match.
    """
    result = np.zeros(rows, np.float32)
    if row.size:
        start = np.flatnonzero(np.concatenate([[True], np.diff(row) != 0]))
        result[row[start]] = 1.0 - np.multiply.reduceat(1.0 - chance, start)
    return result


def count(query: U32, queries: int) -> U64:
    """Matches of every query."""
    return np.bincount(query, minlength=queries).astype(np.uint64)


def lists(row: Rows, query: U32, rows: int) -> pa.Array:
    """Inverse of `matches`: `list<uint32>` of `rows` rows, from matches with rows ascending."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(query))

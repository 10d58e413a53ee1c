"""Selecting at most `cap` pairs a query, against ranking the exploded rows in polars.

The peer is the query that a data engineer would write: a row a match, rank by priority within the
query, keep ranks up to the cap, gather by pair. It uses all cores, ours one; both give the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.timing import compete
from dataset_build.balance import BalanceSettings, choose
from dataset_build.hashing import halves
from dataset_build.selection import lists, matches
from dataset_build.thresholds import priority

PAIRS = 1_000_000
QUERIES = 50_000
CAP = 1_000


def pairs(seed: int = 0) -> tuple[pa.Array, pa.Array]:
    """Uids and query ids: 3.5 draws a pair on average, from a Zipf law with exponent 1.15."""
    rng = np.random.default_rng(seed)
    chance = np.cumsum(1 / np.arange(1, QUERIES + 1) ** 1.15)
    row = np.repeat(np.arange(PAIRS), np.maximum(1, rng.poisson(3.5, PAIRS)))
    query = np.searchsorted(chance, rng.random(row.size) * chance[-1])
    key = np.unique(row * QUERIES + query)
    uids = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), PAIRS, [None, pa.py_buffer(rng.bytes(16 * PAIRS))]
    )
    return uids, lists(key // QUERIES, (key % QUERIES).astype(np.uint32), PAIRS)


def _with_polars(uids: pa.Array, query_ids: pa.Array) -> pa.Array:
    import polars as pl

    high, low = halves(uids)
    row, query = matches(query_ids)
    frame = pl.DataFrame({"row": row, "query": query, "h": priority(0)(high[row], low[row], query)})
    kept = (
        frame.lazy()
        .filter(pl.col("h").rank("ordinal").over("query") <= CAP)
        .sort("row", "query")
        .collect()
    )
    return lists(kept["row"].to_numpy(), kept["query"].to_numpy(), len(uids))


def measure() -> Iterator[dict[str, Any]]:
    """Pairs a second."""
    uids, query_ids = pairs()
    settings = BalanceSettings(cap=CAP)
    assert choose(uids, query_ids, QUERIES, settings).equals(_with_polars(uids, query_ids))
    ours, peer = compete(
        lambda: choose(uids, query_ids, QUERIES, settings),
        lambda: _with_polars(uids, query_ids),
        rounds=3,
    )
    yield {
        "name": "balance",
        "peer_name": "polars",
        "ours": round(PAIRS / ours),
        "peer": round(PAIRS / peer),
        "ratio": round(peer / ours, 2),
        "unit": "pairs/s",
        "pairs": PAIRS,
        "queries": QUERIES,
        "cap": CAP,
        "matches": len(query_ids.flatten()),
    }

"""How many pairs each query has at every step of a build: RUN/report/queries.parquet.

Most stages publish their sums; the packed index is streamed. Memory is some arrays as long as the
query list, whatever the number of pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build.report.published import Absent, Build
from pipeline import files

Counts = npt.NDArray[np.int64]

STEPS: Mapping[str, str] = {
    "raw": "balance",
    "deduplicated": "balance",
    "selected": "balance",
    "downloaded": "screen",
    "packed": "pack",
}
"""The steps at which a query's pairs are counted, and the stage that publishes each."""
_BATCH = 1 << 16


@dataclass
class Packed:
    """Sums over `pack:index.parquet`; the first two hold one number a query."""

    chosen_by: Counts
    """Packed pairs that a query selected."""
    containing: Counts
    """Packed pairs in which a query occurs, whoever selected them."""
    pairs: int = 0
    caption_bytes: Counter[int] = field(default_factory=Counter)
    """Lower edge of a bin that doubles -> pairs."""
    shorter_side: Counter[int] = field(default_factory=Counter)
    """As above, of the stored picture's shorter side in pixels."""
    queries_a_pair: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, eq=False)
class PerQuery:
    """One number a query, in the order of the list; None where the build has not come so far."""

    raw: Counts | None = None
    """Candidates that contain it, repeats counted."""
    deduplicated: Counts | None = None
    """Pairs that contain it."""
    charged: Counts | None = None
    """Those of them that it may select; the cap is held against this."""
    selected: Counts | None = None
    """Pairs that it selected."""
    in_union: Counts | None = None
    """Selected pairs that contain it, whoever selected them."""
    downloaded: Counts | None = None
    """Pairs that it selected and whose picture was fetched."""
    packed: Counts | None = None
    """Pairs that it selected and that are in the shards."""
    in_packed: Counts | None = None
    """Pairs in the shards that contain it, whoever selected them."""

    def steps(self) -> dict[str, Counts | None]:
        """The counts at each of `STEPS`, in their order."""
        return {step: getattr(self, step) for step in STEPS}


def read(build: Build, queries: int, packed: Packed | None) -> PerQuery:
    """What the stages have published so far for a list of this many queries.

    Raises `Absent` where they counted another list.
    """
    counts: dict[str, Counts] = {}
    for path in build.paths("balance", "counts.npy"):  # before the rest of what balance knows
        counts["deduplicated"] = _vector(np.load(path), queries)
    for path in build.paths("balance", "coverage.parquet"):
        columns = {"count": "deduplicated"}
        columns |= {name: name for name in ("raw", "charged", "selected", "in_union")}
        known = [name for name in pq.read_schema(path).names if name in columns]
        table = pq.read_table(path, columns=known)
        for name in known:
            counts[columns[name]] = _vector(table.column(name).to_numpy(), queries)
    for path in build.paths("screen", "downloaded.npy"):
        counts["downloaded"] = _vector(np.load(path), queries)
    if packed:
        counts |= {"packed": packed.chosen_by, "in_packed": packed.containing}
    return PerQuery(**counts)


def table(queries: pa.Table, counts: PerQuery) -> pa.Table:
    """One row a query: its number, text and sources, then every count as uint64 or null."""
    ids = pa.array(np.arange(queries.num_rows, dtype=np.uint32))
    columns = {"query_id": ids, "text": queries["text"], "sources": queries["sources"]}
    for name in PerQuery.__dataclass_fields__:
        values = getattr(counts, name)
        unknown = pa.nulls(queries.num_rows, pa.uint64())
        columns[name] = unknown if values is None else pa.array(values).cast(pa.uint64())
    return pa.table(columns)


def parquet(rows: pa.Table) -> bytes:
    """A table as the bytes of a parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    written: bytes = sink.getvalue().to_pybytes()
    return written


def read_packed(index: Path, queries: int) -> Packed:
    """One pass over the index, reading five of its columns."""
    sums = Packed(np.zeros(queries, np.int64), np.zeros(queries, np.int64))
    columns = ["query_ids", "selected_by", "text_bytes", "width", "height"]
    with files.open_parquet(index) as file:
        for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
            sums.pairs += batch.num_rows
            sums.chosen_by += _occurrences(batch.column("selected_by"), queries)
            sums.containing += _occurrences(batch.column("query_ids"), queries)
            lengths = pc.list_value_length(batch.column("selected_by"))
            values, counted = np.unique(lengths.to_numpy(False), return_counts=True)
            sums.queries_a_pair.update(dict(zip(values.tolist(), counted.tolist(), strict=True)))
            sums.caption_bytes.update(doubling(batch.column("text_bytes").to_numpy(False)))
            sides = np.minimum(
                batch.column("width").to_numpy(False), batch.column("height").to_numpy(False)
            )
            sums.shorter_side.update(doubling(sides))
    return sums


def doubling(values: npt.NDArray[Any]) -> Counter[int]:
    """A histogram over bins [2^k, 2^(k+1)), known by their lower edge; 0 has its own."""
    values = values.astype(np.int64)
    exponents = np.frexp(values.astype(np.float64))[1]  # 0 -> 0, else floor(log2) + 1
    counted = np.bincount(exponents) if len(values) else np.zeros(0, np.int64)
    return Counter({(1 << e >> 1): int(count) for e, count in enumerate(counted.tolist()) if count})


def _occurrences(lists: Any, queries: int) -> Counts:
    ids = lists.flatten().to_numpy(zero_copy_only=False)
    return _vector(np.bincount(ids, minlength=queries), queries)


def _vector(values: npt.NDArray[Any], queries: int) -> Counts:
    if values.shape != (queries,):
        raise Absent("made from another query list than the present one; build again")
    return values.astype(np.int64)

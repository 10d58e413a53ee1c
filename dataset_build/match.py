"""Which queries occur in which text.

A query occurs where its words stand in the text as whole words, in order and side by side, after
both went through `text.normalise`. `Matcher` answers that for batches; the stage does it for every
candidate, names the pairs (`uid`) and sorts them so that `dedup` can read all files by bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from dataset_build import records
from dataset_build.hashing import U64, halves, identify
from dataset_build.phrases import PhraseTree
from dataset_build.text import normalise
from pipeline.config import Settings
from pipeline.manifest import Stats
from pipeline.stage import Attempt, Run, Stage, Task

Texts: TypeAlias = "Sequence[str] | pa.Array | pa.ChunkedArray"

_BATCH_ROWS = 16_384
_BATCH_BYTES = 1 << 20  # texts of this size and what is found in them stay in the cache


class MatchSettings(Settings):
    """How candidates are matched with queries."""

    buckets: int = Field(default=64, ge=1, le=65_536)
    """Parts by image address into which every output file is sorted; a power of two. One part of
    all files together must fit into the memory of one `dedup` task."""
    keep_unmatched: bool = False
    """Whether texts that contain no query stay in the output. It about doubles the size, and lets
    another query list be matched without reading the archive again."""

    @field_validator("buckets")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            below = 1 << value.bit_length() - 1
            raise ValueError(f"{value} is not a power of two; use {below} or {2 * below}")
        return value


class Matcher:
    """Finds which of many queries occur in texts.

    `queries` and texts are sequences of strings or Arrow string arrays. They are normalised here,
    unless `normalised` says that they are what `text.normalise` returned. A query without any word
    never matches; queries that are equal once normalised all match. 500,000 queries take about a
    second and 200 MB.
    """

    def __init__(self, queries: Texts, *, normalised: bool = False, fold_case: bool = True) -> None:
        self._fold_case = fold_case
        self._tree = PhraseTree(self._prepare(queries, normalised))

    def match(self, texts: Texts, *, normalised: bool = False) -> pa.Array:
        """Arrow `list<uint32>`: for every text the sorted, unique indices of its queries.

        A null text matches nothing. Raises ValueError for 2³¹ matches or more in one call.
        """
        prepared = self._prepare(texts, normalised)
        values, offsets, total = [np.zeros(0, np.uint32)], [np.zeros(1, np.int64)], 0
        for part in _batches(prepared):
            found, bounds = self._tree.search(part)
            values.append(found)
            offsets.append(bounds[1:] + total)
            total += found.size
        if total >= 2**31:
            raise ValueError(f"{total} matches do not fit one Arrow list; pass fewer texts at once")
        return pa.ListArray.from_arrays(
            pa.array(np.concatenate(offsets).astype(np.int32)), pa.array(np.concatenate(values))
        )

    def _prepare(self, texts: Texts, normalised: bool) -> pa.Array:
        if not isinstance(texts, (pa.Array, pa.ChunkedArray)):
            try:
                texts = pa.array(texts, pa.large_string())
            except UnicodeEncodeError:  # a lone surrogate
                texts = [normalise(text, self._fold_case) for text in texts]
                return pa.array(texts, pa.large_string())
        array = texts.cast(pa.large_string()).fill_null("")
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
        return array if normalised else _normalise_all(array, self._fold_case)


def _batches(texts: pa.Array) -> Iterator[pa.Array]:
    """Cut a large_string array into pieces of limited rows and bytes, at least a row each."""
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset :] if len(texts) else None
    start = 0
    while offsets is not None and start < len(texts):
        limit = np.searchsorted(offsets[: len(texts) + 1], offsets[start] + _BATCH_BYTES)
        stop = max(start + 1, min(int(limit), start + _BATCH_ROWS, len(texts)))
        yield texts.slice(start, stop - start)
        start = stop


@functools.cache
def _ascii(fold_case: bool) -> bytes:
    """What `normalise` makes of each ASCII character, alone; other bytes stay as they are."""
    return b"".join((normalise(chr(i), fold_case) or " ").encode() for i in range(128)) + bytes(
        range(128, 256)
    )


def _normalise_all(texts: pa.Array, fold_case: bool) -> pa.Array:
    """`normalise` of every text but for runs of spaces, which `PhraseTree` takes as one.

    Among ASCII characters it replaces one by one, so a table does for whole buffers; the other
    texts go through it singly, and the table then leaves them as they are.
    """
    if not len(texts):
        return texts
    special = pc.invert(pc.string_is_ascii(texts))
    if pc.any(special).as_py():
        replaced = [normalise(text, fold_case) for text in texts.filter(special).to_pylist()]
        texts = pc.replace_with_mask(texts, special, pa.array(replaced, texts.type))
    _, offsets, data = texts.buffers()
    if data is None:
        return texts
    table = pa.py_buffer(data.to_pybytes().translate(_ascii(fold_case)))
    return pa.Array.from_buffers(texts.type, len(texts), [None, offsets, table], 0, texts.offset)


def plan(run: Run) -> list[Task]:
    """One task per file of candidates."""
    candidates = run.find("extract:candidates-*.parquet")
    return [
        Task("match", index, ("queries:queries.parquet", reference))
        for index, reference in enumerate(candidates)
    ]


def work(attempt: Attempt) -> Stats:
    """Match one file of candidates; row group b of what it writes holds bucket b.

    Keeps the matched rows of one file in memory, about 400 bytes a row, until they are sorted.
    """
    settings: MatchSettings = attempt.settings
    fold_case = attempt.run.settings("text").fold_case
    queries_path, candidates_path = attempt.inputs()
    queries = pq.read_table(queries_path, columns=["norm"])["norm"]
    matcher = Matcher(queries, normalised=True, fold_case=fold_case)
    stats = Stats()
    parts = [records.MATCHED.empty_table()]
    with pq.ParquetFile(candidates_path) as candidates:
        total = candidates.metadata.num_rows
        for batch in candidates.iter_batches(_BATCH_ROWS, columns=records.CANDIDATES.names):
            attempt.stop.check()
            matched = _match_batch(matcher, batch, settings, fold_case, stats)
            parts.append(matched)
            attempt.progress(stats.rows_in, total)
    table = pa.concat_tables(parts)
    del parts
    address: U64 = table["url_hash"].to_numpy()
    high, low = halves(table["uid"])
    order = np.lexsort((low, high, address))
    table, address = table.take(pa.array(order)), address[order]
    # The bucket is the top bits of the address's hash, so rows in its order lie bucket by bucket.
    shift = np.uint64(64 - (settings.buckets.bit_length() - 1))
    bucket = (address >> shift) if settings.buckets > 1 else np.zeros_like(address)
    bounds = np.searchsorted(bucket, np.arange(settings.buckets + 1, dtype=np.uint64))
    path = attempt.folder / f"matched-{attempt.task.index:05d}.parquet"
    with pq.ParquetWriter(path, records.MATCHED, compression="zstd") as writer:
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            # An empty bucket is an empty row group: bucket numbers stay row group numbers.
            writer.write_table(
                table.slice(start, stop - start), row_group_size=max(stop - start, 1)
            )
    return stats


def _match_batch(
    matcher: Matcher,
    batch: pa.RecordBatch,
    settings: MatchSettings,
    fold_case: bool,
    stats: Stats,
) -> pa.Table:
    """The matched rows of a batch of candidates, with uid, url_hash and query_ids."""
    norms = [normalise(text, fold_case) for text in batch["text"].to_pylist()]
    found = matcher.match(norms, normalised=True)
    count = pc.list_value_length(found).to_numpy()
    stats.rows_in += batch.num_rows
    stats.counts["matches"] += int(count.sum())
    labels, rows = np.unique(_bin(count), return_counts=True)
    for label, number in zip(labels.tolist(), rows.tolist(), strict=True):
        stats.observe("queries_per_text", label, number)
    kept = np.arange(batch.num_rows)
    if settings.keep_unmatched:
        stats.counts["unmatched"] += int((count == 0).sum())
    else:
        kept = np.flatnonzero(count)
        stats.drop("unmatched", batch.num_rows - kept.size)
    stats.rows_out += kept.size
    rows_kept = batch.take(pa.array(kept))
    uids, address = identify(rows_kept["url"].to_pylist(), [norms[i] for i in kept.tolist()])
    columns = {name: rows_kept[name] for name in records.CANDIDATES.names}
    columns["uid"] = pa.array(uids, records.UID)
    columns["url_hash"] = pa.array(address)
    columns["query_ids"] = found.take(pa.array(kept))
    return pa.table([columns[name] for name in records.MATCHED.names], schema=records.MATCHED)


def _bin(count: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Histogram labels: 0, 1, 2, 4, 8 … each standing for itself up to the next."""
    return np.where(count > 0, 1 << np.log2(np.maximum(count, 1)).astype(np.int64), 0)


STAGE = Stage(
    name="match", needs=("queries", "extract"), plan=plan, work=work, also=("text",), unit="pairs"
)

"""Which queries occur in which text.

A query occurs where its words stand in the text as whole words, in order and side by side, after
both went through `text.normalise`. `Matcher` answers that for batches. The stage makes one, which
all its workers on a machine share, finds the queries of every candidate, names the pairs (`uid`)
and sorts them, so that `dedup` can read all files by bucket.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from dataset_build import records
from dataset_build.hashing import halves, identify
from dataset_build.phrases import PhraseTree
from dataset_build.text import metaclip_spaced, normalise
from pipeline import files
from pipeline.config import Settings
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats

Texts: TypeAlias = "Sequence[str] | pa.Array | pa.ChunkedArray"
Compat = Literal["metaclip"]

_BATCH_ROWS = 16_384
_BATCH_BYTES = 1 << 20  # texts of this size and what is found in them stay in the cache


class MatchSettings(Settings):
    """How candidates are matched with queries."""

    buckets: int = Field(default=64, ge=1, le=65_536)
    """Parts by image address into which every output file is sorted, a power of two; as many tasks
    as this can share `dedup`, and what comes after it."""
    keep_unmatched: bool = False
    """Whether texts that contain no query stay in the output. It about doubles the size, and lets
    another query list be matched without reading the archive again."""
    compat: Compat | None = None
    """`metaclip`: queries are found exactly where MetaCLIP v1 finds them, by their capitals and
    their punctuation. What counts as the same pair stays as it is."""
    rows_per_task: int = Field(default=1_000_000, ge=1)
    """Candidates that one task reads; it holds those that match in memory, some 500 bytes each. A
    larger file is shared among several tasks, in row groups."""

    @field_validator("buckets")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            below = 1 << value.bit_length() - 1
            raise ValueError(f"{value} is not a power of two; use {below} or {2 * below}")
        return value


class Matcher:
    """Finds which of many queries occur in texts.

    `queries` and texts are sequences of strings or Arrow string arrays; null is an empty text. They
    are normalised here, unless `normalised` says that they are what `text.normalise` returned. A
    query without any word never matches; queries that are equal once normalised all match. 500,000
    queries take one to two seconds and 200 MB.

    `compat="metaclip"` compares as MetaCLIP does, see `text`: queries as they are, texts through
    `metaclip_spaced` unless they are `normalised`, both without regard to `fold_case`.
    """

    def __init__(
        self,
        queries: Texts,
        *,
        normalised: bool = False,
        fold_case: bool = True,
        compat: Compat | None = None,
    ) -> None:
        self._fold_case = fold_case
        self._compat = compat
        prepared = self._prepare(queries, normalised or compat is not None)
        self._tree = PhraseTree.of(prepared, every_space=compat is not None)

    def save(self, folder: Path) -> None:
        """Write what `load` reads, some `.npy` files, into a folder that exists."""
        np.save(folder / "options.npy", np.array([self._fold_case, self._compat == "metaclip"]))
        self._tree.save(folder)

    @classmethod
    def load(cls, folder: Path) -> Matcher:
        """What was saved, with all its options, in memory that processes share (mapped files)."""
        fold_case, metaclip = np.load(folder / "options.npy").tolist()
        matcher = cls.__new__(cls)
        matcher._fold_case = fold_case
        matcher._compat = "metaclip" if metaclip else None
        matcher._tree = PhraseTree.load(folder)
        return matcher

    def match(self, texts: Texts, *, normalised: bool = False) -> pa.Array:
        """Arrow `list<uint32>`: for every text the sorted, unique indices of its queries.

        Raises ValueError for 2³¹ matches or more in one call.
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
        """A large_string array without nulls, in the form that is compared."""
        if self._compat and not normalised:
            listed = texts.to_pylist() if isinstance(texts, _ARROW) else texts
            texts = [metaclip_spaced(text or "") for text in listed]
        array = _strings(texts)
        return array if normalised or self._compat else _normalise_all(array, self._fold_case)


_ARROW = (pa.Array, pa.ChunkedArray)


def _strings(texts: Texts) -> pa.Array:
    if not isinstance(texts, _ARROW):
        try:
            texts = pa.array(texts, pa.large_string())
        except UnicodeEncodeError:  # a lone surrogate: three bytes like any other to us
            encoded = [(text or "").encode("utf-8", "surrogatepass") for text in texts]
            texts = pa.array(encoded, pa.large_binary()).view(pa.large_string())
    array = texts.cast(pa.large_string()).fill_null("")
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array


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
        raw = texts.filter(special).view(pa.large_binary()).to_pylist()
        replaced = [normalise(text.decode("utf-8", "surrogatepass"), fold_case) for text in raw]
        texts = pc.replace_with_mask(texts, special, pa.array(replaced, texts.type))
    _, offsets, data = texts.buffers()
    if data is None:
        return texts
    table = pa.py_buffer(data.to_pybytes().translate(_ascii(fold_case)))
    return pa.Array.from_buffers(texts.type, len(texts), [None, offsets, table], 0, texts.offset)


def plan(run: Run) -> list[Task]:
    """One task that makes the matcher."""
    ignored = ("buckets", "keep_unmatched", "rows_per_task")
    return [Task("match", 0, ("queries:queries.parquet",), {"phase": "matcher"}, ignored)]


def _plan_parts(run: Run) -> list[Task]:
    """A task for every `rows_per_task` rows of a file of candidates."""
    limit: int = run.settings("match").rows_per_task
    matcher = run.find("match:matcher/*.npy")
    rows = {o.name: o.rows or 0 for manifest in run.manifests("extract") for o in manifest.outputs}
    first, tasks = len(run.plan("match")), list[Task]()
    for reference in run.find("extract:candidates-*.parquet"):
        parts = max(1, -(-rows[reference.partition(":")[2]] // limit))
        for part in range(parts):
            params = {"phase": "match", "part": part, "parts": parts}
            reads = (*matcher, reference)
            tasks.append(Task("match", first + len(tasks), reads, params, ("rows_per_task",)))
    return tasks


def work(attempt: Attempt) -> Stats:
    """Make the matcher, or match a part of a file."""
    return _make(attempt) if attempt.task.params["phase"] == "matcher" else _match(attempt)


def _make(attempt: Attempt) -> Stats:
    compat: Compat | None = attempt.settings.compat
    column = "text" if compat else "norm"
    (path,) = attempt.inputs()
    queries = pq.read_table(path, columns=[column])[column]
    fold_case: bool = attempt.run.settings("text").fold_case
    folder = attempt.folder / "matcher"
    folder.mkdir()
    Matcher(queries, normalised=compat is None, fold_case=fold_case, compat=compat).save(folder)
    return Stats(counts=Counter(queries=len(queries)))


def _match(attempt: Attempt) -> Stats:
    """Match an even share of a file's row groups into `matched-SNAPSHOT-NUMBER-PART.parquet`.

    Rows are sorted by uid, and row group b holds bucket b: the uids whose first bits are b.
    """
    settings: MatchSettings = attempt.settings
    part, parts = attempt.task.params["part"], attempt.task.params["parts"]
    *matcher_paths, path = attempt.inputs()
    matcher = Matcher.load(matcher_paths[0].parent)
    stats = Stats()
    edges = np.array([b * 2**64 // settings.buckets for b in range(settings.buckets)], np.uint64)
    slices: list[list[pa.Table]] = [[records.MATCHED.empty_table()] for _ in edges]
    with files.open_parquet(path) as candidates:
        groups = candidates.num_row_groups
        share = range(groups * part // parts, groups * (part + 1) // parts)
        total = sum(candidates.metadata.row_group(group).num_rows for group in share)
        for batch in candidates.iter_batches(
            _BATCH_ROWS, row_groups=list(share), columns=records.CANDIDATES.names
        ):
            attempt.stop.check()
            matched = _by_uid(_match_batch(matcher, batch, attempt, stats))
            bounds = [*np.searchsorted(halves(matched["uid"])[0], edges).tolist(), len(matched)]
            for bucket, start, stop in zip(slices, bounds[:-1], bounds[1:], strict=True):
                bucket.append(matched.slice(start, stop - start))
            attempt.progress(stats.rows_in, total)
    name = path.name.replace("candidates", "matched", 1)
    target = attempt.folder / f"{Path(name).stem}-{part:03d}.parquet"
    with records.writer(target, records.MATCHED) as writer:
        for bucket in slices:
            table = _by_uid(pa.concat_tables(bucket))
            # An empty bucket is an empty row group: bucket numbers stay row group numbers.
            writer.write_table(table, row_group_size=max(len(table), 1))
    return stats


def _by_uid(table: pa.Table) -> pa.Table:
    high, low = halves(table["uid"])
    return table.take(pa.array(np.lexsort((low, high))))


def _match_batch(
    matcher: Matcher, batch: pa.RecordBatch, attempt: Attempt, stats: Stats
) -> pa.Table:
    """The matched rows of a batch of candidates, with uid and query_ids."""
    settings: MatchSettings = attempt.settings
    fold_case: bool = attempt.run.settings("text").fold_case
    found = matcher.match(batch["text"])
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
    norms = [normalise(text, fold_case) for text in rows_kept["text"].to_pylist()]
    uids = identify(rows_kept["url"].to_pylist(), norms)
    columns = {name: rows_kept[name] for name in records.CANDIDATES.names}
    columns["uid"] = pa.array(uids, records.UID)
    columns["query_ids"] = found.take(pa.array(kept))
    return pa.table([columns[name] for name in records.MATCHED.names], schema=records.MATCHED)


def _bin(count: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Histogram labels: 0, 1, 2, 4, 8 … each standing for itself up to the next."""
    return np.where(count > 0, 1 << np.log2(np.maximum(count, 1)).astype(np.int64), 0)


STAGE = Stage(
    name="match",
    needs=("queries", "extract"),
    plan=plan,
    work=work,
    then=(_plan_parts,),
    unit="pairs",
    also=("text",),
    version=2,
)

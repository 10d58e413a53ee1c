"""Which pictures of the pool look like one of an evaluation set, or one that a list names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build import records
from dataset_build.lists import Lists
from dataset_build.screen import ScreenSettings, evaluation, perceptual
from dataset_build.screen.near import MIN_QUALITY, UNHASHED
from pipeline.stage import Attempt
from pipeline.stats import Stats

LIST = "list:"
"""Before the reason of a list, where an evaluation set has its name."""
_ROWS_AT_ONCE = 1 << 17


def compare(attempt: Attempt) -> Stats:
    """Compare a range of rows: `hits-*.parquet`, for each and each set the distance of the nearest.

    A picture with too little to see is never one of an evaluation set, but may be a listed one.
    Raises `ConfigError` naming a set without a picture.
    """
    params = attempt.task.params
    hashes_path, classes_path, *rest = attempt.inputs()
    names, of_entry, limit, index = _wanted(
        attempt.settings, rest[: params["sets"]], Lists.of(attempt)
    )
    listed = np.array([name.startswith(LIST) for name in names], np.bool_)
    hashes, classes = np.load(hashes_path, mmap_mode="r"), np.load(classes_path, mmap_mode="r")
    first, last = params["rows"]
    path = attempt.folder / f"hits-{params['part']:05d}.parquet"
    with pq.ParquetWriter(path, records.HITS, compression="zstd") as writer:
        for start in range(first, last, _ROWS_AT_ONCE):
            attempt.stop.check()
            row = np.arange(start, min(start + _ROWS_AT_ONCE, last))
            query, entry, apart = index.within(_whole(hashes, row), int(limit.max(initial=0)))
            told = classes[row[query]] != UNHASHED
            hit = (apart <= limit[entry]) & (told | listed[of_entry[entry]])
            query, of_set, apart = query[hit], of_entry[entry[hit]], apart[hit]
            order = np.lexsort((apart, of_set, query))
            query, of_set, apart = query[order], of_set[order], apart[order]
            nearest = np.ones(query.size, np.bool_)
            nearest[1:] = (query[1:] != query[:-1]) | (of_set[1:] != of_set[:-1])
            columns = [
                pa.array(row[query[nearest]], pa.uint32()),
                pa.array([names[place] for place in of_set[nearest]], pa.string()),
                pa.array(apart[nearest]),
            ]
            writer.write_table(pa.table(columns, schema=records.HITS))
            attempt.progress(int(row[-1]) + 1 - first, last - first, "pictures")
    return Stats()


def _wanted(
    settings: ScreenSettings, sets: list[Path], lists: Lists
) -> tuple[list[str], npt.NDArray[np.int64], perceptual.U8, perceptual.Index]:
    """Names of sets; of each hash to compare with: the place of its set's name, up to which
    distance; and all of them to search in."""
    names: list[str] = []
    of_entry: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    limit = [np.zeros(0, np.uint8)]
    hashes = [np.zeros((0, 4), np.uint64)]

    def add(name: str, more: perceptual.U64, distance: int) -> None:
        names.append(name)
        of_entry.append(np.full(len(more), len(names) - 1))
        limit.append(np.full(len(more), distance, np.uint8))
        hashes.append(more)

    evaluation.check(settings.evaluation, sets)
    for path in sets:
        table = pq.read_table(path)
        table = table.filter(pa.array(table["pdq_quality"].fill_null(0).to_numpy() >= MIN_QUALITY))
        for name in table["set"].unique().to_pylist():  # one, or none
            add(name, perceptual.packed(table["pdq"].to_pylist()), settings.evaluation_distance)
    listed, codes = lists.perceptual
    listed = listed.astype(">u8").view("u8")
    for code in np.unique(codes).tolist():
        add(f"{LIST}{lists.reasons[code]}", listed[codes == code], settings.listed_distance)
    together = np.concatenate(hashes)
    return names, np.concatenate(of_entry), np.concatenate(limit), perceptual.Index(together)


def _whole(hashes: perceptual.U32, rows: perceptual.Rows) -> perceptual.U64:
    """Some rows of `near.collect`'s hashes as `perceptual.packed` has them."""
    words = np.ascontiguousarray(hashes[:, rows].T.astype(">u4"))
    return words.view("u8").reshape(-1, 4)

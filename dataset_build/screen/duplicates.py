"""Which pairs have the same file as their picture, and which pair each then yields to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from dataset_build.hashing import U64
from dataset_build.list_entries import words_of
from dataset_build.neighbours import changes, place_in_run
from dataset_build.screen import staged

ROWS_AT_ONCE = 32_000_000  # of 24 bytes, three times over while they are sorted: 2.3 GB

Bool = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]


class Files:
    """For every picture, how often its file occurs; rows are numbers of pictures, by uid."""

    def __init__(self, rows: int) -> None:
        self.leader: U32 = np.arange(rows, dtype=np.uint32)
        """The first row that is alive and has the same file; for rows that are not, themselves."""
        self.place: U32 = np.zeros(rows, np.uint32)
        """How many rows before it are alive and have the same file."""
        self.placeholder: Bool = np.zeros(rows, np.bool_)
        """Whether too many addresses have the same file, alive or not."""

    def read(
        self,
        paths: list[Path],
        alive: Bool,
        first_of_address: Bool,
        most: int | None,
        check: Callable[[], None],
        rows_at_once: int | None = None,
    ) -> None:
        """Fill all three from `fetched-*.parquet`; a file of more than `most` addresses is a
        placeholder, and its rows are not alive."""
        passes = max(1, -(-alive.size // (rows_at_once or ROWS_AT_ONCE)))
        for number in range(passes):
            high, low, rows = digests(paths, number, passes, check)
            order = np.lexsort((low, high))  # stable: equal digests stay in the order of uids
            high, low, rows = high[order], low[order], rows[order]
            if not rows.size:
                continue
            if most is not None:
                heads = np.flatnonzero(changes(high, low))
                copies = np.diff(np.append(heads, rows.size))
                addresses = np.add.reduceat(first_of_address[rows], heads, dtype=np.int64)
                self.placeholder[rows] = np.repeat(addresses > most, copies)
            living = alive[rows] & ~self.placeholder[rows]
            high, low, rows = high[living], low[living], rows[living]
            if rows.size:
                place = place_in_run(high, low)
                self.place[rows] = place
                self.leader[rows] = rows[np.arange(rows.size) - place]


def digests(
    paths: list[Path], number: int, passes: int, check: Callable[[], None]
) -> tuple[U64, U64, Rows]:
    """The first 128 bits of the digests that belong to this pass, in halves, and their rows.

    Among 10^10 pictures two different ones share 128 bits with a probability of 10^-19.
    """
    halves = [np.empty((0, 2), np.uint64)]
    rows = [np.empty(0, np.int64)]
    start = 0
    for path in paths:
        check()
        table = pq.read_table(path, columns=["sha256", *staged.COLUMNS])
        table = table.filter(staged.numbered(table))
        raw = words_of(table["sha256"], 4)
        mine = raw[:, 3] % passes == number
        halves.append(raw[mine, :2])
        rows.append(start + np.flatnonzero(mine))
        start += len(table)
    both = np.concatenate(halves)
    return both[:, 0], both[:, 1], np.concatenate(rows)


def place_in_group(leader: U32) -> U32:
    """How many rows before each have the same leader, which is the first of them."""
    members = np.flatnonzero(leader != np.arange(leader.size, dtype=np.uint32))
    order = members[np.argsort(leader[members], kind="stable")]
    place = np.zeros(leader.size, np.uint32)
    if order.size:
        place[order] = place_in_run(leader[order]) + 1
    return place

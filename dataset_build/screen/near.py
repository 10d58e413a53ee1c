"""Pairs of pictures of the pool whose perceptual hashes are a few bits apart.

All pairs are too many to compare: 8·10¹⁶ of 400 million pictures. Of 8 parts of 32 bits each
picture is listed under its own part and under those in which weak bits are flipped, the four whose
coefficients lay closest to the median: 16 keys a part. A copy flips weak bits first, so two copies
meet under some key of some part; `python -m benchmarks screen` measures how many of them do. Those
that meet are compared in full, so nothing is found that is not near.

At 400 million pictures 128 keys each are 5·10¹⁰ numbers, made and sorted in pieces of half a GiB:
some three hours of one core in all. Those that meet are read from anywhere among the hashes, 32
bytes a picture, which is quick only where the page cache can hold them: 13 GB. Two even hashes
share one of 2³² keys by chance: 256 pairs of keys make 5·10⁹ comparisons a part. (Found exactly, by
16 parts of 16 bits with a flip each, it would be some 3·10¹⁴ comparisons: weeks of a core.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build.neighbours import changes
from dataset_build.screen.perceptual import PARTS, U32, U64
from pipeline.stage import Attempt
from pipeline.stats import Stats

KEYS_AT_ONCE = 1 << 26  # 8 bytes each, and as much again for the runs of equal ones
KEYS_A_PART = 16
UNHASHED = np.uint32(2**32 - 1)
"""The class of a picture that takes no part: there is too little to see."""
MIN_QUALITY = 50
"""Of 100; PDQ's authors advise against trusting the hash of a picture below."""
_LEADERS = 64
_ROWS_AT_ONCE = 1 << 20
_PAIRS_AT_ONCE = 1 << 20


def collect(attempt: Attempt) -> Stats:
    """All hashes in the order of uids, for every part uint32 [8, rows], and their classes.

    The class of a picture, uint32 [rows], is the first row with the same hash.
    """
    paths = attempt.inputs()
    counts = [pq.read_metadata(path).num_rows for path in paths]
    rows = sum(counts)
    assert rows < UNHASHED, f"{rows} pictures"
    hashes, weak = (attempt.folder / name for name in ("hashes.npy", "weak.npy"))
    for path in (hashes, weak):
        np.lib.format.open_memmap(path, "w+", np.uint32, (PARTS, rows))
    classes = np.full(rows, UNHASHED, np.uint32)
    start = 0
    for number, (path, count) in enumerate(zip(paths, counts, strict=True)):
        attempt.stop.check()
        table = pq.read_table(path, columns=["pdq", "pdq_weak", "pdq_quality"])
        _write(hashes, start, _parts(table["pdq"]))
        _write(weak, start, _parts(table["pdq_weak"]))
        told = table["pdq_quality"].to_numpy() >= MIN_QUALITY
        classes[start : start + count][told] = 0
        start += count
        attempt.progress(number + 1, len(paths), "files")
    _classify(hashes, classes, attempt)
    np.save(attempt.folder / "classes.npy", classes)
    stats = Stats()
    stats.counts["pictures_too_plain_to_compare"] = int((classes == UNHASHED).sum())
    return stats


# A mapping's pages count as the task's memory until it ends, so each ends at once: all hashes may
# be more than a task may hold.
def _write(path: Path, start: int, rows: U32) -> None:
    array = np.load(path, mmap_mode="r+")
    array[:, start : start + rows.shape[1]] = rows


def _read(path: Path, rows: slice) -> U32:
    return np.array(np.load(path, mmap_mode="r")[:, rows])


def _parts(column: pa.ChunkedArray) -> U32:
    """Hashes of 32 bytes as numbers of 32 bits, part by part [8, rows]."""
    raw = b"".join(
        chunk.buffers()[1][32 * chunk.offset :][: 32 * len(chunk)] for chunk in column.chunks
    )
    found: U32 = np.frombuffer(raw, ">u4").astype(np.uint32).reshape(-1, PARTS).T
    return found


def _classify(hashes: Path, classes: U32, attempt: Attempt) -> None:
    """Give each row that takes part the first row of its hash, a share of the hashes at a time."""
    rows = classes.size
    passes = max(1, -(-rows // (KEYS_AT_ONCE // 4)))  # 32 bytes a row, once more to sort them
    takes_part = classes != UNHASHED
    for number in range(passes):
        numbers, shares = [np.zeros(0, np.int64)], [np.zeros((PARTS, 0), np.uint32)]
        for start in range(0, rows, _ROWS_AT_ONCE):
            attempt.stop.check()
            piece = _read(hashes, slice(start, start + _ROWS_AT_ONCE))
            own = takes_part[start : start + _ROWS_AT_ONCE]
            if passes > 1:
                share = np.bitwise_xor.reduce(piece, axis=0) % np.uint32(passes)
                own = own & (share == number)
            numbers.append(start + np.flatnonzero(own))
            shares.append(piece[:, own])
        mine, words = np.concatenate(numbers), np.concatenate(shares, axis=1)
        del numbers, shares
        if not mine.size:
            continue
        order = np.lexsort(words)  # stable: rows of a hash stay in their order
        first = changes(*(word[order] for word in words))
        heads = mine[order[first]]
        classes[mine[order]] = heads[np.cumsum(first) - 1].astype(np.uint32)


Slot = tuple[int, int, int]
"""What is sorted at once: the keys of a part, of them a range of so many."""


def slots_of_tasks(rows: int) -> list[list[Slot]]:
    """The slots that each task sorts, one after the other; in each at most `KEYS_AT_ONCE` keys."""
    ranges = 1
    while KEYS_A_PART * rows / ranges > KEYS_AT_ONCE:
        ranges *= 2
    slots = [(part, number, ranges) for part in range(PARTS) for number in range(ranges)]
    step = max(1, KEYS_AT_ONCE // (KEYS_A_PART * max(rows, 1)))
    return [slots[start : start + step] for start in range(0, len(slots), step)]


def find(attempt: Attempt) -> Stats:
    """The near pairs of some slots: `edges-*.npy`, uint64 [pairs], smaller row << 32 | larger."""
    distance = attempt.settings.near_distance
    hashes, weak, classes = (np.load(path, mmap_mode="r") for path in attempt.inputs())
    own = attempt.task.params["slots"]
    found = Edges()
    stats = Stats()
    for number, slot in enumerate(own):
        attempt.stop.check()
        keys = keys_of(hashes, weak, classes, slot, attempt.stop.check)
        for first, second in meetings(keys):
            attempt.stop.check()
            stats.counts["near_comparisons"] += first.size
            near = _distances(hashes, first, second) <= distance
            found.add(first[near].astype(np.uint64) << np.uint64(32) | second[near])
        attempt.progress(number + 1, len(own), "slots")
    np.save(attempt.folder / f"edges-{attempt.task.params['part']:05d}.npy", found.each_once())
    return stats


def keys_of(hashes: U32, weak: U32, classes: U32, slot: Slot, check: Callable[[], None]) -> U64:
    """The keys of a slot, sorted, each above the row that has it: key << 32 | row.

    Of a class, its first row alone has keys.
    """
    part, number, ranges = slot
    bits = ranges.bit_length() - 1
    made = [np.zeros(0, np.uint64)]
    for start in range(0, classes.size, _ROWS_AT_ONCE):
        check()
        stop = min(start + _ROWS_AT_ONCE, classes.size)
        row = np.arange(start, stop, dtype=np.uint32)
        row = row[classes[start:stop] == row]
        words, masks = hashes[part, row], weak[part, row]
        if bits:  # most rows have no key in the range: flips leave the other bits as they are
            top = np.uint32(32 - bits)
            can = ((words >> top) ^ np.uint32(number)) & ~(masks >> top) == 0
            row, words, masks = row[can], words[can], masks[can]
        for key in flipped(words, masks):
            packed = key.astype(np.uint64) << np.uint64(32) | row
            if bits:
                packed = packed[key >> np.uint32(32 - bits) == number]
            made.append(packed)
    keys = np.concatenate(made)
    del made
    keys.sort()
    return keys


class Edges:
    """Collects pairs, of which many are found again and again."""

    def __init__(self) -> None:
        self._held = [np.zeros(0, np.uint64)]
        self._size, self._most = 0, _PAIRS_AT_ONCE

    def add(self, pairs: U64) -> None:
        """Take some more in. They are sorted when they are twice as many as after the last time, so
        all that is sorted is a small multiple of what was added."""
        self._held.append(pairs)
        self._size += pairs.size
        if self._size > self._most:
            self._most = max(_PAIRS_AT_ONCE, 2 * self.each_once().size)

    def each_once(self) -> U64:
        """All that were added, ascending."""
        pairs = np.concatenate(self._held)
        pairs.sort()  # `np.unique` goes by a hash table, which takes 70 times as long
        pairs = pairs[changes(pairs)]
        self._held, self._size = [pairs], pairs.size
        return pairs


def flipped(words: U32, weak: U32) -> Iterator[U32]:
    """Words with every subset of their weak bits flipped; the four bits are set in `weak`."""
    bits = []
    left = weak.copy()
    for _ in range(4):
        lowest = left & (~left + np.uint32(1))
        left ^= lowest
        bits.append(lowest)
    for subset in range(KEYS_A_PART):
        key = words.copy()
        for place, bit in enumerate(bits):
            if subset >> place & 1:
                key ^= bit
        yield key


def meetings(keys: U64) -> Iterator[tuple[U32, U32]]:
    """Pairs of rows, the smaller first, that share a key; of many the first 64 with each.

    Plain pictures share keys by the thousands; compared with the first of them, which keep their
    picture, they cost as much as they are many and not the square of it.
    """
    new = changes(keys >> np.uint64(32)) if keys.size else np.zeros(0, np.bool_)
    starts = np.flatnonzero(new)
    sizes = np.diff(np.append(starts, keys.size))
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    for leader in range(_LEADERS):
        starts, sizes = starts[sizes > leader + 1], sizes[sizes > leader + 1]
        if not starts.size:
            return
        others = sizes - leader - 1
        ends = others.cumsum()
        cuts = np.searchsorted(ends, np.arange(_PAIRS_AT_ONCE, ends[-1], _PAIRS_AT_ONCE))
        for run in np.split(np.arange(starts.size), np.unique(cuts)):
            if run.size:
                length = others[run]
                before = np.repeat(length.cumsum() - length, length)
                place = (
                    np.repeat(starts[run] + leader + 1, length) + np.arange(before.size) - before
                )
                first = np.repeat(keys[starts[run] + leader], length)
                yield first.astype(np.uint32), keys[place].astype(np.uint32)


def _distances(hashes: U32, first: U32, second: U32) -> npt.NDArray[np.uint16]:
    total = np.zeros(first.size, np.uint16)
    for part in range(PARTS):
        total += np.bitwise_count(hashes[part, first] ^ hashes[part, second])
    return total


def leaders(classes: U32, edges: U32, alive: npt.NDArray[np.bool_]) -> U32:
    """For each row the row that keeps its picture: itself, or the smallest that is near it.

    `classes` [rows]: the first row with the same hash; `edges`: near pairs of such first rows;
    `alive`: rows that may keep a picture, the others stay by themselves. In the order of rows, a
    picture is kept unless it is near one that is kept. So two pictures are one only if one of them
    is near the other: a chain of likenesses merges nothing at its ends.
    """
    rows = np.arange(classes.size, dtype=np.uint32)
    leader: U32 = rows.copy()
    told = alive & (classes != UNHASHED)
    # Of a class, the first row that is alive stands for it.
    first = np.full(classes.size, UNHASHED)
    np.minimum.at(first, classes[told], rows[told])
    ends = first[edges]
    ends = np.sort(ends[(ends != UNHASHED).all(axis=1)], axis=1)
    low, high = ends[:, 0], ends[:, 1]
    kept = np.zeros(classes.size, np.bool_)
    kept[first[first != UNHASHED]] = True
    open_low, open_high = low, high
    dropped = np.zeros(classes.size, np.bool_)
    while open_low.size:
        waiting = np.zeros(classes.size, np.bool_)
        waiting[open_high] = True
        sure = ~waiting[open_low]  # nothing before it is undecided: it is kept
        dropped[open_high[sure]] = True
        left = ~dropped[open_high] & ~dropped[open_low]
        open_low, open_high = open_low[left], open_high[left]
    keeps = dropped[high] & ~dropped[low]
    target = np.full(classes.size, UNHASHED)
    np.minimum.at(target, high[keeps], low[keeps])
    stands: U32 = first[classes[told]]
    leader[told] = np.where(dropped[stands], target[stands], stands)
    return leader


def edges_of(paths: list[Path]) -> U32:
    """The near pairs that `find` wrote, each once: uint32 [pairs, 2], the smaller row first."""
    found = Edges()
    for path in paths:
        found.add(np.load(path))
    packed = found.each_once()
    return np.stack([packed >> np.uint64(32), packed & np.uint64(2**32 - 1)], 1).astype(np.uint32)

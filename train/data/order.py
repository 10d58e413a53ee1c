"""Which sample when: a pure function of (seed, datasets, lanes, batch, step).

An epoch permutes the blocks, shuffles the samples inside each, and lays all of them end to end.
Whole batches' worth of that sequence is cut into equal lanes, and a batch takes the next few
samples of every lane. Neither the number of processes nor that of workers appears: they decide only
who reads which lane. A position in training is therefore one integer, the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from train.data.index import DatasetError, Index


@dataclass(frozen=True)
class Place:
    """One sample's turn."""

    epoch: int
    """Of the sample's dataset, from 0; its crop depends on it."""
    block: int
    sample: int
    """Row of the index."""


class Order:
    """The order of samples of one training run.

    `lanes_each` says how many of the lanes each of the index's datasets fills. Every dataset has
    its own epochs, and an epoch takes each of its samples exactly once. Raises `DatasetError` if a
    dataset is smaller than its part of a batch, `ValueError` if `lanes` does not divide `batch`.
    """

    def __init__(
        self,
        index: Index,
        *,
        seed: int,
        batch: int,
        lanes: int,
        block_samples: int,
        lanes_each: Sequence[int] = (),
    ) -> None:
        if batch % lanes:
            raise ValueError(f"lanes ({lanes}) must divide the batch ({batch})")
        self.batch = batch
        self.lanes = lanes
        self.share = batch // lanes
        """Samples that one lane gives to a batch."""
        self.first, self.size = _blocks(index.shard, block_samples)
        lanes_each = lanes_each or (lanes,)
        self._epochs: list[_Epochs] = []
        self._of_lane: list[int] = []
        self._first_lane: list[int] = []
        row = lane = 0
        for part, width in zip(index.parts, lanes_each, strict=True):
            if part.samples < width * self.share:
                raise DatasetError(
                    f"{part.name} has {part.samples} samples, fewer than the {width * self.share} "
                    f"that it gives to a batch of {batch}; lower train.batch"
                )
            key = hashlib.sha256(f"{part.fingerprint}/{seed}".encode()).digest()
            blocks = np.searchsorted(self.first, [row, row + part.samples])
            mine = slice(*blocks)
            self._epochs.append(
                _Epochs(
                    int.from_bytes(key[:8], "little"),
                    int(blocks[0]),
                    self.first[mine],
                    self.size[mine],
                    width,
                    self.share,
                )
            )
            self._first_lane += [lane] * width
            self._of_lane += [len(self._epochs) - 1] * width
            row, lane = row + part.samples, lane + width
        if lane != lanes:
            raise ValueError(f"the datasets fill {lane} of {lanes} lanes")
        self._largest = max(self._epochs, key=lambda epochs: epochs.lanes)

    def epochs(self, steps: int) -> float:
        """How often as many steps go through the dataset that fills most of a batch."""
        return steps * self._largest.batch / self._largest.samples

    def blocks_from(self, block: int) -> Iterator[int]:
        """All blocks of a block's dataset, from it on and around."""
        epochs = next(epochs for epochs in self._epochs if block in epochs.blocks)
        yield from range(block, epochs.blocks.stop)
        yield from range(epochs.blocks.start, block)

    def lane(self, lane: int, step: int) -> list[Place]:
        """The `share` samples that a lane gives to the batch of a step, in their order."""
        epochs = self._epochs[self._of_lane[lane]]
        return epochs.lane(lane - self._first_lane[lane], step)

    def lanes_of(self, rank: int, world: int) -> range:
        """The lanes that a process reads; ranks in order make up the batch in order."""
        if self.lanes % world:
            raise ValueError(f"the number of processes ({world}) must divide lanes ({self.lanes})")
        each = self.lanes // world
        return range(rank * each, (rank + 1) * each)

    def batch_of(self, step: int, rank: int = 0, world: int = 1) -> list[Place]:
        """The samples of a step that a process takes."""
        return [place for lane in self.lanes_of(rank, world) for place in self.lane(lane, step)]


@dataclass(frozen=True)
class _Drawn:
    """An epoch's sequence."""

    epoch: int
    blocks: NDArray[np.int64]
    ends: NDArray[np.int64]
    """Where each of `blocks` ends in the sequence."""


class _Epochs:
    """One dataset over its lanes, epoch after epoch without a gap.

    Its n-th sample of all training belongs to epoch n // samples. Batches do not divide an epoch:
    the first samples of its sequence complete the batch that the epoch before began, the last ones
    begin a batch that the next epoch completes, and what lies between is whole batches in lanes.
    """

    def __init__(
        self,
        key: int,
        first_block: int,
        first: NDArray[np.int64],
        size: NDArray[np.int64],
        lanes: int,
        share: int,
    ) -> None:
        self.samples = int(size.sum())
        self.lanes = lanes
        self.batch = lanes * share
        """Samples that this dataset gives to a batch."""
        self.blocks = range(first_block, first_block + len(size))
        self._share = share
        self._key = key
        self._first_block = first_block
        self._first = first
        self._size = size
        self._held: tuple[_Drawn, ...] = ()

    def lane(self, lane: int, step: int) -> list[Place]:
        """See `Order.lane`; `lane` counts from this dataset's first."""
        epoch, begun = divmod(step * self.batch, self.samples)
        if begun + self.batch > self.samples:  # a batch at the border: lanes side by side
            start = begun + lane * self._share
        else:
            turn, head = divmod(begun, self.batch)
            turns = (self.samples - head) // self.batch
            start = head + (lane * turns + turn) * self._share
        # As no batch is larger than the dataset, it reaches into the next epoch at most.
        here = min(max(self.samples - start, 0), self._share)
        places = self._places(epoch, start, start + here)
        if here < self._share:
            start = max(start - self.samples, 0)
            places += self._places(epoch + 1, start, start + self._share - here)
        return places

    def _places(self, epoch: int, start: int, end: int) -> list[Place]:
        """Positions `start` to `end - 1` of an epoch's sequence."""
        drawn = self._sequence(epoch)
        places = []
        position = int(np.searchsorted(drawn.ends, start, side="right"))
        for place in range(start, end):
            while drawn.ends[position] <= place:
                position += 1
            block = int(drawn.blocks[position])
            size = int(self._size[block])
            within = _shuffled(self._key, epoch, block, size)
            sample = int(self._first[block]) + int(within[place - int(drawn.ends[position]) + size])
            places.append(Place(epoch, self._first_block + block, sample))
        return places

    def _sequence(self, epoch: int) -> _Drawn:
        for drawn in self._held:
            if drawn.epoch == epoch:
                return drawn
        blocks = _random(self._key, epoch, 0).permutation(len(self._size))
        drawn = _Drawn(epoch, blocks, np.cumsum(self._size[blocks]))
        self._held = (drawn, *self._held[:1])
        return drawn


@lru_cache(maxsize=8192)
def _shuffled(key: int, epoch: int, block: int, size: int) -> NDArray[np.int64]:
    return _random(key, epoch, 1 + block).permutation(size)


def _random(key: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[key, epoch], counter=[0, stream, 0, 0]))


def _blocks(
    shard: NDArray[np.int32], block_samples: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First row and size of every block; a block never crosses the end of a shard."""
    starts = np.flatnonzero(np.diff(shard, prepend=-1))
    ends = np.append(starts[1:], len(shard))
    first = np.concatenate(
        [np.arange(a, b, block_samples) for a, b in zip(starts, ends, strict=True)]
    )
    return first, np.diff(np.append(first, len(shard)))

"""Which sample when: a pure function of (seed, dataset, lanes, batch, step).

An epoch permutes the blocks, shuffles the samples inside each, and lays all of them end to end. The
first N // batch batches' worth of that sequence is cut into equal lanes; a batch takes the next few
samples of every lane. Neither the number of processes nor that of threads appears: they decide
only who reads which lane. A position in training is therefore one integer, the step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.index import DatasetError, Index


@dataclass(frozen=True)
class Place:
    """One sample's turn."""

    epoch: int
    block: int
    sample: int
    """Row of the index."""


class Order:
    """The order of samples of one training run.

    Every epoch takes each sample at most once and leaves out fewer than `batch` of them, other ones
    each time. Raises `DatasetError` if there is no whole batch, `ValueError` if `lanes` does not
    divide `batch`.
    """

    def __init__(
        self, index: Index, *, seed: int, batch: int, lanes: int, block_samples: int
    ) -> None:
        if batch % lanes:
            raise ValueError(f"lanes ({lanes}) must divide the batch ({batch})")
        if len(index) < batch:
            raise DatasetError(
                f"the dataset has {len(index)} samples, fewer than one batch of {batch}; "
                "lower train.batch"
            )
        self.batch = batch
        self.lanes = lanes
        self.share = batch // lanes
        """Samples that one lane gives to a batch."""
        self.steps_per_epoch = len(index) // batch
        self.first, self.size = _blocks(index.shard, block_samples)
        key = hashlib.sha256(f"{index.fingerprint}/{seed}".encode()).digest()
        self._key = int.from_bytes(key[:8], "little")
        self._remember()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is remembered: a copy in another process draws it again."""
        return {k: v for k, v in vars(self).items() if k not in ("_sequence", "_within")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    def _remember(self) -> None:
        self._sequence = lru_cache(maxsize=2)(self._draw_sequence)
        self._within = lru_cache(maxsize=4 * self.lanes)(self._draw_within)

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def lane(self, lane: int, step: int) -> list[Place]:
        """The `share` samples that a lane gives to the batch of a step, in their order."""
        epoch, turn = divmod(step, self.steps_per_epoch)
        start = (lane * self.steps_per_epoch + turn) * self.share
        blocks, ends = self._sequence(epoch)
        places = []
        position = int(np.searchsorted(ends, start, side="right"))
        for place in range(start, start + self.share):
            while ends[position] <= place:
                position += 1
            block = int(blocks[position])
            offset = place - (int(ends[position]) - int(self.size[block]))
            sample = int(self.first[block]) + int(self._within(epoch, block)[offset])
            places.append(Place(epoch, block, sample))
        return places

    def lanes_of(self, rank: int, world: int) -> range:
        """The lanes that a process reads; ranks in order make up the batch in order."""
        if self.lanes % world:
            raise ValueError(f"the number of processes ({world}) must divide lanes ({self.lanes})")
        each = self.lanes // world
        return range(rank * each, (rank + 1) * each)

    def batch_of(self, step: int, rank: int = 0, world: int = 1) -> list[Place]:
        """The samples of a step that a process takes."""
        return [place for lane in self.lanes_of(rank, world) for place in self.lane(lane, step)]

    def _draw_sequence(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Blocks in the epoch's order, and where each ends in the epoch's sequence."""
        blocks = self._random(epoch, 0).permutation(len(self.first))
        return blocks, np.cumsum(self.size[blocks])

    def _draw_within(self, epoch: int, block: int) -> NDArray[np.int64]:
        return self._random(epoch, 1 + block).permutation(int(self.size[block]))

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(key=[self._key, epoch], counter=[0, stream, 0, 0])
        )


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

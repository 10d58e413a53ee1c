"""Batches of a packed dataset, from any step on, made by threads ahead of the one who needs them.

Threads suffice: reading, decoding and scaling release Python's lock. Pictures travel as bytes and
are normalised where the model runs.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray

from train.data import decode
from train.data.blocks import Block, read_block
from train.data.index import DatasetError, Index
from train.data.order import Order, Place

log = logging.getLogger(__name__)

Tokenize = Callable[[str], NDArray[np.int64]]
"""A text to its token ids, [context]."""


@dataclass(frozen=True)
class Batch:
    """What one process gets of one step's batch."""

    step: int
    image: torch.Tensor
    """uint8 [batch, 3, height, width]."""
    tokens: torch.Tensor
    """int64 [batch, context]."""
    uid: list[str]
    """Identifiers of the samples, hexadecimal."""
    substituted: int
    """How many samples stand in for one that could not be decoded."""


@dataclass(frozen=True)
class _Sample:
    row: int
    pixels: decode.Pixels
    tokens: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes + self.tokens.nbytes


class Loader:
    """Batches by step. What a batch holds depends on the order, the seed and the step alone.

    A sample that cannot be decoded, or whose checksum is another, is replaced by the next one of
    its block that is whole, and counted.
    `rank` and `world` choose this process's lanes; `workers` and `cache_bytes` only the speed.
    """

    def __init__(
        self,
        index: Index,
        order: Order,
        tokenize: Tokenize,
        *,
        image_size: int,
        seed: int,
        margin: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
        prefetch: int = 2,
        cache_bytes: int = 0,
    ) -> None:
        self.index = index
        self.order = order
        self._tokenize = tokenize
        self._side = image_size
        self._short_side = image_size + margin
        self._seed = seed
        self._lanes = order.lanes_of(rank, world)
        self._workers = min(workers, len(self._lanes))
        self._prefetch = prefetch
        self._blocks: dict[int, Block] = {}  # of each lane, the block it is in
        self._cache: dict[int, _Sample] = {}
        self._cache_room = cache_bytes
        self._damaged: set[int] = set()
        self._lock = Lock()

    def batches(self, first: int, last: int) -> Generator[Batch]:
        """The batches of steps `first` to `last - 1`; closing the iterator ends its threads."""
        ahead: deque[Future[Batch]] = deque()
        maker = ThreadPoolExecutor(1, "batches")
        decoders = ThreadPoolExecutor(self._workers, "decode")
        try:
            for step in range(first, last):
                while step + len(ahead) < min(last, step + 1 + self._prefetch):
                    ahead.append(maker.submit(self._make, step + len(ahead), decoders))
                yield ahead.popleft().result()
        finally:
            maker.shutdown(cancel_futures=True)
            decoders.shutdown(cancel_futures=True)

    def _make(self, step: int, decoders: ThreadPoolExecutor) -> Batch:
        share = self.order.share
        count = share * len(self._lanes)
        pixels = np.empty((count, self._side, self._side, 3), np.uint8)
        tokens: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * count
        uids = [""] * count

        def fill(worker: int) -> int:
            substituted = 0
            for position in range(worker, len(self._lanes), self._workers):
                lane = self._lanes[position]
                for i, place in enumerate(self.order.lane(lane, step), position * share):
                    sample = self._decodable(lane, place)
                    high, low = self.index.uid[sample.row]
                    pixels[i] = decode.random_crop(
                        sample.pixels,
                        self._side,
                        seed=self._seed,
                        epoch=place.epoch,
                        uid=(int(high), int(low)),
                    )
                    tokens[i] = sample.tokens
                    uids[i] = self.index.name(sample.row)
                    substituted += sample.row != place.sample
            return substituted

        substituted = sum(decoders.map(fill, range(self._workers)))
        # Channels last in memory, [batch, 3, height, width] in shape: the layout convolutions want.
        image = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return Batch(step, image, torch.from_numpy(np.stack(tokens)), uids, substituted)

    def _decodable(self, lane: int, place: Place) -> _Sample:
        first, size = int(self.order.first[place.block]), int(self.order.size[place.block])
        for distance in range(size):
            row = first + (place.sample - first + distance) % size
            if (sample := self._sample(lane, place.block, row)) is not None:
                return sample
        path = self.index.shards[int(self.index.shard[first])]
        raise DatasetError(
            f"{path}: none of {size} samples from {self.index.name(first)} on can be decoded; "
            "`verify` finds damaged shards"
        )

    def _sample(self, lane: int, block: int, row: int) -> _Sample | None:
        if row in self._damaged:
            return None
        if (sample := self._cache.get(row)) is not None:
            return sample
        if (held := self._blocks.get(lane)) is None or held.number != block:
            held = self._blocks[lane] = read_block(self.index, self.order, block)
        index = self.index
        image = held.cut(int(index.image_offset[row]), int(index.image_bytes[row]))
        text = held.cut(int(index.text_offset[row]), int(index.text_bytes[row]))
        try:
            if not index.intact(row, image, text):
                raise decode.Undecodable("its bytes are not those of its checksum")
            tokens = self._tokens(row, text)
            sample = _Sample(row, decode.decode(image, self._short_side), tokens)
        except decode.Undecodable as error:
            log.warning("sample %s is replaced: %s", index.name(row), error)
            self._damaged.add(row)
            return None
        with self._lock:
            if sample.nbytes <= self._cache_room:
                self._cache_room -= sample.nbytes
                self._cache[row] = sample
        return sample

    def _tokens(self, row: int, data: memoryview) -> NDArray[np.int64]:
        try:
            return self._tokenize(self.index.text(row, data))
        except ValueError as error:
            raise decode.Undecodable(f"no text: {error}") from None

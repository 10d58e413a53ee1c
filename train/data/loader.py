"""Batches of a packed dataset, from any step on, made by worker processes ahead of their use.

Pictures travel as bytes and are normalised where the model runs. What a batch holds depends on the
dataset, the settings and the step, never on how many processes made it.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from train.data.decode import MAX_PIXELS
from train.data.index import DatasetError, Index
from train.data.order import Order
from train.data.parts import Made, Maker, Recipe
from train.data.removed import LOOK_EVERY_S
from train.data.slots import Bytes, Layout
from train.data.tokenizer import Tokenizer
from train.data.workers import Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What one process gets of one step's batch.

    The tensors share memory with the loader, which uses it again once nobody refers to them: copies
    to a GPU must be finished before a batch is let go.
    """

    step: int
    image: torch.Tensor
    """uint8 [batch, 3, height, width], channels last in memory."""
    tokens: torch.Tensor
    """int64 [batch, context]."""
    uid: list[str]
    """Identifiers of the samples, hexadecimal."""
    substituted: int
    """How many samples stand in for one that could not be decoded, or was removed."""
    damaged: list[str]
    """Identifiers of the samples that were met and could not be decoded, each once."""
    removed: int = 0
    """How many samples stand in for one that was removed from the dataset; `substituted` too."""


class Lost:
    """The distinct samples that could not be decoded, each logged when it is first met.

    `add` raises `DatasetError` once they are more than `max_lost` of all `samples`.
    """

    def __init__(self, samples: int, max_lost: float) -> None:
        self.samples = samples
        self.max_lost = max_lost
        self.uids: set[str] = set()

    def add(self, damaged: Iterable[tuple[str, str]]) -> None:
        """Count samples by (identifier, what is wrong with it)."""
        for uid, reason in damaged:
            if uid not in self.uids:
                self.uids.add(uid)
                log.warning("sample %s is replaced: %s", uid, reason)
        if len(self.uids) > self.max_lost * self.samples:
            raise DatasetError(
                f"{len(self.uids)} of {self.samples} samples could not be decoded by now, more "
                f"than train.data.max_lost allows ({self.max_lost:g} of all); `verify` finds "
                "damaged shards, the log names the samples"
            )


class Loader:
    """Batches by step. What a batch holds depends on the order, the seed and the step alone.

    A sample that cannot be decoded, or was removed, is replaced by the next one of its block that
    can be used. `rank` and `world` choose this process's lanes; `workers` (0: this process itself,
    when a batch is asked for), `prefetch`, `cache_bytes` and `pinned` (page-locked memory for a
    GPU) only the speed. Every `look_every_s` seconds it looks whether more samples were removed.

    Memory: `prefetch` + 2 batches of 150 kB a sample at 224 pixels, and one block of every lane.
    """

    def __init__(
        self,
        index: Index,
        order: Order,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        seed: int,
        margin: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        cache_bytes: int = 0,
        pinned: bool = False,
        max_pixels: int = MAX_PIXELS,
        max_lost: float = 1.0,
        worker_timeout_s: float = 300.0,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self.lost = Lost(len(index), max_lost)
        self._index = index
        short_side = image_size + margin
        self._recipe = Recipe(
            index, order, tokenizer, image_size, short_side, seed, max_pixels, look_every_s
        )
        self._lanes = order.lanes_of(rank, world)
        self._layout = Layout(order.share * len(self._lanes), tokenizer.context_length, image_size)
        self._workers = workers
        self._prefetch = prefetch
        self._cache_bytes = cache_bytes
        self._pinned = pinned
        self._timeout_s = worker_timeout_s
        self._maker = Maker(self._recipe, 0 if workers else cache_bytes)

    def batches(self, first: int, last: int) -> Generator[Batch]:
        """The batches of steps `first` to `last - 1`; closing the iterator ends its processes."""
        return self._by_workers(first, last) if self._workers else self._inline(first, last)

    def _inline(self, first: int, last: int) -> Generator[Batch]:
        share = self._recipe.order.share
        positions = range(0, share * len(self._lanes), share)
        for step in range(first, last):
            memory = np.zeros(self._layout.nbytes, np.uint8)
            made = self._maker.fill(step, self._lanes, positions, self._layout.slot(memory))
            yield self._batch(step, memory, [made])

    def _by_workers(self, first: int, last: int) -> Generator[Batch]:
        free: deque[int] = deque()
        used = 0
        ahead: deque[tuple[int, int]] = deque()
        with Workers(
            self._recipe,
            self._lanes,
            self._layout,
            count=self._workers,
            timeout_s=self._timeout_s,
            cache_bytes=self._cache_bytes,
        ) as workers:
            for step in range(first, last):
                while step + len(ahead) < min(last, step + 1 + self._prefetch):
                    if free:
                        slot = free.popleft()
                    else:
                        slot, used = used, used + 1
                        if self._pinned:
                            _pin(workers.slots.memory(slot))
                    workers.ask(step + len(ahead), slot)
                    ahead.append((step + len(ahead), slot))
                asked, slot = ahead.popleft()
                assert asked == step
                made = workers.take(step)
                # A view of its own, which lives as long as the storage of the batch's tensors.
                memory = workers.slots.memory(slot).view()
                weakref.finalize(memory, free.append, slot).atexit = False
                yield self._batch(step, memory, made)
                del memory

    def _batch(self, step: int, memory: Bytes, made: Sequence[Made]) -> Batch:
        layout = self._layout
        whole = torch.from_numpy(memory)
        tokens = whole[layout.tokens_at : layout.pixels_at].view(torch.int64)
        pixels = whole[layout.pixels_at :][: layout.batch * layout.side * layout.side * 3]
        # Channels last in memory, [batch, 3, height, width] in shape: the layout convolutions want.
        image = pixels.view(layout.batch, layout.side, layout.side, 3).permute(0, 3, 1, 2)
        rows = layout.slot(memory).rows
        names = self._index.uid[rows].astype(">u8").tobytes().hex()
        damaged = {
            self._index.name(damage.row): damage.reason
            for part in made
            for damage in part.damaged.values()
        }
        self.lost.add(damaged.items())
        return Batch(
            step,
            image,
            tokens.view(layout.batch, layout.context),
            [names[start : start + 32] for start in range(0, len(names), 32)],
            sum(part.substituted for part in made),
            sorted(damaged),
            sum(part.removed for part in made),
        )


def _pin(memory: Bytes) -> None:
    """Lock a slot's pages while it is mapped, so that a GPU can copy from them by itself."""
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
    released = weakref.finalize(memory, runtime.cudaHostUnregister, memory.ctypes.data)
    released.atexit = False

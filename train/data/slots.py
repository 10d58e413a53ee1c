"""Memory that batches are made in, shared with other processes and known to no file system.

Its pages belong to an anonymous file (memfd_create(2)): gone with the last process that has it
open, however that ends, and not counted against the size of /dev/shm.
"""

from __future__ import annotations

import mmap
import os
import pickle
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 64  # bytes: a cache line

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Slot:
    """One process's part of one batch, as arrays over its memory."""

    rows: NDArray[np.int64]
    """[batch]: rows of the index."""
    tokens: NDArray[np.int64]
    """[batch, context]."""
    pixels: NDArray[np.uint8]
    """[batch, side, side, 3]."""


@dataclass(frozen=True)
class Layout:
    """Where a slot's arrays lie."""

    batch: int
    context: int
    side: int

    @property
    def tokens_at(self) -> int:
        """Offset of the token ids, bytes."""
        return self.batch * 8

    @property
    def pixels_at(self) -> int:
        """Offset of the pixels, bytes."""
        return self.tokens_at + self.batch * self.context * 8

    @property
    def nbytes(self) -> int:
        """Size of a slot in whole pages, as mmap(2) wants it."""
        size = self.pixels_at + self.batch * self.side * self.side * 3
        return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY

    def slot(self, memory: Bytes) -> Slot:
        """The arrays over `memory`, uint8 [nbytes]."""
        pixels = memory[self.pixels_at :][: self.batch * self.side * self.side * 3]
        return Slot(
            memory[: self.tokens_at].view(np.int64),
            memory[self.tokens_at : self.pixels_at].view(np.int64).reshape(self.batch, -1),
            pixels.reshape(self.batch, self.side, self.side, 3),
        )


class Slots:
    """Any number of slots, in a file that grows as they are first used."""

    def __init__(self, layout: Layout, descriptor: int) -> None:
        self.layout = layout
        self.descriptor = descriptor
        self._mapped: dict[int, Bytes] = {}

    def memory(self, number: int) -> Bytes:
        """A slot's memory, uint8 [layout.nbytes]; zeros at first."""
        if (found := self._mapped.get(number)) is None:
            size = self.layout.nbytes
            if os.fstat(self.descriptor).st_size < (number + 1) * size:
                os.ftruncate(self.descriptor, (number + 1) * size)
            mapped = mmap.mmap(self.descriptor, size, offset=number * size)
            found = self._mapped[number] = np.frombuffer(mapped, np.uint8)
        return found


Spans = list[tuple[int, int]]
"""Where in a file the parts of something shared begin and end."""


def share(content: object) -> tuple[int, Spans]:
    """Pickle `content` so that `receive` can open it in other processes without copying its arrays.

    Returns the descriptor of an anonymous file with all of it, and what to send along with it.
    """
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(content, protocol=5, buffer_callback=arrays.append)
    parts = [memoryview(head), *(array.raw() for array in arrays)]
    spans: Spans = []
    end = 0
    for part in parts:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + part.nbytes
        spans.append((start, end))
    descriptor = os.memfd_create("openwit-recipe")
    os.ftruncate(descriptor, end)
    with mmap.mmap(descriptor, end) as mapped:
        for part, (start, end) in zip(parts, spans, strict=True):
            mapped[start:end] = part
    return descriptor, spans


def receive(descriptor: int, spans: Spans) -> object:
    """What `share` was given; its arrays are read-only and lie in the shared memory."""
    mapped = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    head, *arrays = (mapped[start:end] for start, end in spans)
    return pickle.loads(head, buffers=arrays)

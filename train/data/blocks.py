"""Blocks of consecutive samples, each read from its shard with one ranged read."""

from __future__ import annotations

import os
from dataclasses import dataclass

from train.data.index import DatasetError, Index
from train.data.order import Order


@dataclass(frozen=True)
class Block:
    """The bytes of a block's samples as they lie in the shard."""

    number: int
    offset: int
    """Of its first byte in the shard."""
    data: memoryview

    def cut(self, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset` of the shard."""
        start = offset - self.offset
        return self.data[start : start + size]


def read_block(index: Index, order: Order, number: int) -> Block:
    """Read all of a block. Raises `DatasetError` if the shard is gone or too short."""
    first = int(order.first[number])
    last = first + int(order.size[number]) - 1
    start = int(index.offset[first])
    size = int(index.offset[last] + index.length[last]) - start
    path = index.shards[int(index.shard[first])]
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        data = bytearray(size)
        filled = 0
        # A network file system may return less than it was asked for.
        while filled < size:
            count = os.preadv(descriptor, [memoryview(data)[filled:]], start + filled)
            if not count:
                raise DatasetError(
                    f"{path}: ends at byte {start + filled}, but the index places samples up to "
                    f"{start + size}; `verify` finds damaged shards"
                )
            filled += count
    finally:
        os.close(descriptor)
    return Block(number, start, memoryview(data).toreadonly())

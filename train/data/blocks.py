"""Blocks of consecutive samples, each read from its shard with one ranged read."""

from __future__ import annotations

from dataclasses import dataclass

from train.data import storage
from train.data.index import Index
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
    """Read all of a block. Raises `DatasetError` naming the shard if it is gone or too short."""
    first = int(order.first[number])
    last = first + int(order.size[number]) - 1
    start = int(index.offset[first])
    size = int(index.offset[last] + index.length[last]) - start
    address = index.shards[int(index.shard[first])]
    data = storage.read(address, start, size, timeout_s=index.read_timeout_s)
    return Block(number, start, data)

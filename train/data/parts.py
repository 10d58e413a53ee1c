"""One part of a batch: the samples that some lanes give to a step, decoded into place.

A part is a pure function of the recipe, the step and the lanes. Whoever makes it keeps blocks and
pictures at hand, but has no state to lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from train.data import decode
from train.data.blocks import Block, read_block
from train.data.index import DatasetError, Index
from train.data.order import Order, Place
from train.data.removed import LOOK_EVERY_S, Removed
from train.data.slots import Slot
from train.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Recipe:
    """All that decides what a batch holds."""

    index: Index
    order: Order
    tokenizer: Tokenizer
    image_size: int
    """Side of the square pictures, pixels."""
    short_side: int
    """Pictures are resized to this shorter side before the square is cropped."""
    seed: int
    max_pixels: int
    look_every_s: float = LOOK_EVERY_S
    """How often to look whether more samples were removed."""


@dataclass(frozen=True)
class Damage:
    """A sample that has no usable picture or text."""

    row: int
    reason: str


@dataclass(frozen=True)
class _Sample:
    row: int
    pixels: decode.Pixels
    tokens: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes + self.tokens.nbytes


class Maker:
    """Makes parts of batches. A sample that cannot be decoded, whose checksum is another, or that
    was removed is replaced by the next one of its block that is whole; where all of a block was
    removed, by one of the block after it.

    Holds one block of each lane, and up to `cache_bytes` of decoded pictures.
    """

    def __init__(self, recipe: Recipe, cache_bytes: int = 0) -> None:
        self.recipe = recipe
        self._blocks: dict[int, Block] = {}  # of each lane, the block it is in
        self._damaged: dict[int, Damage] = {}
        self._cache: dict[int, _Sample] = {}
        self._cache_room = cache_bytes
        index = recipe.index
        self._removed = Removed(
            index.removed_at, timeout_s=index.read_timeout_s, every_s=recipe.look_every_s
        )

    def fill(self, step: int, lanes: Sequence[int], first: Sequence[int], slot: Slot) -> Made:
        """Write the samples of `lanes` into the slot, each lane's from its position in `first`."""
        recipe = self.recipe
        self._removed.look()
        made = Made()
        for lane, start in zip(lanes, first, strict=True):
            for position, place in enumerate(recipe.order.lane(lane, step), start):
                sample = self._usable(lane, place, position, slot, made)
                high, low = recipe.index.uid[sample.row]
                decode.random_crop(
                    sample.pixels,
                    recipe.short_side,
                    slot.pixels[position],
                    seed=recipe.seed,
                    epoch=place.epoch,
                    uid=(int(high), int(low)),
                )
                slot.tokens[position] = sample.tokens
                made.substituted += sample.row != place.sample
        return made

    def _usable(self, lane: int, place: Place, position: int, slot: Slot, made: Made) -> _Sample:
        """The sample at its place, or the one that stands in for it."""
        order, index = self.recipe.order, self.recipe.index
        start = place.sample - int(order.first[place.block])
        for block in order.blocks_from(place.block):
            first, size = int(order.first[block]), int(order.size[block])
            removed = 0
            for distance in range(size):
                row = first + (start + distance) % size
                if index.uid[row] in self._removed:
                    removed += 1
                    made.removed += row == place.sample
                    continue
                # Written before it is tried: should the decoder crash, it names the culprit.
                slot.rows[position] = row
                if (sample := self._sample(lane, block, row)) is not None:
                    return sample
                made.damaged[row] = self._damaged[row]
            if removed < size:
                path = index.shards[int(index.shard[first])]
                raise DatasetError(
                    f"{path}: none of {size - removed} samples from {index.name(first)} on can be "
                    "decoded; `verify` finds damaged shards"
                )
        name = index.part(place.sample).name
        raise DatasetError(f"{name}: all its samples are removed; there is nothing to train on")

    def _sample(self, lane: int, block: int, row: int) -> _Sample | None:
        if row in self._damaged:
            return None
        if (sample := self._cache.get(row)) is not None:
            return sample
        recipe, index = self.recipe, self.recipe.index
        if (held := self._blocks.get(lane)) is None or held.number != block:
            held = self._blocks[lane] = read_block(index, recipe.order, block)
        image = held.cut(int(index.image_offset[row]), int(index.image_bytes[row]))
        text = held.cut(int(index.text_offset[row]), int(index.text_bytes[row]))
        try:
            if not index.intact(row, image, text):
                raise decode.Undecodable("its bytes are not those of its checksum")
            tokens = recipe.tokenizer(_text(index, row, text))
            pixels = decode.decode_scaled(image, recipe.short_side, recipe.max_pixels)
            sample = _Sample(row, pixels, tokens)
        except decode.Undecodable as error:
            self._damaged[row] = Damage(row, str(error))
            return None
        if sample.nbytes <= self._cache_room:
            self._cache_room -= sample.nbytes
            self._cache[row] = sample
        return sample


@dataclass
class Made:
    """What is to be said about a part, beside what is in the slot."""

    substituted: int = 0
    """Samples that stand in for another."""
    removed: int = 0
    """Of those, the ones that stand in for a sample that was removed from the dataset."""
    damaged: dict[int, Damage] = field(default_factory=dict)
    """Those that were met, by row."""


def _text(index: Index, row: int, data: memoryview) -> str:
    try:
        return index.text(row, data)
    except ValueError as error:
        raise decode.Undecodable(f"no text: {error}") from None

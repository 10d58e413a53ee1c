"""The order of samples: exact, elastic, and a function of the step alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.index import DatasetError, Index
from train.data.order import Order


def _index(sizes: list[int], fingerprint: str = "dataset") -> Index:
    shard = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    count = len(shard)
    zeros = np.zeros(count, np.int64)
    uid = np.arange(2 * count, dtype=np.uint64).reshape(-1, 2)
    shards = tuple(Path(f"{number:05d}.tar") for number in range(len(sizes)))
    return Index(fingerprint, shards, shard, uid, zeros, zeros, zeros, zeros, zeros, zeros)


def _order(
    sizes: list[int],
    *,
    seed: int = 1,
    batch: int = 16,
    lanes: int = 8,
    block: int = 5,
    fingerprint: str = "dataset",
) -> Order:
    index = _index(sizes, fingerprint)
    return Order(index, seed=seed, batch=batch, lanes=lanes, block_samples=block)


def test_every_world_size_makes_the_same_batches() -> None:
    order = _order([31, 17, 40])
    for step in (0, 3, order.steps_per_epoch - 1, order.steps_per_epoch, 57):
        alone = order.batch_of(step)
        for world in (2, 4, 8):
            other = _order([31, 17, 40])  # no history: an order made for this step alone
            parts = [other.batch_of(step, rank, world) for rank in range(world)]
            assert [place for part in parts for place in part] == alone
            assert len({len(part) for part in parts}) == 1


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    lanes=st.sampled_from([1, 2, 4]),
    share=st.integers(1, 4),
    block=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_an_epoch_takes_each_sample_at_most_once_and_nearly_all(
    sizes: list[int], lanes: int, share: int, block: int, seed: int
) -> None:
    batch = lanes * share
    if sum(sizes) < batch:
        return
    order = _order(sizes, seed=seed, batch=batch, lanes=lanes, block=block)
    for epoch in (0, 1):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        places = [place for step in steps for place in order.batch_of(step)]
        assert {place.epoch for place in places} == {epoch}
        counts = Counter(place.sample for place in places)
        assert max(counts.values()) == 1
        assert len(counts) == sum(sizes) // batch * batch
        for place in places:
            first = order.first[place.block]
            assert first <= place.sample < first + order.size[place.block]


def test_left_out_samples_differ_from_epoch_to_epoch() -> None:
    order = _order([45], batch=16, lanes=4, block=3)
    seen: set[int] = set()
    for step in range(8 * order.steps_per_epoch):
        seen |= {place.sample for place in order.batch_of(step)}
    assert seen == set(range(45))


def test_seed_epoch_and_dataset_each_change_the_order() -> None:
    order = _order([64])
    first = order.batch_of(0)
    samples = [place.sample for place in first]
    assert samples != [place.sample for place in _order([64], seed=2).batch_of(0)]
    assert samples != [place.sample for place in _order([64], fingerprint="x").batch_of(0)]
    assert samples != [place.sample for place in order.batch_of(order.steps_per_epoch)]
    assert first == _order([64]).batch_of(0)


def test_blocks_end_where_shards_end() -> None:
    order = _order([7, 5], batch=4, lanes=2, block=5)
    assert order.first.tolist() == [0, 5, 7]
    assert order.size.tolist() == [5, 2, 5]


def test_a_dataset_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"lower train\.batch"):
        _order([15])
    with pytest.raises(ValueError, match="divide"):
        _order([64], lanes=5)
    with pytest.raises(ValueError, match="divide"):
        _order([64]).lanes_of(0, 3)

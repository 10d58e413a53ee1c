"""The order of samples: exact, elastic, and a function of the step alone."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.index import DatasetError, Index
from train.data.order import Order


def index_of(sizes: list[int], fingerprint: str = "dataset") -> Index:
    shard = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    count = len(shard)
    zeros = np.zeros(count, np.int64)
    uid = np.arange(2 * count, dtype=np.uint64).reshape(-1, 2)
    shards = tuple(f"{number:05d}.tar" for number in range(len(sizes)))
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
    index = index_of(sizes, fingerprint)
    return Order(index, seed=seed, batch=batch, lanes=lanes, block_samples=block)


def test_every_world_size_makes_the_same_batches() -> None:
    order = _order([31, 17, 40])  # 5.5 batches an epoch: step 5 is at a border
    for step in (0, 3, 5, 6, 57):
        alone = order.batch_of(step)
        for world in (2, 4, 8):
            other = _order([31, 17, 40])  # no history: an order made for this step alone
            parts = [other.batch_of(step, rank, world) for rank in range(world)]
            assert [place for part in parts for place in part] == alone
            assert len({len(part) for part in parts}) == 1


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    lanes=st.sampled_from([1, 2, 4, 8]),
    share=st.integers(1, 4),
    block=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_every_epoch_takes_each_sample_exactly_once(
    sizes: list[int], lanes: int, share: int, block: int, seed: int
) -> None:
    batch, samples = lanes * share, sum(sizes)
    if samples < batch:
        return
    order = _order(sizes, seed=seed, batch=batch, lanes=lanes, block=block)
    steps = -(-4 * samples // batch)
    places = [place for step in range(steps) for place in order.batch_of(step)]
    # The n-th sample of a batch may belong to the next epoch before the last of this one, but no
    # batch lies in three, and four epochs' worth of batches hold four whole epochs.
    assert len(places) == steps * batch
    for step in range(steps):
        epochs = {place.epoch for place in places[step * batch : (step + 1) * batch]}
        assert epochs <= {step * batch // samples, (step * batch + batch - 1) // samples}
    for epoch in range(4):
        counts = Counter(place.sample for place in places if place.epoch == epoch)
        assert len(counts) == samples
        assert set(counts.values()) == {1}
    for place in places:
        first = order.first[place.block]
        assert first <= place.sample < first + order.size[place.block]
    assert order.epochs(steps) == pytest.approx(steps * batch / samples)


def test_any_step_is_found_without_those_before_it() -> None:
    played = _order([31, 17, 40])
    through = [played.batch_of(step) for step in range(30)]
    for step in (29, 11, 5, 0, 16):
        assert _order([31, 17, 40]).batch_of(step) == through[step]
        assert pickle.loads(pickle.dumps(played)).batch_of(step) == through[step]


def test_lanes_read_their_own_blocks_between_borders() -> None:
    order = _order([64], batch=16, lanes=4, block=16)
    blocks = [
        [place.block for place in order.lane(lane, step)] for lane in range(4) for step in range(4)
    ]
    # A quarter of the epoch is one lane's: it stays in one block, and no other lane reads that.
    assert sorted(blocks) == [[block] * 4 for block in range(4) for _ in range(4)]


def test_seed_epoch_and_dataset_each_change_the_order() -> None:
    order = _order([64])
    first = order.batch_of(0)
    samples = [place.sample for place in first]
    assert samples != [place.sample for place in _order([64], seed=2).batch_of(0)]
    assert samples != [place.sample for place in _order([64], fingerprint="x").batch_of(0)]
    assert samples != [place.sample for place in order.batch_of(4)]
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

"""Datasets in one batch: exact proportions, and epochs of their own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ConfigError
from tests.train.data.test_order import index_of
from train.data.index import DatasetError, Index, Part, concatenated
from train.data.mixture import check_weights, lanes_each, shared_out
from train.data.order import Order
from train.settings import DataSettings


def _mixed(**shards: list[int]) -> Index:
    indexes = []
    for name, sizes in shards.items():
        index = index_of(sizes, name)
        indexes.append(replace(index, parts=(Part(name, name, len(index)),)))
    return concatenated(indexes)


def _data(lanes: int, **weights: float | None) -> DataSettings:
    datasets = {name: {"path": name, "weight": weight} for name, weight in weights.items()}
    return DataSettings.model_validate({"lanes": lanes, "datasets": datasets})


@settings(deadline=None)
@given(lanes=st.integers(1, 300), weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_every_dataset_gets_its_quota_within_one_lane(lanes: int, weights: list[float]) -> None:
    shares = shared_out(lanes, weights)
    assert sum(shares) == lanes
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - lanes * weight / sum(weights)) < 1 + 1e-9


def test_the_largest_remainders_get_the_lanes_that_are_left() -> None:
    assert shared_out(10, [1, 1, 1]) == [4, 3, 3]
    assert shared_out(8, [0.7, 0.2, 0.1]) == [6, 1, 1]  # quotas 5.6, 1.6, 0.8
    assert shared_out(4, [9, 1]) == [4, 0]


def test_each_dataset_has_its_part_of_every_batch_and_its_own_exact_epochs() -> None:
    index = _mixed(large=[41, 30], small=[13], middle=[20, 9])
    lanes = lanes_each(index.parts, _data(8, large=5, small=1, middle=2), 16)
    assert lanes == [5, 1, 2]

    def make() -> Order:
        return Order(index, seed=1, batch=16, lanes=8, block_samples=6, lanes_each=lanes)

    order = make()
    rows = {"large": range(71), "small": range(71, 84), "middle": range(84, 113)}
    batches = [order.batch_of(step) for step in range(40)]
    for (name, mine), width in zip(rows.items(), lanes, strict=True):
        counts: Counter[tuple[int, int]] = Counter()
        for batch in batches:
            places = [place for place in batch if place.sample in mine]
            assert len(places) == 2 * width
            counts.update((place.epoch, place.sample) for place in places)
        assert set(counts.values()) == {1}
        for epoch in range(40 * 2 * width // len(mine)):
            assert all((epoch, row) in counts for row in mine), (name, epoch)
    for place in (place for batch in batches for place in batch):
        assert order.first[place.block] <= place.sample
        assert place.sample < order.first[place.block] + order.size[place.block]
    assert order.epochs(71) == pytest.approx(10)  # of the one with five lanes: 10 of 71 a batch
    for world in (2, 4, 8):
        for step in (3, 17):
            parts = [make().batch_of(step, rank, world) for rank in range(world)]
            assert [place for part in parts for place in part] == batches[step]


def test_without_weights_sizes_decide() -> None:
    index = _mixed(a=[30], b=[10])
    assert lanes_each(index.parts, _data(8, a=None, b=None), 16) == [6, 2]
    assert lanes_each(index.parts[:1], _data(8, a=None), 16) == [8]


def test_a_weight_too_small_for_a_lane_says_how_many_would_do() -> None:
    parts = _mixed(a=[90], b=[90]).parts
    with pytest.raises(ConfigError, match=r"datasets\.b: .*less than one of 4 lanes; .*lanes=12"):
        lanes_each(parts, _data(4, a=19, b=1), 24)
    assert lanes_each(parts, _data(12, a=19, b=1), 24) == [11, 1]
    with pytest.raises(ConfigError, match=r"raise train\.batch or the weight"):
        lanes_each(parts, _data(4, a=19, b=1), 8)


def test_weights_are_for_all_or_for_none() -> None:
    with pytest.raises(ConfigError, match=r"datasets\.b\.weight: not set, but other"):
        check_weights(_data(4, a=1, b=None).datasets)


def test_a_dataset_smaller_than_its_part_of_a_batch_is_named() -> None:
    index = _mixed(a=[50], tiny=[7])
    with pytest.raises(DatasetError, match="tiny has 7 samples, fewer than the 8"):
        Order(index, seed=1, batch=16, lanes=8, block_samples=6, lanes_each=[4, 4])


def test_an_index_of_several_keeps_what_each_row_is() -> None:
    one = index_of([3, 2], "one")
    checked = Part("two", "two", 4, caption="json:c", checks="xxh3")
    check = np.arange(4, dtype=np.uint64) + 9
    two = replace(index_of([4], "two"), parts=(checked,), image_check=check, text_check=check)
    both = concatenated([one, two])
    assert len(both) == 9
    assert both.shard.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert [both.part(row).name for row in (0, 4, 5, 8)] == ["the dataset"] * 2 + ["two"] * 2
    assert both.text(4, b"plain") == "plain"
    assert both.text(5, b'{"c": "of a field"}') == "of a field"
    assert both.image_check.tolist() == [0] * 5 + [9, 10, 11, 12]
    assert both.intact(4, b"anything", b"")
    assert not both.intact(5, b"anything", b"")
    assert concatenated([two, one]).fingerprint != both.fingerprint

"""Removed samples are in no batch, at once, and batches stay whole and repeatable."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.conftest import Pack, uid_of
from train.data.index import DatasetError, open_dataset
from train.data.loader import Batch, Loader
from train.data.order import Order
from train.data.removed import ANY, Removed
from train.data.tokenizer import Tokenizer


def _remove(folder: Path, samples: Iterable[int]) -> None:
    temporary = folder / "removed.new"
    temporary.write_text("".join(f"{uid_of(sample).hex()}\n" for sample in samples))
    temporary.replace(folder / "removed.txt")


def _loader(folder: Path, **options: Any) -> Loader:
    index = open_dataset(folder)
    order = Order(index, seed=1, batch=8, lanes=4, block_samples=5)
    options = {"image_size": 24, "seed": 1, "look_every_s": 0.0, "max_lost": 0.0} | options
    return Loader(index, order, Tokenizer(6), **options)


def _uids(batches: Iterable[Batch]) -> Counter[str]:
    return Counter(uid for batch in batches for uid in batch.uid)


@pytest.mark.parametrize("workers", [0, 2])
def test_they_are_in_no_batch_and_the_rest_stays_where_it_was(pack: Pack, workers: int) -> None:
    folder = pack(20)
    before = list(_loader(folder).batches(0, 10))
    gone = [0, 3, 7, 8, 19]
    _remove(folder, gone)
    after = list(_loader(folder, workers=workers).batches(0, 10))
    removed = {uid_of(sample).hex() for sample in gone}
    changed = 0
    for old, new in zip(before, after, strict=True):
        assert len(new.uid) == len(old.uid) == 8
        for was, now in zip(old.uid, new.uid, strict=True):
            assert now not in removed
            assert (was == now) == (was not in removed)
            changed += was in removed
        assert new.substituted == new.removed == sum(uid in removed for uid in old.uid)
        assert new.damaged == []  # they are not lost, and `max_lost` is not about them
    assert changed == 4 * len(gone)


def test_ranks_and_restarts_agree_on_who_stands_in(pack: Pack) -> None:
    folder = pack(13, 12)
    _remove(folder, range(0, 25, 3))
    whole = list(_loader(folder, cache_bytes=1 << 20).batches(0, 9))
    for part in (
        list(_loader(folder).batches(4, 9)),
        list(_loader(folder, workers=1).batches(4, 9)),
    ):
        for one, other in zip(part, whole[4:], strict=True):
            assert one.uid == other.uid
            assert torch.equal(one.image, other.image)
    ranks = [list(_loader(folder, rank=r, world=2).batches(0, 9)) for r in range(2)]
    for batch, *halves in zip(whole, *ranks, strict=True):
        assert batch.uid == [uid for half in halves for uid in half.uid]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_that_goes_on_stops_using_them(pack: Pack, workers: int) -> None:
    folder = pack(20)
    loader = _loader(folder, workers=workers, prefetch=2, cache_bytes=1 << 20)
    batches = loader.batches(0, 60)
    seen = _uids(next(batches) for _ in range(5))
    assert len(seen) == 20
    _remove(folder, range(10))
    for _ in range(2 + 1):  # what is made ahead, and what was being made
        next(batches)
    rest = list(batches)
    gone = {uid_of(sample).hex() for sample in range(10)}
    assert len(_uids(rest)) == 10
    assert not gone & set(_uids(rest))
    assert sum(batch.removed for batch in rest) > 0


def test_a_block_of_which_all_is_removed_is_filled_by_the_next(pack: Pack) -> None:
    folder = pack(7, 8)  # blocks of 5, 2, 5 and 3
    _remove(folder, [*range(5, 7), *range(12, 15)])
    seen = _uids(_loader(folder).batches(0, 15))
    assert set(seen) == {uid_of(n).hex() for n in (*range(5), *range(7, 12))}
    _remove(folder, range(15))
    with pytest.raises(DatasetError, match="all its samples are removed"):
        next(_loader(folder).batches(0, 1))


def test_a_damaged_block_is_an_error_though_others_are_removed(pack: Pack) -> None:
    folder = pack(10, damaged=dict.fromkeys(range(4), b"nothing"))
    _remove(folder, [4])
    with pytest.raises(DatasetError, match="none of 4 samples"):
        list(_loader(folder, max_lost=1.0).batches(0, 2))


def _removed(path: Path) -> Removed:
    return Removed([str(path)], timeout_s=3, every_s=0)


def _uid(sample: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.frombuffer(uid_of(sample), ">u8").astype(np.uint64)


def test_what_was_listed_once_stays_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "removed.txt"
    removed = _removed(path)
    assert _uid(1) not in removed
    _remove(tmp_path, [1, 2, 2])
    removed.look()
    assert len(removed) == 2
    _remove(tmp_path, [3])
    removed.look()
    assert [_uid(sample) in removed for sample in (1, 2, 3, 4)] == [True, True, True, False]
    path.unlink()
    removed.look()
    path.write_text(f"{uid_of(5).hex()}\n{uid_of(6).hex()[:20]}")  # copied by halves
    with caplog.at_level(logging.WARNING):
        removed.look()
    assert f"{path}:2: not the 32 digits" in caplog.text
    assert len(removed) == 3
    with pytest.raises(DatasetError, match=r"removed\.txt:2"):
        _removed(path)
    _remove(tmp_path, [5, 6])
    removed.look()
    assert len(removed) == 5


def test_halves_of_identifiers_are_not_mixed_up(tmp_path: Path) -> None:
    one, two = uid_of(1), uid_of(2)
    (tmp_path / "removed.txt").write_text(f"{one.hex()}\n{two.hex()}\n{(one[:8] + bytes(8)).hex()}")
    removed = _removed(tmp_path / "removed.txt")
    crossed = np.frombuffer(one[:8] + two[8:], ">u8").astype(np.uint64)
    assert _uid(1) in removed
    assert crossed not in removed


def test_it_is_looked_at_no_more_often_than_asked(tmp_path: Path) -> None:
    removed = Removed([str(tmp_path / "removed.txt")], timeout_s=3, every_s=0.3)
    _remove(tmp_path, [1])
    removed.look()
    assert not len(removed)
    time.sleep(0.3)
    removed.look()
    assert len(removed) == 1


def test_it_may_be_behind_an_address(tmp_path: Path) -> None:
    address = f"file://{tmp_path}/removed.txt"
    removed = Removed([address], timeout_s=3, every_s=0)
    assert not len(removed)
    _remove(tmp_path, [1])
    removed.look()
    assert _uid(1) in removed


def test_a_run_has_a_file_for_each_removal(tmp_path: Path) -> None:
    removed = _removed(tmp_path / ANY / "uids.txt")
    private = tmp_path / ".host-12-ab"  # of a process that was ended while it wrote
    private.mkdir()
    (private / "uids.txt").write_text(f"{uid_of(3).hex()}\n{uid_of(4).hex()[:20]}")
    for number in (1, 2):
        folder = tmp_path / f"{number:06d}"
        folder.mkdir()
        (folder / "uids.txt").write_text(f"{uid_of(number).hex()}\n")
        removed.look()
        assert len(removed) == number
    assert _uid(1) in removed

"""Batches: equal however they are made, whole in spite of damaged samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.conftest import Pack, picture, uid_of
from train.data import decode
from train.data.index import DatasetError, open_dataset
from train.data.loader import Batch, Loader
from train.data.order import Order
from train.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer(6)


def _loader(folder: Path, *, lanes: int = 4, **options: Any) -> Loader:
    index = open_dataset(folder)
    order = Order(index, seed=1, batch=8, lanes=lanes, block_samples=5)
    options = {"image_size": 24, "seed": 1, "margin": 4} | options
    return Loader(index, order, TOKENIZER, **options)


def _assert_equal(one: Sequence[Batch], other: Sequence[Batch]) -> None:
    assert [batch.uid for batch in one] == [batch.uid for batch in other]
    for a, b in zip(one, other, strict=True):
        assert a.step == b.step
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.tokens, b.tokens)


def test_shapes_and_contents(pack: Pack) -> None:
    (batch,) = _loader(pack(9, 8)).batches(0, 1)
    assert batch.image.dtype == torch.uint8
    assert batch.image.shape == (8, 3, 24, 24)
    assert batch.tokens.dtype == torch.int64
    assert batch.tokens.shape == (8, 6)
    by_uid = {uid_of(sample).hex(): sample for sample in range(17)}
    for uid, image, tokens in zip(batch.uid, batch.image, batch.tokens, strict=True):
        data, text = picture(by_uid[uid])
        assert tokens.tolist() == TOKENIZER(text).tolist()
        mean = decode.decode(data, 28).mean((0, 1))
        assert np.abs(image.float().mean((1, 2)).numpy() - mean).max() < 8


def test_any_step_is_reached_without_history(pack: Pack) -> None:
    folder = pack(13, 12)
    through = list(_loader(folder).batches(0, 9))
    _assert_equal(list(_loader(folder).batches(4, 9)), through[4:])
    _assert_equal(list(_loader(folder, workers=2).batches(4, 9)), through[4:])


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 1, "prefetch": 1},
        {"workers": 3},
        {"workers": 9, "prefetch": 5},
        {"workers": 2, "cache_bytes": 1 << 20},
        {"cache_bytes": 1 << 20},
    ],
)
def test_speed_settings_change_nothing(pack: Pack, options: dict[str, int]) -> None:
    folder = pack(13, 12)
    _assert_equal(
        list(_loader(folder, **options).batches(0, 9)),
        list(_loader(folder, cache_bytes=3000).batches(0, 9)),
    )


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one_process(pack: Pack, world: int) -> None:
    folder = pack(13, 12)
    alone = list(_loader(folder).batches(2, 5))
    ranks = [
        list(_loader(folder, rank=r, world=world, workers=r % 2).batches(2, 5))
        for r in range(world)
    ]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert whole.uid == [uid for part in parts for uid in part.uid]
        assert torch.equal(whole.image, torch.cat([part.image for part in parts]))


def test_crops_follow_the_epoch_and_the_sample(pack: Pack) -> None:
    folder = pack(8)
    loader = _loader(folder)
    crops: dict[str, set[bytes]] = {}
    for batch in loader.batches(0, 12):  # twelve epochs of one step
        for uid, image in zip(batch.uid, batch.image, strict=True):
            crops.setdefault(uid, set()).add(image.numpy().tobytes())
    assert len(crops) == 8
    assert all(len(seen) > 6 for seen in crops.values())
    other = _loader(folder, seed=2)
    (one,), (two,) = loader.batches(0, 1), other.batches(0, 1)
    assert one.uid == two.uid
    assert not torch.equal(one.image, two.image)


def test_a_damaged_sample_is_replaced_by_its_neighbour_and_counted(
    pack: Pack, caplog: pytest.LogCaptureFixture
) -> None:
    whole = next(_loader(pack(10, name="whole")).batches(0, 1))
    sample = 2  # of the first block, rows 0 to 4
    bad, stand_in = uid_of(sample).hex(), uid_of(sample + 1).hex()
    for name, data in (("torn", picture(sample)[0][:300]), ("alien", b"<html>"), ("none", b"")):
        folder = pack(10, damaged={sample: data}, name=name)
        loader = _loader(folder, cache_bytes=1 << 20)
        batches = list(loader.batches(0, 5))
        counts = Counter(uid for batch in batches for uid in batch.uid)
        assert bad not in counts
        assert counts[stand_in] > len(batches) / 2
        assert 1 <= sum(batch.substituted for batch in batches) <= 5
        _assert_equal(list(_loader(folder, workers=2).batches(3, 5)), batches[3:])
    assert caplog.text.count(f"sample {bad} is replaced") == 6
    assert whole.substituted == 0


def test_a_block_without_any_picture_ends_the_run(pack: Pack) -> None:
    folder = pack(10, damaged=dict.fromkeys(range(5), b"nothing"))
    with pytest.raises(DatasetError, match=r"00000\.tar: none of 5 samples"):
        list(_loader(folder).batches(0, 2))


def test_a_shard_cut_short_is_named(pack: Pack) -> None:
    folder = pack(10)
    shard = folder / "shards" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    with pytest.raises(DatasetError, match=r"00000\.tar: ends at byte 9000"):
        list(_loader(folder).batches(0, 2))


def test_a_missing_shard_is_named(pack: Pack) -> None:
    folder = pack(6, 6)
    (folder / "shards" / "00001.tar").unlink()
    with pytest.raises(DatasetError, match=r"names the shard 00001\.tar"):
        open_dataset(folder)

"""The sampled pictures: deterministic, evenly spaced, small."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from dataset_build.report import pictures
from dataset_build.report.gather import gather
from tests.dataset_build.report.fake_build import STAGES, FakeBuild


def test_samples_are_spread_evenly_and_show_the_packed_bytes(fake_build: FakeBuild) -> None:
    fake_build.through("pack")
    made, sampled, _ = gather(fake_build.run, STAGES)
    numbers = [int(picture.uid[:8], 16) for picture in sampled]
    assert numbers == [i * fake_build.kept // pictures.COUNT for i in range(pictures.COUNT)]
    for number, picture, row in zip(numbers, sampled, made["pictures"], strict=True):
        query = fake_build.selected[number]
        assert picture.caption == f"a picture of query {query} number {number}"
        assert row["selected_by"] == [f"query {query}"]
        data = base64.b64decode(picture.data.partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (48, 36)
    assert gather(fake_build.run, STAGES)[1] == sampled


def test_the_page_stays_small(fake_build: FakeBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_build.picture = 120
    fake_build.through("pack")
    _, large, _ = gather(fake_build.run, STAGES)
    weight = sum(len(picture.data) for picture in large)
    monkeypatch.setattr(pictures, "MAX_BYTES", weight - 1)
    _, small, _ = gather(fake_build.run, STAGES)
    assert len(small) == len(large)
    assert sum(len(picture.data) for picture in small) < weight


def test_what_was_removed_is_not_shown_before_any_file_is_changed(fake_build: FakeBuild) -> None:
    fake_build.through("pack")
    _, before, _ = gather(fake_build.run, STAGES)
    request = fake_build.run.folder / "removed/000001"
    request.mkdir(parents=True)
    (request / "uids.txt").write_text(f"{before[3].uid}\n")
    _, after, _ = gather(fake_build.run, STAGES)
    assert after == [*before[:3], *before[4:]]


def test_a_picture_that_does_not_decode_is_said_to_be_so(fake_build: FakeBuild) -> None:
    fake_build.through("pack")
    (shard,) = (fake_build.run.stage_folder("pack") / "store").glob("*/shards/00000.tar")
    data = bytearray(shard.read_bytes())
    data[512:540] = bytes(28)  # the first picture's beginning
    shard.write_bytes(data)
    _, sampled, _ = gather(fake_build.run, STAGES)
    assert sampled[0].data == ""
    assert all(picture.data for picture in sampled[1:])


def test_long_captions_are_cut(fake_build: FakeBuild) -> None:
    fake_build.captions = ("x" * 5000,)
    fake_build.through("pack")
    _, sampled, _ = gather(fake_build.run, STAGES)
    assert len(sampled[0].caption) == 601

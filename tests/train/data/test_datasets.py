"""Datasets that no build made: opened, kept, noticed when damaged, and trained on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import files
from pipeline.config import ConfigError, MissingInput
from pipeline.manifest import digest
from pipeline.stage import Attempt, Run
from pipeline.stop import StopFlag, Stopped
from tests.train.conftest import TINY_MODEL, Config, Pack, picture
from tests.train.data.conftest import Tars
from train import loop, stages
from train.data import datasets
from train.data.datasets import open_datasets
from train.data.index import DatasetError, Index
from train.settings import TrainSettings

Given = Callable[..., Attempt]


@pytest.fixture
def given(tmp_path: Path) -> Given:
    """An attempt at training on datasets, planned as the stage plans it."""

    def make(
        paths: Mapping[str, Any], *, run: str = "run", stop: StopFlag | None = None, **data: Any
    ) -> Attempt:
        named = {
            name: value if isinstance(value, dict) else {"path": str(value)}
            for name, value in paths.items()
        }
        settings = {
            "seed": 3,
            "samples": 8 * 12,
            "batch": 8,
            "precision": "float32",
            "threads": 1,
            "log_every_steps": 2,
            "model": TINY_MODEL,
            # In this process, which alone has fsspec's memory://.
            "data": {"datasets": named, "lanes": 4, "block_samples": 5, "margin": 2, "workers": 0}
            | data,
        }
        config = Config(train=TrainSettings.model_validate(settings))
        planned = Run(tmp_path / run, config)
        (task,) = stages.TRAIN.plan(planned)
        folder = tmp_path / f"{run}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return Attempt(planned, task, folder, StopFlag() if stop is None else stop)

    return make


def _open(attempt: Attempt, rank: int = 0, world: int = 1) -> Index:
    return open_datasets(attempt, rank, world)


def _kept(attempt: Attempt, name: str = "d") -> dict[str, int]:
    folder = attempt.run.stage_folder("train") / "index" / name
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}


def test_scanned_tars_are_trained_on_and_nothing_is_scanned_twice(
    tars: Tars, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tars(20, 13)
    first = given({"d": folder})
    stats = loop.train(first)
    assert stats.counts["dataset"] == 33
    assert stats.rows_in == 96
    kept = _kept(first)
    assert len(kept) == 1

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("scanned again")

    monkeypatch.setattr(datasets, "scan", never)
    again = given({"d": folder})
    loop.train(again)
    assert _kept(again) == kept
    weights = [a.folder / "model.safetensors" for a in (first, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_where_a_dataset_lies_changes_nothing(tars: Tars, given: Given) -> None:
    folder = tars(20, 13)
    here = _open(given({"d": folder}, run="here"))
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/elsewhere/{path.name}", path.read_bytes())
    moved = folder.rename(folder.parent / "moved")
    named = {
        "moved": moved,
        "glob": f"{moved}/*.tar",
        "braces": f"{moved}/{{00000..00001}}.tar",
        "memory": "memory://elsewhere",
    }
    for run, path in named.items():
        there = _open(given({"d": path}, run=run, checksums=run == "glob"))
        assert there.fingerprint == here.fingerprint, run
        assert (there.uid == here.uid).all()
        assert (there.image_offset == here.image_offset).all()
    # So checkpoints stay good, which are known by the settings' identity and this fingerprint.
    identities = [given({"d": path}).settings.identity() for path in named.values()]
    assert all(identity == identities[0] for identity in identities)
    # Other texts of the same pictures are another dataset.
    json_ = given({"d": {"path": str(moved), "caption": "json:caption"}}, run="json")
    assert _open(json_).fingerprint != here.fingerprint
    loop.train(given({"d": "memory://elsewhere"}, run="memory"))


def test_a_dataset_that_grows_is_scanned_where_it_is_new(
    tars: Tars, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_SHARDS_A_FILE", 2)
    folder = tars(5, 5, 5)
    before = given({"d": folder})
    assert len(_open(before)) == 15
    kept = _kept(before)
    os.link(folder / "00000.tar", folder / "00003.tar")
    after = given({"d": folder})
    index = _open(after)
    assert len(index) == 20
    assert len(index.shards) == 4
    changed = {name for name, time in _kept(after).items() if kept.get(name) != time}
    assert len(changed) == 1
    assert len(_kept(after)) == 2
    with pytest.raises(DatasetError, match="has changed since the start"):
        _open(before)


def test_a_scan_that_is_stopped_goes_on(
    tars: Tars, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_SHARDS_A_FILE", 1)
    folder = tars(4, 4, 4, 4)
    stop = StopFlag()
    stopped = given({"d": folder}, stop=stop)
    real = datasets.scan

    def scan(shard: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        stop.signal = 15 if name == "00002.tar" else None
        return real(shard, name, *args, **kwargs)

    monkeypatch.setattr(datasets, "scan", scan)
    with pytest.raises(Stopped):
        _open(stopped)
    kept = _kept(stopped)
    assert len(kept) == 2
    after = given({"d": folder})
    whole = _open(given({"d": folder}, run="undisturbed"))
    assert _open(after).fingerprint == whole.fingerprint
    assert kept.items() <= _kept(after).items()


def test_processes_share_the_scan_and_agree(
    tars: Tars, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_SHARDS_A_FILE", 1)
    folder = tars(4, 4, 4, 4)
    order: list[str] = []
    real = datasets.scan

    def scan(shard: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        order.append(name)
        return real(shard, name, *args, **kwargs)

    monkeypatch.setattr(datasets, "scan", scan)
    index = _open(given({"d": folder}), 1, 2)
    assert order == ["00002.tar", "00003.tar", "00000.tar", "00001.tar"]
    order.clear()
    assert _open(given({"d": folder}), 0, 2).fingerprint == index.fingerprint
    assert not order


def test_processes_of_its_own_scan_what_one_scans(
    tars: Tars, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tars(6, 5, 4, 3)
    path = folder / "00002.tar"
    path.write_bytes(path.read_bytes()[:2000])
    alone = _open(given({"d": folder}, run="alone", max_broken_shards=1))
    monkeypatch.setattr(datasets, "_AT_ONCE", 0)
    monkeypatch.delattr(datasets, "scan")  # they import it anew, this process must not use it
    monkeypatch.setenv("OPENWIT_PARENT", str(os.getppid()))  # as in a task's process
    several = _open(given({"d": folder}, max_broken_shards=1, workers=2))
    assert several.fingerprint == alone.fingerprint
    assert several.shard.tolist() == alone.shard.tolist()


def test_equal_names_in_two_folders_are_two_shards(
    tars: Tars, given: Given, tmp_path: Path
) -> None:
    (tmp_path / "both").mkdir()
    for name in ("a", "b"):
        tars(4, name=name).rename(tmp_path / "both" / name)
    index = _open(given({"d": f"{tmp_path}/both/*/00000.tar"}))
    assert len({index.name(row) for row in range(8)}) == 8
    (tmp_path / "both").rename(tmp_path / "elsewhere")
    moved = _open(given({"d": f"{tmp_path}/elsewhere/{{a,b}}/*.tar"}))
    assert moved.fingerprint == index.fingerprint


def test_a_broken_tar_is_named_or_left_out_whole(
    tars: Tars, given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tars(10, 10, 10)
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DatasetError, match=r"00001\.tar: broken at byte \d+: .*\n.*at least 1"):
        _open(given({"d": folder}))
    caplog.clear()
    index = _open(given({"d": folder}, max_broken_shards=1))
    assert len(index) == 20
    assert set(index.shard.tolist()) == {0, 2}
    assert caplog.text.count("00001.tar: broken") == 1
    (folder / "00002.tar").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"(?s)00001\.tar: .*00002\.tar: .*at least 2"):
        _open(given({"d": folder}, max_broken_shards=1))


def test_a_dataset_without_usable_samples_says_why(tars: Tars, given: Given) -> None:
    wrong = {"path": str(tars(3)), "caption": "json:alt"}
    with pytest.raises(DatasetError, match=r"no sample with a picture .*'no_text': 3.*\.caption"):
        _open(given({"d": wrong}))
    with pytest.raises(MissingInput, match="/nowhere: no such file"):
        given({"d": "/nowhere"})
    with pytest.raises(ConfigError, match="give all of them a weight"):
        given({"a": {"path": "/x", "weight": 1}, "b": "/y"})


def test_every_flipped_byte_of_a_picture_is_noticed(
    tars: Tars, pack: Pack, given: Given, tmp_path: Path
) -> None:
    packed = pack(6)
    _with_checksums(packed)
    opened = _open(given({"d": tars(6), "p": packed}, checksums=True))
    for row in (0, 7):
        shard = Path(opened.shards[opened.shard[row]]).read_bytes()
        image = bytearray(shard[opened.image_offset[row] :][: opened.image_bytes[row]])
        text = bytearray(shard[opened.text_offset[row] :][: opened.text_bytes[row]])
        assert image.startswith(b"\xff\xd8")
        assert opened.intact(row, image, text)
        for position in range(len(image)):
            image[position] ^= 1 << position % 8
            assert not opened.intact(row, image, text)
            image[position] ^= 1 << position % 8
        text[0] ^= 1
        assert opened.intact(row, image, text) is (row == 7)  # of texts, pack has no checksums


def _with_checksums(packed: Path) -> None:
    import hashlib

    table = pq.read_table(packed / "index.parquet")
    sums = []
    for row in table.to_pylist():
        shard = (packed / "shards" / row["shard"]).read_bytes()
        sums.append(hashlib.sha256(shard[row["image_offset"] :][: row["image_bytes"]]).digest())
    table = table.append_column("sha256", pa.array(sums, pa.binary(32)))
    pq.write_table(table, packed / "index.parquet")
    described: dict[str, object] = {"index": {"sha256": files.sha256(packed / "index.parquet")}}
    described["pairs_by_shard"] = [
        {"name": path.name, "bytes": path.stat().st_size}
        for path in sorted((packed / "shards").iterdir())
    ]
    described["fingerprint"] = digest(described)
    (packed / "dataset.json").write_text(json.dumps(described))


def test_a_picture_damaged_since_the_scan_is_replaced(
    tars: Tars, given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tars(20)
    paths = {"d": folder}
    assert len(_open(given(paths, checksums=True))) == 20
    path = folder / "00000.tar"
    status, data = path.stat(), bytearray(path.read_bytes())
    position = data.index(picture(4)[0]) + len(picture(4)[0]) - 30
    data[position] ^= 1  # a few other pixels: it still decodes
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    stats = loop.train(given(paths, checksums=True, max_lost=0.05))
    assert stats.counts["substituted"] >= 4  # of 96 samples, each of the 20 at least 4 times
    assert "is replaced: its bytes are not those of its checksum" in caplog.text


def test_packed_and_scanned_datasets_are_mixed(
    tars: Tars, pack: Pack, given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    packed = pack(9, 8, name="packed")
    _with_checksums(packed)
    caplog.set_level(logging.INFO)
    mixed = {
        "own": {"path": str(packed), "weight": 3},
        "web": {"path": str(tars(20)), "weight": 1, "caption": "json:caption"},
    }
    attempt = given(mixed)
    stats = loop.train(attempt)
    assert stats.counts["dataset"] == 37
    assert "own: 3 of 4 lanes, 0.75 of every batch" in caplog.text
    metrics = (attempt.run.stage_folder("train") / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["epoch"] == pytest.approx(12 * 6 / 17, rel=1e-4)
    memory = fsspec.filesystem("memory")
    memory.put(str(packed), "/packed", recursive=True)
    here, there = _open(given({"d": packed})), _open(given({"d": "memory://packed"}, run="far"))
    assert (
        there.fingerprint
        == here.fingerprint
        == json.loads((packed / "dataset.json").read_text())["fingerprint"]
    )
    loop.train(given({"d": "memory://packed"}, run="far"))


@pytest.mark.parametrize("part", ["shards", "shards/*.tar", "shards/00000.tar"])
def test_a_part_of_a_packed_dataset_is_refused_for_what_is_removed_from_it(
    pack: Pack, given: Given, part: str
) -> None:
    packed = pack(6, 6)
    with pytest.raises(ConfigError, match=f"name its folder {packed}, else"):
        given({"d": packed / part})
    (packed / "index.parquet").unlink()
    assert len(_open(given({"d": packed / "shards"}))) == 12

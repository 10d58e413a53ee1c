"""A web of labelled pictures: what is held out is nowhere on it."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config import MissingInput, UserError
from pipeline.stage import Run
from sample_web import labelled, scenes
from sample_web.stage import SampleWebSettings

Build = Callable[[Path, SampleWebSettings], Run]
CLASSES = ("airplane", "automobile", "truck")


def archive(folder: Path, each: int = 60) -> Path:
    """A tar of small pictures, three classes; one picture of each class is there twice."""
    path = folder / "toys-train.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in CLASSES:
            for index in range(each):
                number = max(1, index)
                drawn = scenes.render(scenes.scene(len(name), number), 32)
                body = scenes.jpeg(drawn)
                member = tarfile.TarInfo(f"{name}/{index:04d}.jpg")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    return path


def test_held_out_pictures_are_in_the_evaluation_and_nowhere_else(
    tmp_path: Path, build: Build
) -> None:
    path = archive(tmp_path)
    settings = SampleWebSettings(pictures=str(path), held_out=10)
    out = build(tmp_path / "run", settings).stage_folder("sample_web") / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "dirt.json",
        "evaluation",
        "pictures-00000.sqlite",
        "pool.parquet",
        "site.sqlite",
    ]
    table = pq.read_table(out / "evaluation" / "toys.parquet")
    assert Counter(table["label"].to_pylist()) == {0: 10, 1: 10, 2: 10}
    assert json.loads(table.schema.metadata[b"classes"]) == list(CLASSES)
    base = sqlite3.connect(out / "pictures-00000.sqlite")
    shown = [row[0] for row in base.execute("SELECT body FROM pictures")]
    base.close()
    assert not set(shown) & set(table["image"].to_pylist())
    assert 3 * 50 - 3 <= len(shown) <= 3 * 50
    assert pq.read_metadata(out / "pool.parquet").num_rows == len(shown)


def test_captions_are_mostly_right_and_the_noise_is_declared(tmp_path: Path, build: Build) -> None:
    path = archive(tmp_path, each=300)
    settings = SampleWebSettings(pictures=str(path), held_out=5)
    out = build(tmp_path / "run", settings).stage_folder("sample_web") / "out"
    shown, _ = labelled.split(labelled.read(path), settings)
    cited = pq.read_table(out / "pool.parquet")["TEXT"].to_pylist()
    words = {name: (name, *labelled.OTHER_NAMES[name]) for name in CLASSES}
    words["truck"] += ("lorries",)
    found: Counter[str] = Counter()
    for one, text in zip(shown, cited, strict=True):
        named = {n for n in CLASSES if any(w in text.lower() for w in words[n])}
        right = "right" if one.label in named else "wrong"
        found["junk" if not named else right] += 1
    declared = json.loads((out / "dirt.json").read_text())
    total = len(shown)
    assert declared["junk_text"] == found["junk"] == pytest.approx(0.1 * total, rel=0.4)
    assert declared["wrong_text"] == pytest.approx(0.05 * total, rel=0.5)
    assert found["wrong"] <= declared["wrong_text"]
    assert found["right"] >= 0.8 * total
    assert len(set(cited)) > total / 4


def test_the_order_of_members_does_not_matter(tmp_path: Path) -> None:
    every = labelled.read(archive(tmp_path))
    settings = SampleWebSettings(held_out=10)
    assert labelled.split(every, settings) == labelled.split(every[::-1], settings)
    other = labelled.split(every, SampleWebSettings(held_out=10, seed=1))
    assert other != labelled.split(every, settings)


def test_a_missing_archive_is_named(tmp_path: Path, build: Build) -> None:
    with pytest.raises(MissingInput, match=r"nowhere\.tar"):
        build(tmp_path, SampleWebSettings(pictures=str(tmp_path / "nowhere.tar")))


def test_an_archive_without_classes_says_what_is_wanted(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "flat.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(UserError, match=r"wants class/name\.jpg"):
        build(tmp_path / "run", SampleWebSettings(pictures=str(path)))


def test_holding_out_everything_is_refused(tmp_path: Path, build: Build) -> None:
    path = archive(tmp_path)
    with pytest.raises(UserError, match="leaves nothing to show"):
        build(tmp_path / "run", SampleWebSettings(pictures=str(path), held_out=60))

"""What a function finds in a picture cannot be recognised in what is stored."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataset_build import download, faces
from dataset_build.download import DownloadSettings, blur
from pipeline.config import ConfigError
from pipeline.stage import Run
from tests.dataset_build.hand_made import Config, Pair, balance_of, dedup_of
from tests.dataset_build.inline import InlineExecutor

from .conftest import HostileWeb

LEFT = [[0.0, 0.0, 0.5, 1.0]]


def detail(pixels: npt.NDArray[Any]) -> float:
    """How much neighbours differ."""
    return float(np.abs(np.diff(pixels.astype(float), axis=1)).mean())


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 3)])
def test_a_box_is_blurred_with_a_margin_and_the_rest_stays(shape: tuple[int, ...]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    before = noise.copy()
    made = blur.blurred(noise, np.array([[0.25, 0.25, 0.5, 0.5]]))
    assert made.shape == shape and made.dtype == np.uint8
    assert detail(made[12:24, 16:32]) < 0.1 * detail(noise[12:24, 16:32])
    assert (made[:, 48:] == noise[:, 48:]).all()
    assert (noise == before).all()
    assert blur.blurred(noise, np.zeros((0, 4))) is noise


def test_what_is_in_a_box_leaves_no_trace_but_its_colour() -> None:
    """Two different patterns become nearly one."""
    black, white = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    black[20:44:2, 20:44] = 255
    white[21:44:2, 20:44] = 255
    boxes = np.array([[20, 20, 44, 44]]) / 64
    a, b = (blur.blurred(picture, boxes).astype(int) for picture in (black, white))
    assert np.abs(black.astype(int) - white).max() == 255
    assert np.abs(a - b).max() < 40


@pytest.mark.parametrize(
    "wrong",
    [[1, 2, 3, 4], [[0.1, 0.1, 0.2]], [[0.5, 0, 0.4, 1]], [[0, 0, 40, 40]], [[0, 0, 1, np.nan]]],
)
def test_what_is_no_box_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"download\.blur: its function returned"):
        blur.found(lambda picture: wrong, np.zeros((8, 8, 3), np.uint8))


class Downloads:
    """Pictures of two sizes, blurred by a module of the user's."""

    def __init__(self, folder: Path, web: HostileWeb) -> None:
        self.folder, self.web = folder, web
        self.module = folder / "finders.py"
        names = ("large.jpg", "ok.jpg", "ok.png")
        self.pairs = [Pair(f"http://a.example/{name}", name) for name in names]

    def __call__(self, blur: str) -> tuple[dict[str, dict[str, Any]], dict[str, npt.NDArray[Any]]]:
        """Outcomes and stored pictures by text."""
        settings = DownloadSettings(
            blur=blur,
            robots="ignore",
            requests_per_s=None,
            allow_networks=("127.0.0.0/8",),
        )
        run = Run(self.folder / "run", Config(download=settings))
        self.web.hits.clear()
        stages = [dedup_of(self.pairs), balance_of(self.pairs), download.STAGE]
        InlineExecutor().advance(run, stages)
        self.stats = run.manifests("download")[0].stats
        (table,) = run.find("download:fetched-*")
        texts = {pair.uid: pair.text for pair in self.pairs}
        rows = {texts[row["uid"]]: row for row in pq.read_table(run.path(table)).to_pylist()}
        pictures = {}
        for text, row in rows.items():
            with tarfile.open(run.path(f"download:{row['staged']}")) as tar:
                content = tar.extractfile(f"{row['uid'][:8].hex()}.jpg")
                assert content is not None
                pictures[text] = np.asarray(Image.open(io.BytesIO(content.read())))
        return rows, pictures


@pytest.fixture
def downloads(tmp_path: Path, web: HostileWeb, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    monkeypatch.setenv("OPENWIT_CONNECT_TO", web.connect_to)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "finders", raising=False)  # another test's
    made = Downloads(tmp_path, web)
    made.module.write_text(
        f"def left(picture):\n    assert picture.shape[2] == 3\n    return {LEFT}\n"
        "def none(picture):\n    return []\n"
        "def broken(picture):\n    return picture.nothing\n"
        "def wrong(picture):\n    return [1.0]\n"
    )
    return made


def test_pictures_are_stored_without_what_a_function_finds(downloads: Downloads) -> None:
    plain, before = downloads("")
    assert {row["blurred"] for row in plain.values()} == {0}
    rows, after = downloads("finders:left")
    assert len(downloads.web.hits) == 3  # for others were made of the same files
    assert {row["blurred"] for row in rows.values()} == {1}
    assert downloads.stats.counts["pictures_blurred"] == 3
    for text, picture in after.items():
        assert picture.shape == before[text].shape
        half, margin = picture.shape[1] // 2, picture.shape[0] // 5
        assert detail(picture[:, : half - 8]) < 0.3 * detail(before[text][:, : half - 8])
        assert detail(picture[:, half + 2 * margin :]) == pytest.approx(
            detail(before[text][:, half + 2 * margin :]), rel=0.05
        )
        assert rows[text]["sha256"] == plain[text]["sha256"]
        assert rows[text]["staged_sha256"] != plain[text]["staged_sha256"]
    rows, _ = downloads("finders:none")
    assert {row["blurred"] for row in rows.values()} == {0}
    assert "pictures_blurred" not in downloads.stats.counts


def test_a_function_that_fails_fails_the_task_and_no_picture(downloads: Downloads) -> None:
    failed = r"download\.blur: its function failed: AttributeError: .*nothing"
    with pytest.raises(ConfigError, match=failed):
        downloads("finders:broken")
    with pytest.raises(ConfigError, match=r"download\.blur: its function returned \[1\.0\]"):
        downloads("finders:wrong")
    with pytest.raises(ConfigError, match=r"has .*left.* but not 'right'"):
        downloads("finders:right")


def test_another_function_of_the_same_name_makes_other_pictures(downloads: Downloads) -> None:
    downloads("finders:left")
    downloads("finders:left")
    assert not downloads.web.hits
    with downloads.module.open("a") as source:
        source.write("# changed\n")
    downloads("finders:left")
    assert len(downloads.web.hits) == 3


def test_the_functions_that_come_with_it_find_faces() -> None:
    """In the real photographs; a plain picture has none."""
    assert faces.boxes(np.full((100, 100, 3), 128, np.uint8)).shape == (0, 4)
    if not (data := os.environ.get("OPENWIT_DATA")):
        pytest.skip("OPENWIT_DATA is not set: no real photographs")
    found = 0
    with tarfile.open(f"{data}/photos/photos-200.tar") as tar:
        for member in tar:
            if (content := tar.extractfile(member)) is not None:
                picture = np.asarray(Image.open(content).convert("RGB"))
                boxes = blur.found(lambda _, rgb=picture: faces.boxes(rgb), picture[..., ::-1])
                found += len(boxes) > 0
    assert found > 5

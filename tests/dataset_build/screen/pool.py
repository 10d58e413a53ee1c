"""A pool of pictures as `download` leaves it, and what `screen` makes of it."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build import records, screen, uid_range
from dataset_build.lists import ListsSettings
from dataset_build.screen import ScreenSettings
from pipeline.manifest import Manifest
from pipeline.stage import Run
from tests.dataset_build.hand_made import Config, write_groups

QUERIES = 5
Picture = npt.NDArray[np.uint8]


def picture(seed: int, width: int = 160, height: int = 120) -> Picture:
    """Patches of colour, no two pictures alike."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    fine = random.integers(0, 60, (24, 32, 3), dtype=np.uint8)
    size, smooth = (width, height), cv2.INTER_CUBIC
    mixed: Any = cv2.addWeighted(
        cv2.resize(coarse, size, interpolation=smooth), 0.8,
        cv2.resize(fine, size, interpolation=smooth), 0.2, 0,
    )  # fmt: skip
    found: Picture = mixed
    return found


def jpeg(pixels: Any, quality: int = 95) -> bytes:
    return bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def smaller(pixels: Any, side: int) -> Any:
    """As a site's thumbnail: the shorter side has `side` pixels."""
    height, width = pixels.shape[:2]
    scale = side / min(width, height)
    size = round(width * scale), round(height * scale)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


@dataclass(frozen=True)
class Pair:
    """What a pair of the pool is; its stored picture is its file unless told otherwise."""

    number: int
    file: bytes
    text: str = ""
    url: str = ""
    stored: bytes = b""
    final_url: str = ""

    @property
    def uid(self) -> bytes:
        """Ascending with the number, over the whole space below 256."""
        return uid_of(self.number)


def uid_of(number: int) -> bytes:
    return bytes([number]) + hashlib.md5(bytes([number])).digest()[1:]


def write_pool(folder: Path, pairs: Sequence[Pair], files: int) -> None:
    for part in range(files):
        first, last = uid_range.bounds(part, files)
        name = f"staged-{part:05d}.tar"
        rows: list[dict[str, Any]] = []
        with tarfile.open(folder / name, "w") as tar:
            for pair in sorted(pairs, key=lambda pair: pair.number):
                if not first <= pair.uid <= last:
                    continue
                data = pair.stored or pair.file
                member = tarfile.TarInfo(f"{pair.uid[:8].hex()}.jpg")
                member.size = len(data)
                offset = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(member, io.BytesIO(data))
                url = pair.url or f"http://a.example/{pair.number}.jpg"
                rows.append(
                    {
                        "uid": pair.uid,
                        "url": url,
                        "final_url": pair.final_url or url,
                        "text": pair.text or f"text {pair.number}",
                        "status": "ok",
                        "sha256": hashlib.sha256(pair.file).digest(),
                        "staged": name,
                        "staged_offset": offset,
                        "staged_bytes": len(data),
                        "staged_sha256": hashlib.sha256(data).digest(),
                    }
                )
        table = pa.Table.from_pylist(rows, schema=records.FETCHED)
        pq.write_table(table, folder / f"fetched-{part:05d}-of-{files:05d}.parquet")


@dataclass(frozen=True)
class Screened:
    """What came out, by the pairs' numbers."""

    run: Run
    rows: dict[int, dict[str, Any]]
    manifests: list[Manifest]

    @property
    def reasons(self) -> dict[int, str]:
        return {number: row["reason"] for number, row in self.rows.items()}

    @property
    def kept(self) -> list[int]:
        return [number for number, row in self.rows.items() if row["keep"]]

    @property
    def histograms(self) -> dict[str, dict[str, int]]:
        stats = self.manifests[-1].stats
        return {name: dict(+bins) for name, bins in stats.histograms.items()}


Publish = Callable[[Run, str, Callable[[Path], None]], Manifest]
RunStage = Callable[[Run, Any], list[Manifest]]


class Pool:
    """Publishes pools below a folder and screens them."""

    def __init__(self, folder: Path, publish: Publish, run_stage: RunStage) -> None:
        self.folder, self._publish, self._run_stage = folder, publish, run_stage

    def run(
        self, pairs: Sequence[Pair], files: int, lists: ListsSettings, options: dict[str, Any]
    ) -> Run:
        number = len(list(self.folder.glob("run*")))
        run = Run(
            self.folder / f"run{number}",
            Config(screen=ScreenSettings.model_validate(options), lists=lists),
        )

        def write_balance(folder: Path) -> None:
            rows = [{"uid": pair.uid, "selected_by": [pair.number % 3, 3]} for pair in pairs]
            write_groups(run, folder, "selected", rows, records.SELECTED)
            np.save(folder / "counts.npy", np.full(QUERIES, 100, np.uint64))

        self._publish(run, "balance", write_balance)
        self._publish(run, "download", lambda folder: write_pool(folder, pairs, files))
        return run

    def screen(
        self,
        pairs: Sequence[Pair],
        files: int = 2,
        lists: ListsSettings | None = None,
        **options: Any,
    ) -> Screened:
        run = self.run(pairs, files, lists or ListsSettings(), options)
        manifests = self._run_stage(run, screen.STAGE)
        run = Run(run.folder, run.config)
        rows: dict[int, dict[str, Any]] = {}
        for reference in run.find("screen:screened-*"):
            for row in pq.read_table(run.path(reference)).to_pylist():
                rows[row["uid"][0]] = row
        return Screened(run, rows, manifests)

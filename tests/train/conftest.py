"""A packed dataset of a few small pictures, written as `pack` lays one out."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import Settings
from pipeline.stage import Attempt, Run, Task
from pipeline.stop import StopFlag
from train.settings import EvaluateSettings, TrainSettings

PAINTS = {"red": (220, 30, 30), "green": (30, 190, 40), "blue": (40, 60, 230)}

TINY_MODEL = {
    "name": "custom",
    "tower": "resnet",
    "image_size": 32,
    "width": 8,
    "embed_width": 16,
    "text_width": 16,
    "text_layers": 1,
    "context_length": 8,
}

Pack = Callable[..., Path]


def picture(seed: int, width: int = 44, height: int = 36) -> tuple[bytes, str]:
    """A JPEG in one of the paints, with noise, and its caption."""
    name = sorted(PAINTS)[seed % len(PAINTS)]
    noise = np.random.default_rng(seed).integers(-30, 30, (height, width, 3))
    pixels = (np.array(PAINTS[name]) + noise).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue(), f"a {name} picture"


def uid_of(sample: int) -> bytes:
    """A stable 128-bit identifier."""
    return hashlib.md5(str(sample).encode()).digest()


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    """Writes shards of the given sizes, an index and a dataset.json; returns their folder."""

    def write(*sizes: int, damaged: Mapping[int, bytes] = {}, name: str = "packed") -> Path:
        return write_pack(tmp_path / name, *sizes, damaged=damaged)

    return write


def write_pack(folder: Path, *sizes: int, damaged: Mapping[int, bytes] = {}) -> Path:
    """As `pack`, into `folder`, which is returned."""
    (folder / "shards").mkdir(parents=True)
    rows: list[dict[str, object]] = []
    sample = 0
    for number, size in enumerate(sizes):
        shard = f"{number:05d}.tar"
        with tarfile.open(folder / "shards" / shard, "w:", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(size):
                rows.append(_add(tar, shard, sample, damaged.get(sample)))
                sample += 1
    # The index lies in the order of identifiers, as any order must do.
    rows.sort(key=lambda row: str(row["uid"]))
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")
    (folder / "dataset.json").write_text(json.dumps({"fingerprint": f"{folder.name}{sizes}"}))
    return folder


def write_paints(path: Path) -> Path:
    """Twelve labelled pictures in three paints, to evaluate on."""
    rows = [(picture(seed)[0], seed % len(PAINTS)) for seed in range(12)]
    table = pa.table({"image": [image for image, _ in rows], "label": [n for _, n in rows]})
    metadata = {"classes": json.dumps(sorted(PAINTS)), "templates": json.dumps(["a {} picture"])}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def _add(tar: tarfile.TarFile, shard: str, sample: int, damaged: bytes | None) -> dict[str, object]:
    image, text = picture(sample)
    image = image if damaged is None else damaged
    uid = uid_of(sample)
    row: dict[str, object] = {"uid": uid, "shard": shard, "offset": tar.offset}
    members = {"jpg": image, "txt": text.encode(), "json": b"{}"}
    for kind, data in members.items():
        member = tarfile.TarInfo(f"{uid.hex()}.{kind}")
        member.size = len(data)
        at = tar.offset + 512
        tar.addfile(member, io.BytesIO(data))
        if kind == "jpg":
            row |= {"image_offset": at, "image_bytes": len(data)}
        elif kind == "txt":
            row |= {"text_offset": at, "text_bytes": len(data)}
    return row | {"length": tar.offset - int(str(row["offset"]))}


class Config(Settings):
    """The two sections that these tests need."""

    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()


class Stopping(StopFlag):
    """Asks to stop when it was looked at `after` times."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def __bool__(self) -> bool:
        self._left -= 1
        if self._left <= 0:
            self.signal = 15
        return super().__bool__()


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[..., Attempt]:
    """An attempt at training on a packed folder; every call is another attempt at one run."""
    count = 0

    def make(
        packed: Path, *, run: str = "run", stop: StopFlag | None = None, **changes: object
    ) -> Attempt:
        nonlocal count
        count += 1
        settings = {
            "seed": 3,
            "samples": 8 * 20,
            "batch": 8,
            "precision": "float32",
            "threads": 1,
            "log_every_steps": 2,
            "model": TINY_MODEL,
            "data": {"lanes": 4, "block_samples": 5, "margin": 2, "workers": 0},
            "lr": 2e-3,
            "warmup_steps": 3,
            "checkpoint": {"max_lost_steps": 8},
        } | changes
        config = Config(train=TrainSettings.model_validate(settings))
        reads = [packed / "index.parquet", packed / "dataset.json"]
        reads += sorted((packed / "shards").glob("*.tar"))
        folder = tmp_path / f"attempt-{count}"
        folder.mkdir()
        task = Task("train", 0, tuple(map(str, reads)))
        flag = StopFlag() if stop is None else stop
        return Attempt(Run(tmp_path / run, config), task, folder, flag)

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests share the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

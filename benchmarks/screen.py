"""Screening: looking at a picture, finding near pairs among millions of hashes, and what is found.

The peer of the search is the exact one, which compares a hash with all that share a part of 16 bits
with it or miss one by a bit; it is quadratic, so its time is given for a smaller number. The rates
of finding are of the 200 real photos in `$OPENWIT_DATA`: copies that were resized and encoded anew.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.timing import compete, memory_mb, reset_peak, seconds
from dataset_build import records, screen
from dataset_build.screen import near, perceptual
from pipeline.recipe import Config
from pipeline.stage import Attempt, Run, Task
from pipeline.stop import StopFlag

EXACT = 30_000  # hashes that both ways are given
HASHES = [int(float(number)) for number in os.environ.get("OPENWIT_HASHES", "1e6,4e6").split(",")]
_COPIES = 20  # a picture in so many has a copy


def measure() -> Iterator[dict[str, Any]]:
    """All figures; the last are rates, not times."""
    yield _look()
    yield _near_and_exact()
    for number in HASHES:
        yield _near(number)
    if folder := os.environ.get("OPENWIT_DATA"):
        yield from _found(_photos(Path(folder)))


def _look() -> dict[str, Any]:
    """Hashing an encoded picture of 256 x 340 pixels, beside decoding it in colours alone."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    pixels = cv2.resize(coarse, (340, 256), interpolation=cv2.INTER_CUBIC)
    data = _jpeg(pixels, 95)

    def ours() -> None:
        for _ in range(100):
            perceptual.hash_of(data)

    def peer() -> None:
        for _ in range(100):
            cv2.imdecode(np.frombuffer(data, "u1"), cv2.IMREAD_COLOR)

    took, decoding = compete(ours, peer, rounds=5)
    return {
        "name": "screen",
        "what": "pictures hashed, and decoded only",
        "ours": round(100 / took),
        "peer": round(100 / decoding),
        "ratio": round(decoding / took, 2),
        "unit": "pictures a second of one core",
    }


def _hashes(number: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Hashes and weak bits; one in `_COPIES` is of a copy of another, some 15 bits away."""
    hashes, weak = [], []
    for start in range(0, number, 1 << 16):
        random = np.random.default_rng(start)
        rows = min(1 << 16, number - start)
        values = random.standard_normal((rows, 256))
        copies = rows // _COPIES
        noise = random.standard_normal((copies, 256))
        values[-copies:] = values[:copies] + 0.18 * noise
        bits, marks = perceptual.bits_of(values)
        hashes.append(bits)
        weak.append(marks)
    return np.concatenate(hashes), np.concatenate(weak)


def _run_near(folder: Path, number: int) -> tuple[float, float, int, float]:
    """Seconds to collect, seconds to find, pairs found, most memory in MB."""
    run = Run(folder, Config())
    hashes, weak = (pa.array(list(map(bytes, one)), pa.binary(32)) for one in _hashes(number))
    uid = pa.array([row.to_bytes(16, "big") for row in range(number)], records.UID)
    quality = pa.array(np.full(number, 100, np.uint8))
    table = pa.table([uid, hashes, weak, quality], schema=records.looked(()))
    pq.write_table(table, folder / "looked.parquet")
    del table, uid, hashes, weak
    collected = folder / "collected"
    collected.mkdir()
    reset_peak()
    task = Task("screen", 0, (str(folder / "looked.parquet"),), {"phase": "collect"})
    collect_s, _ = seconds(lambda: screen.work(Attempt(run, task, collected, StopFlag())))
    names = tuple(str(collected / f"{name}.npy") for name in ("hashes", "weak", "classes"))
    find_s, pairs = 0.0, set[int]()
    for part, slots in enumerate(near.slots_of_tasks(number)):
        params = {"phase": "near", "part": part, "slots": slots}
        attempt = Attempt(run, Task("screen", 1, names, params), collected, StopFlag())
        find_s += seconds(lambda attempt=attempt: screen.work(attempt))[0]  # type: ignore[misc]
    edges = near.edges_of(sorted(collected.glob("edges-*.npy")))
    pairs = set((edges[:, 0].astype(np.int64) * number + edges[:, 1]).tolist())
    return collect_s, find_s, len(pairs), memory_mb("VmHWM")


def _near(number: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="openwit-screen-") as folder:
        collect_s, find_s, pairs, memory = _run_near(Path(folder), number)
    return {
        "name": "screen",
        "what": "near pairs of the pool",
        "hashes": number,
        "collect_s": round(collect_s, 1),
        "near_s": round(find_s, 1),
        "pairs": pairs,
        "us_a_hash": round(1e6 * find_s / number, 1),
        "memory_mb": round(memory),
    }


def _near_and_exact() -> dict[str, Any]:
    hashes = _hashes(EXACT)[0].view("u8")
    with tempfile.TemporaryDirectory(prefix="openwit-screen-") as folder:
        _, find_s, pairs, _ = _run_near(Path(folder), EXACT)
    exact_s, found = seconds(lambda: perceptual.Index(hashes).within(hashes, 31))
    exact = int((found[0] < found[1]).sum())
    return {
        "name": "screen",
        "what": "near pairs, and all of them by exact search",
        "hashes": EXACT,
        "ours": round(find_s, 2),
        "peer": round(exact_s, 2),
        "ratio": round(exact_s / find_s, 1),
        "unit": "s",
        "found": pairs / exact,
    }


def _jpeg(pixels: Any, quality: int) -> bytes:
    return bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def _pixels(data: bytes) -> Any:
    return cv2.imdecode(np.frombuffer(data, "u1"), cv2.IMREAD_COLOR)


def _photos(folder: Path) -> list[Any]:
    found: list[Any] = []
    with tarfile.open(folder / "photos" / "photos-200.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg") and (content := tar.extractfile(member)):
                found.append(_pixels(content.read()))
    return found


def _found(photos: list[Any]) -> Iterator[dict[str, Any]]:
    """Of half of the photos as an evaluation set, copies found; of the others, false alarms."""

    def shown(pixels: Any, side: int, quality: int) -> bytes:
        scale = min(1.0, side / min(pixels.shape[:2]))
        size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
        return _jpeg(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), quality)

    def hashed(files: list[bytes]) -> tuple[perceptual.U64, list[bytes]]:
        found = [perceptual.hash_of(data) for data in files]
        return perceptual.packed([one.pdq for one in found]), [one.weak for one in found]

    half = len(photos) // 2
    ours, ours_weak = hashed([shown(photo, 256, 95) for photo in photos[:half]])
    others, _ = hashed([shown(photo, 256, 95) for photo in photos[half:]])
    index = perceptual.Index(ours)
    alarms = set(index.within(others, 31)[0].tolist())
    yield {"name": "screen", "what": "other photos taken for one", "share": len(alarms) / half}
    for side, quality in ((4096, 85), (4096, 50), (400, 75), (200, 75), (128, 75), (96, 75)):
        files = [shown(photo, side, quality) for photo in photos[:half]]
        copies, weak = hashed([shown(_pixels(data), 256, 95) for data in files])
        distance = perceptual.distances(ours, copies)
        yield {
            "name": "screen",
            "what": "copies found",
            "side": side if side < 4096 else "as it was",
            "quality": quality,
            "evaluation": float((distance <= 31).mean()),
            "pool": float((_meet(ours, ours_weak, copies, weak) & (distance <= 31)).mean()),
            "median_distance": float(np.median(distance)),
        }


def _meet(
    ones: perceptual.U64, ones_weak: list[bytes], others: perceptual.U64, others_weak: list[bytes]
) -> npt.NDArray[np.bool_]:
    """Which pairs of hashes, row by row, share a key of `near`: no bit differs but weak ones."""
    weak = perceptual.packed(ones_weak) | perceptual.packed(others_weak)
    differing = ((ones ^ others) & ~weak).view(np.uint32).reshape(-1, 8)
    met: npt.NDArray[np.bool_] = (differing == 0).any(axis=1)
    return met

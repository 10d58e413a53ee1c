"""Batches from shards of real photographs, against open_clip's own pipeline.

Both give a 224-pixel random square of pictures whose shorter side is 256, and 77 tokens. The peer
runs in a process of its own with the webdataset that open_clip asks for, which is installed under
`~/.cache/openwit`; it normalises on the processor, as it does in training. Ours leaves that to the
GPU, and scales to a shorter side of 224; `ours_unscaled` crops from 256 as they are. Speeds are of
the wall clock; `…_cpu` is pictures for one second of processor time, consumer included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import loader_inputs
from benchmarks.timing import cpu_seconds
from train.data import decode, parts
from train.data.index import Index, open_dataset
from train.data.loader import Loader
from train.data.order import Order
from train.data.slots import Layout
from train.data.tokenizer import Tokenizer

WEBDATASET = "webdataset==0.2.86"
ROOT = Path(__file__).parent.parent
SIDE, CONTEXT, BATCH, LANES, BLOCK = 224, 77, 256, 16, 256
FIRST, COUNT = 4, 16  # batches that are not timed, and those that are
ROUNDS = 2

Timed = tuple[float, float]
"""Seconds by the wall clock and of processor time."""


def measure() -> Iterator[dict[str, Any]]:
    """Pictures a second with 1 and 2 workers, taken in turns, and where our time goes."""
    packages = _peer_packages()
    with tempfile.TemporaryDirectory() as folder:
        loader_inputs.write(Path(folder))
        index = open_dataset(Path(folder))
        for workers in (1, 2):
            sides: dict[str, Callable[[], Timed]] = {
                "ours": partial(_ours, index, workers, margin=0),
                "ours_unscaled": partial(_ours, index, workers, margin=32),
                "peer": partial(_peer, packages, Path(folder), workers),
            }
            yield _line(workers, _best(sides), index)
        yield _parts(index)


def _best(sides: dict[str, Callable[[], Timed]]) -> dict[str, Timed]:
    """The best of each clock over the rounds."""
    taken: dict[str, list[Timed]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, work in sides.items():
            taken[name].append(work())
    return {
        name: (min(wall for wall, _ in times), min(cpu for _, cpu in times))
        for name, times in taken.items()
    }


def _line(workers: int, best: dict[str, Timed], index: Index) -> dict[str, Any]:
    speed = {name: round(COUNT * BATCH / wall, 1) for name, (wall, _) in best.items()}
    by_cpu = {f"{name}_cpu": round(COUNT * BATCH / cpu, 1) for name, (_, cpu) in best.items()}
    return {
        "name": f"loader: {workers} worker{'s' * (workers > 1)}",
        "peer_name": f"open_clip's pipeline on {WEBDATASET.replace('==', ' ')}",
        **speed,
        "ratio": round(best["peer"][0] / best["ours"][0], 2),
        "unit": "pictures/s",
        **by_cpu,
        "ratio_cpu": round(best["peer"][1] / best["ours"][1], 2),
        "samples": len(index),
        "timed": COUNT * BATCH,
        "batch": BATCH,
        "short_side": loader_inputs.SHORT_SIDE,
        "side": SIDE,
    }


def _order(index: Index) -> Order:
    return Order(index, seed=0, batch=BATCH, lanes=LANES, block_samples=BLOCK)


def _ours(index: Index, workers: int, *, margin: int) -> Timed:
    loader = Loader(
        index,
        _order(index),
        Tokenizer(CONTEXT),
        image_size=SIDE,
        seed=0,
        margin=margin,
        workers=workers,
    )
    with closing(loader.batches(0, FIRST + COUNT + 8)) as batches:
        for _ in range(FIRST):
            next(batches)
        began, cpu = time.perf_counter(), cpu_seconds()
        for _ in range(COUNT):
            batch = next(batches)
            assert batch.image.shape == (BATCH, 3, SIDE, SIDE)
            assert batch.tokens.shape == (BATCH, CONTEXT)
        return time.perf_counter() - began, cpu_seconds() - cpu


def _peer(packages: Path, folder: Path, workers: int) -> Timed:
    numbers = (workers, BATCH, SIDE, CONTEXT, FIRST, COUNT)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loader_peer", folder / "shards", *map(str, numbers)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(packages)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def _peer_packages() -> Path:
    """A folder with the peer's webdataset; everything else is the project's own."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "openwit" / WEBDATASET.replace("==", "-")
    if not (folder / "webdataset").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), WEBDATASET], check=True)
    return folder


def _parts(index: Index) -> dict[str, Any]:
    """Shares of the processor time of one worker's part, by what it is spent on."""
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

        return call

    layout = Layout(BATCH, CONTEXT, SIDE)
    slot = layout.slot(np.zeros(layout.nbytes, np.uint8))
    recipe = parts.Recipe(
        index,
        _order(index),
        timed("tokenise", Tokenizer(CONTEXT)),  # type: ignore[arg-type]
        image_size=SIDE,
        short_side=SIDE,
        seed=0,
        max_pixels=decode.MAX_PIXELS,
    )
    maker = parts.Maker(recipe)
    with ExitStack() as patches:
        for name, module, function in (
            ("read", parts, "read_block"),
            ("decode", decode, "decode_scaled"),
            ("scale, crop and copy", decode, "random_crop"),
        ):
            work = timed(name, getattr(module, function))
            patches.enter_context(mock.patch.object(module, function, work))
        began = time.perf_counter()
        for step in range(COUNT):
            maker.fill(step, range(LANES), range(0, BATCH, BATCH // LANES), slot)
        whole = time.perf_counter() - began
    spent["rest"] = whole - sum(spent.values())
    return {
        "name": "loader: our time by part",
        "unit": "share",
        **{name: round(seconds / whole, 3) for name, seconds in sorted(spent.items())},
        "us_per_picture": round(whole / (COUNT * BATCH) * 1e6, 1),
    }

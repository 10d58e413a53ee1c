"""verify: every published byte of a run, or of a dataset's folder, is read again."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline import config as configuration
from pipeline import manifest
from pipeline import status as reading
from pipeline.manifest import Manifest
from pipeline.stage import Run

log = logging.getLogger(__name__)

EXIT_DAMAGED = 5
_SAY_EVERY_S = 15.0

Tick = Callable[[int, int], None]
"""Told bytes: those that are read, and all."""


def verify(options: argparse.Namespace) -> int:
    """Say what is damaged; of a run, put it aside, so that `build` makes it again."""
    folder: Path = options.run
    if (folder / "dataset.json").exists() and not (folder / "stages.json").exists():
        faults = [f"{folder / name}: {what}" for name, what in _dataset(folder, options, {})]
        return _say(faults, "all files are as they were packed")
    run = Run(folder, configuration.Settings())
    published = [done for stage in reading.read(folder) for done in run.manifests(stage.name)]
    faults = []
    damaged = []
    known: dict[str, str] = {}
    for done, found in _damage(run, published, options.workers):
        faults += found
        if found:
            damaged.append(done)
        if done.stage == "pack":  # what is said of a shard need not be said again
            names = [o for o in done.outputs if not found or o.name.endswith(".tar")]
            known |= {output.name: output.sha256 for output in names}
    makers = {o.name: done for done in published for o in done.outputs if done.stage == "pack"}
    if "dataset.json" in makers:
        out = run.stage_folder("pack") / "out"
        for name, what in _dataset(out, options, known):
            faults.append(f"{out / name}: {what}")
            damaged.append(makers.get(name, makers["dataset.json"]))
    for done in damaged:
        manifest.discard(run.stage_folder(done.stage), done)
    files = sum(len(done.outputs) for done in published)
    code = _say(faults, f"all {files} files are as they were published")
    if code:
        print("the tasks that made them will run again with the next build")
    return code


def _say(faults: list[str], whole: str) -> int:
    for fault in faults:
        print(fault)
    print(f"{len(faults)} faults" if faults else whole)
    return EXIT_DAMAGED if faults else 0


def _damage(
    run: Run, published: list[Manifest], workers: int
) -> Iterator[tuple[Manifest, list[str]]]:
    """Each manifest with what of its outputs differs from it."""
    sizes = [sum(output.bytes for output in done.outputs) for done in published]
    read = 0
    # Reading and hashing leave the interpreter to others, so threads do.
    with _shown("published files") as tick, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        each = pool.map(lambda d: manifest.damage(run.stage_folder(d.stage), d), published)
        for done, size, found in zip(published, sizes, each, strict=True):
            read += size
            tick(read, sum(sizes))
            yield done, found


def _dataset(
    folder: Path, options: argparse.Namespace, known: Mapping[str, str]
) -> list[tuple[str, str]]:
    """The dataset's faults: file and what."""
    from dataset_build.verify import verify

    with _shown("samples of the dataset") as tick:
        found = verify(
            folder,
            decodes=not options.no_decode,
            workers=options.workers,
            known=known,
            tick=tick,
        )
    return [(fault.file, fault.what) for fault in found]


@contextmanager
def _shown(what: str) -> Iterator[Tick]:
    """A bar on a terminal, now and then a line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        said = [time.monotonic()]

        def say(done: int, total: int) -> None:
            if time.monotonic() - said[0] > _SAY_EVERY_S:
                said[0] = time.monotonic()
                log.info("%s: %.1f of %.1f GB read", what, done / 1e9, total / 1e9)

        yield say
        return
    columns = TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)

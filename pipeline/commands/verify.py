"""verify: every published byte of a run, or of a dataset's folder, is read again."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline import damage, manifest
from pipeline.config import MissingInput
from pipeline.manifest import Manifest

log = logging.getLogger(__name__)

EXIT_DAMAGED = 5
_SAY_EVERY_S = 15.0
_OF_DATASET = ("dataset.json", "index.parquet", "shards")

Tick = Callable[[int, int], None]
"""Told bytes: those that are read, and all."""


@dataclass
class _Published:
    """What a stage's folder says that was published: by tasks that are planned now, or were."""

    folder: Path
    manifests: list[Manifest] = field(default_factory=list)
    """As they are in `done/`, whatever became of their outputs."""
    complete: set[str] = field(default_factory=set)
    """Fingerprints of the tasks with which the stage last was complete; empty if it never was."""
    faults: list[str] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)

    @property
    def shows_itself(self) -> bool:
        """Whether `out/` has what the stage last made as a whole. While it makes something else,
        files of both are there."""
        made = {done.fingerprint for done in self.manifests}
        return bool(self.complete) and made <= self.complete


def verify(options: argparse.Namespace) -> int:
    """Say what is damaged; of a run, put it aside, so that `build` makes it again."""
    folder: Path = options.run
    stages = [_published(path.parent) for path in sorted(folder.glob("*/done"))]
    if not stages and not (folder / "stages.json").exists():
        if not any((folder / name).exists() for name in _OF_DATASET):
            raise MissingInput(f"{folder}: neither a run nor a packed dataset is here")
        faults = [f"{folder / name}: {what}" for name, what in _dataset(folder, options, {})]
        return _say(faults, "all files are as they were packed")
    faults = _put_aside(stages, options)
    files = sum(len(done.outputs) for stage in stages for done in stage.manifests)
    code = _say(faults, f"all {files} files are as they were published")
    if code:
        print("the next build makes again what is damaged")
    return code


def _put_aside(stages: list[_Published], options: argparse.Namespace) -> list[str]:
    """The faults of a run; what is damaged of it is not done any more."""
    faults = [fault for stage in stages for fault in stage.faults]
    makers: dict[str, Manifest] = {}
    known: dict[str, str] = {}
    astray: set[str] = set()
    for stage, done, damaged, elsewhere in _damage(stages, options.workers):
        faults += damaged + list(elsewhere.values())
        if damaged:
            manifest.discard(stage.folder, done)
        if stage.folder.name == "pack":
            makers |= {output.name: done for output in done.outputs}
            astray |= elsewhere.keys()
            # What is said of a shard need not be said again.
            is_whole = not damaged and not elsewhere
            names = [o for o in done.outputs if is_whole or o.name.endswith(".tar")]
            known |= {output.name: output.sha256 for output in names}
    for stage in stages:
        if stage.folder.name == "pack" and stage.shows_itself:
            for name, what in _dataset(stage.folder / "out", options, known):
                faults.append(f"{stage.folder / 'out' / name}: {what}")
                maker = makers.get(name) or makers.get("dataset.json")
                if maker and name not in astray:
                    manifest.discard(stage.folder, maker)
        for path in stage.unreadable:
            path.unlink(missing_ok=True)
    return faults


def _say(faults: list[str], whole: str) -> int:
    for fault in faults:
        print(fault)
    print(f"{len(faults)} faults" if faults else whole)
    return EXIT_DAMAGED if faults else 0


def _published(folder: Path) -> _Published:
    """The records of a stage: a task that is not done is no fault, one that no longer is, is."""
    found = _Published(folder)
    for name in ("complete.json", "plan.json"):
        try:
            values = json.loads((folder / name).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            found.unreadable.append(folder / name)
        else:
            found.complete |= set(values) if name == "complete.json" else set()
    for path in sorted((folder / "done").glob("*.json")):
        if done := manifest.read(path):
            found.manifests.append(done)
        else:
            found.unreadable.append(path)
    found.manifests.sort(key=lambda done: done.index)
    found.faults = [f"{path}: cannot be read" for path in found.unreadable]
    there = {done.fingerprint for done in found.manifests}
    for fingerprint in sorted(found.complete - there):
        path = manifest.manifest_path(folder, fingerprint)
        if path not in found.unreadable:
            found.faults.append(f"{path}: missing, and with it what its task published")
    return found


def _damage(
    stages: list[_Published], workers: int
) -> Iterator[tuple[_Published, Manifest, list[str], dict[str, str]]]:
    """Each manifest with the faults of its outputs: of the stored ones, which builds read, and by
    name of those below `out/` that are no second names of them, as in a copy of a run."""
    digests: dict[Path, set[str]] = {}
    for stage in stages:
        for output in (output for done in stage.manifests for output in done.outputs):
            digests.setdefault(stage.folder / "out" / output.name, set()).add(output.sha256)

    def look(of: tuple[_Published, Manifest]) -> tuple[list[str], dict[str, str]]:
        stage, done = of
        is_shown = done.fingerprint in stage.complete
        elsewhere = damage.astray(stage.folder, done, digests) if is_shown else {}
        return damage.damage(stage.folder, done), elsewhere

    every = [(stage, done) for stage in stages for done in stage.manifests]
    sizes = [sum(output.bytes for output in done.outputs) for _, done in every]
    read = 0
    # Reading and hashing leave the interpreter to others, so threads do.
    with _shown("published files") as tick, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for of, size, found in zip(every, sizes, pool.map(look, every), strict=True):
            read += size
            tick(read, sum(sizes))
            yield *of, *found


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

"""What is done, running and failed, and where its log is: read from the run folder alone."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from pipeline.config import MissingInput, Settings
from pipeline.manifest import Manifest, Stats
from pipeline.stage import Run

_SILENT_S = 120  # a task of another host that said nothing for so long is not called running


@dataclass
class StageStatus:
    """One stage of a run, as its folder tells it."""

    name: str
    unit: str
    total: int = 0
    """Tasks planned; 0 until the stage is reached."""
    done: int = 0
    queued: int = 0
    """Tasks that wait for a cluster's nodes, or in a job for their turn."""
    left_out: int = 0
    """Tasks that failed in all their attempts and that `max_failed_tasks` does without."""
    running: list[dict[str, float | int | str | None]] = field(default_factory=list)
    """What each running task last said: index, done, total, unit, note, time."""
    failed: list[dict[str, float | int | str | None]] = field(default_factory=list)
    """index, reason and log of each task that failed in all its attempts."""
    stats: Stats = field(default_factory=Stats)
    seconds: float = 0.0
    """Task time spent, summed over the manifests."""

    @property
    def word(self) -> str:
        """The stage's state in one word."""
        if self.running:
            return "running"
        if self.total and self.done + self.left_out == self.total:
            return "done"
        if self.queued:
            return "queued"
        if self.failed:
            return "failed"
        return "partly done" if self.done else "waiting"

    @property
    def fraction(self) -> float:
        """Share of the stage's work that is done, the running tasks' parts included."""
        parts = [_share(beat) for beat in self.running]
        return (self.done + sum(parts)) / self.total if self.total else 0.0


def read(folder: Path) -> list[StageStatus]:
    """The stages of a run in order. Raises `MissingInput` if `folder` holds no run."""
    try:
        rows = json.loads((folder / "stages.json").read_text())
    except FileNotFoundError:
        raise MissingInput(
            f"{folder}: no run here; start one with `make build-dataset RUN={folder}`"
        ) from None
    run = Run(folder, Settings())
    return [read_stage(run, row["name"], row["unit"]) for row in rows]


def read_stage(run: Run, name: str, unit: str) -> StageStatus:
    """One stage of a run."""
    status = StageStatus(name, unit)
    planned = run.plan(name)
    status.total = len(planned)
    manifests = run.manifests(name)
    status.done = len(manifests)
    finished = {manifest.index for manifest in manifests}
    status.stats = total(manifests)
    status.seconds = sum(manifest.seconds for manifest in manifests)
    folder = run.stage_folder(name)
    left_out = run.left_out(name)
    for task in planned:
        index = task.task.index
        if index in finished:
            continue
        status.left_out += task.fingerprint in left_out
        if (beat := _json(folder / "live" / f"{index:05d}.json")) and _alive(beat):
            status.running.append({"index": index, **beat})
        elif record := _json(folder / "failed" / f"{index:05d}.json"):
            status.failed.append({"index": index, **record})
    return status


def total(manifests: Sequence[Manifest]) -> Stats:
    """The sum of the manifests' statistics."""
    return sum((manifest.stats for manifest in manifests), Stats())


def table(stages: Sequence[StageStatus]) -> Table:
    """The status as a table for a terminal."""
    view = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "state"):
        view.add_column(heading)
    for heading in ("tasks", "in", "out", "task time"):
        view.add_column(heading, justify="right")
    view.add_column("now")
    for stage in stages:
        stats = stage.stats
        view.add_row(
            stage.name,
            stage.word,
            f"{stage.done}/{stage.total or '?'}",
            f"{stats.rows_in:,}" if stage.done else "",
            f"{stats.rows_out:,} {stage.unit}" if stage.done else "",
            f"{stage.seconds:.1f} s" if stage.done else "",
            _now(stage),
        )
    return view


def logs(folder: Path, stage: str, index: int | None) -> list[Path]:
    """Where to read about a task; without `index`, about those that failed, or that run now.

    Raises `MissingInput` if there is nothing to read.
    """
    found = {each.name: each for each in read(folder)}
    if stage not in found:
        raise MissingInput(f"{folder}: no stage {stage!r}; there are {', '.join(found)}")
    own = folder / stage / "logs"
    if index is None:
        paths = [Path(str(record["log"])) for record in found[stage].failed]
        paths = paths or [own / f"{beat['index']:05d}.log" for beat in found[stage].running]
    else:
        record = _json(folder / stage / "failed" / f"{index:05d}.json") or {}
        paths = [own / f"{index:05d}.log", Path(str(record.get("log", "")))]
    paths = [path for path in dict.fromkeys(paths) if path.is_file()]
    if not paths:
        what = "no task fails or runs; name one" if index is None else f"no log of task {index}"
        raise MissingInput(f"{own}: {what}")
    return paths


def failures(stages: Sequence[StageStatus]) -> list[str]:
    """One line a failed task: what, why, and the log to read."""
    return [
        f"{stage.name} task {record['index']}: {record['reason']}; log: {record['log']}"
        for stage in stages
        for record in stage.failed
    ]


def _now(stage: StageStatus) -> str:
    waiting = f"{stage.queued} queued" if stage.queued else ""
    if not stage.running:
        failed = f"{len(stage.failed)} failed" if stage.failed else ""
        left_out = f"{stage.left_out} left out" if stage.left_out else ""
        return ", ".join(word for word in (waiting, left_out or failed) if word)
    beat = stage.running[0]
    of = f" of {beat['total']:,}" if beat.get("total") else ""
    more = f" (+{len(stage.running) - 1} tasks)" if len(stage.running) > 1 else ""
    note = f", {beat['note']}" if beat.get("note") else ""
    now = f"task {beat['index']}: {beat['done']:,}{of} {beat['unit']}{note}{more}"
    return f"{now}, {waiting}" if waiting else now


def _share(beat: dict[str, float | int | str | None]) -> float:
    done, whole = beat.get("done"), beat.get("total")
    if isinstance(done, (int, float)) and isinstance(whole, (int, float)) and whole:
        return min(1.0, done / whole)
    return 0.0


def _alive(beat: dict[str, float | int | str | None]) -> bool:
    if beat.get("host") == socket.gethostname():
        try:
            os.kill(int(beat["pid"] or 0), 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True
    return time.time() - float(beat["time"] or 0) < _SILENT_S


def _json(path: Path) -> dict[str, float | int | str | None] | None:
    try:
        values: dict[str, float | int | str | None] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return values

"""What is done, running and failed, and where its log is: read from the run folder alone."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.charts import short
from pipeline.config import MissingInput, Settings
from pipeline.log import duration
from pipeline.manifest import Manifest
from pipeline.stage import Run
from pipeline.stats import Stats

_SILENT_S = 120  # a task of another host that said nothing for so long is not called running
_COUNTS = ("done", "total")
_EXACT = 10_000_000  # from there on a count is rounded, so that a stage is one line


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
    starting: int = 0
    """Tasks of a cluster's jobs that have begun and are about to work."""
    is_complete: bool = False
    """Whether all is done as it is planned now, and nothing more will be planned."""
    left_out: int = 0
    """Tasks that failed in all their attempts and that `max_failed_tasks` does without."""
    running: list[dict[str, float | int | str | None]] = field(default_factory=list)
    """What each running task last said: see `pipeline.stage.Attempt.progress`."""
    failed: list[dict[str, float | int | str | None]] = field(default_factory=list)
    """index, reason and log of each task that failed in all its attempts."""
    saved: str = ""
    """Where an unfinished training goes on from, if it saved its state."""
    stats: Stats = field(default_factory=Stats)
    seconds: float = 0.0
    """Task time spent, summed over the manifests."""

    @property
    def word(self) -> str:
        """The stage's state in one word."""
        if self.running:
            return "running"
        if self.is_complete:
            return "done"
        if self.starting:
            return "starting"
        if self.queued:
            return "queued"
        if self.failed:
            return "failed"
        if self.saved:
            return "stopped"
        return "partly done" if self.done else "waiting"

    @property
    def fraction(self) -> float:
        """Share of the stage's work that is done, the running tasks' parts included."""
        parts = [_share(beat) for beat in self.running]
        return (self.done + sum(parts)) / self.total if self.total else 0.0

    @property
    def rate(self) -> float:
        """What the running tasks do a second, all together, since these attempts began."""
        return sum(_gained(beat) / _elapsed(beat) for beat in self.running)

    @property
    def seconds_left(self) -> float | None:
        """How long the stage still takes if it goes on as it went; None while that is not known.

        The time that a whole task takes is that of the finished tasks and of what the running
        ones did since their attempts began.
        """
        known = [beat for beat in self.running if _share(beat) and _gained(beat)]
        tasks = self.done + sum(_gained(beat) / float(beat["total"] or 1) for beat in known)
        left = self.total * (1 - self.fraction)
        if not self.running or not tasks or not left:
            return None
        seconds = self.seconds + sum(_elapsed(beat) for beat in known)
        return left * seconds / tasks / len(self.running)

    def now(self) -> str:
        """How far the running tasks are, how fast, how they say it goes; or where it stopped."""
        queued = [f"{self.starting} starting"] * bool(self.starting)
        queued += [f"{self.queued} queued"] * bool(self.queued)
        if not self.running:
            left_out = [f"{self.left_out} left out"] * bool(self.left_out)
            failed = [f"{len(self.failed)} failed"] * bool(self.failed)
            saved = [f"saved at {self.saved}"] * bool(self.saved)
            is_between = self.total and self.done + self.left_out == self.total
            more = ["more to come"] * bool(is_between and not self.is_complete)
            return ", ".join(queued + (left_out or failed) + saved + more)
        first = self.running[0]
        done, whole = (sum(int(beat.get(key) or 0) for beat in self.running) for key in _COUNTS)
        knows = all(beat.get("total") for beat in self.running)
        tasks = f"{len(self.running)} tasks: " if len(self.running) > 1 else ""
        if not done and not knows:
            return ", ".join([f"{tasks}starting", *queued])
        words = [f"{tasks}{_count(done)}{f' of {_count(whole)}' if knows else ''} {first['unit']}"]
        if self.rate:
            words.append(f"{short(self.rate)}/s")
        if left := self.seconds_left:
            words.append(f"{duration(left)} left")
        if note := first.get("note"):
            words.append(str(note))
        return ", ".join(words + queued)


def read(folder: Path) -> list[StageStatus]:
    """The stages of a run in order. Raises `MissingInput` if `folder` holds no run."""
    try:
        rows = json.loads((folder / "stages.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise MissingInput(
            f"{folder}: no run here; start one with `make build-dataset RUN={folder}` or, on a"
            f" dataset that is there, `make train RUN={folder}`"
        ) from None
    run = Run(folder, Settings())
    stages = [read_stage(run, row["name"], row["unit"]) for row in rows]
    return stages[unused([stage.total for stage in stages]) :]


def unused(planned: Sequence[int]) -> int:
    """How many of the first stages a run does without, by the tasks planned for each stage.

    Stages are planned in order: training that has begun on data of its own needs no dataset stage.
    """
    return next((place for place, tasks in enumerate(planned) if tasks), 0)


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
    done = {manifest.fingerprint for manifest in manifests}
    is_whole = bool(planned) and status.done + status.left_out == status.total
    status.is_complete = is_whole and done == set(run.complete(name))
    if status.done < status.total:
        status.saved = _saved(folder)
    return status


def total(manifests: Sequence[Manifest]) -> Stats:
    """The sum of the manifests' statistics."""
    return sum((manifest.stats for manifest in manifests), Stats())


def table(stages: Sequence[StageStatus]) -> Table:
    """The status as a table for a terminal."""
    view = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "state"):
        view.add_column(heading, no_wrap=True)
    for heading in ("tasks", "in", "out", "task time"):
        view.add_column(heading, justify="right", no_wrap=True)
    view.add_column("now", no_wrap=True)
    for stage in stages:
        stats = stage.stats
        view.add_row(
            stage.name,
            stage.word,
            f"{stage.done}/{stage.total or '?'}",
            _count(stats.rows_in) if stage.done else "",
            f"{_count(stats.rows_out)} {stage.unit}" if stage.is_complete or stats.rows_out else "",
            duration(stage.seconds) if stage.done else "",
            stage.now(),
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


def _saved(folder: Path) -> str:
    """The newest of a training's checkpoints, by the names of their folders."""
    names = [path.name.partition("-")[2] for path in folder.glob("checkpoints/step-*")]
    step = max((int(name) for name in names if name.isdecimal()), default=0)
    if not step:
        return ""
    said: dict[str, Any] = _json(folder / "training.json") or {}
    samples, batch = said.get("seen"), said.get("settings", {}).get("batch")
    if not samples or not batch:
        return f"step {step:,}"
    if step * batch >= samples:
        return ""  # that training has ended, and is of an earlier plan
    words = f"sample {step * batch:,} of {samples:,}"
    return f"{words} (step {step:,} of {samples // batch:,})"


def _count(number: int) -> str:
    return f"{number:,}" if number < _EXACT else short(number)


def _gained(beat: dict[str, float | int | str | None]) -> float:
    """What an attempt did since it began."""
    return float(beat.get("done") or 0) - float(beat.get("from_done") or 0)


def _elapsed(beat: dict[str, float | int | str | None]) -> float:
    """Seconds in which it did that."""
    return max(float(beat["time"] or 0) - float(beat.get("from_time") or 0), 1e-3)


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

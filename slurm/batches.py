"""The record of what was submitted: RUN/slurm/<stage>-<number>.json, one an array.

It is written before sbatch is called and completed with the job's number afterwards. If the driver
dies between the two, the queue tells by the array's name whether there is one, to be cancelled.
Beside it, a folder of that name holds the output of its jobs and their reports, until all has ended
well.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline import files
from pipeline.manifest import find
from slurm import queue
from slurm.queue import End, Queued

KILLED = -9
"""Exit code of a task whose job ended with it."""
_SIGKILLED = ("137:0", "0:9")
# As slurmd writes it, bytes, where it measures memory itself; and where the kernel watches over it.
_TOO_MUCH = re.compile(rb"exceeded (?:job )?memory limit \((\d+) > (\d+)\)")
_OOM_KILLED = re.compile(rb"oom[_-]kill|OOM Killed|cgroup out-of-memory", re.IGNORECASE)
_LAST_BYTES = 65_536


@dataclass(frozen=True)
class Entry:
    """A task in a chunk."""

    index: int
    fingerprint: str
    attempt: int
    """Which submission of the task this is, from 1."""


@dataclass(frozen=True)
class Failure:
    """How a task failed, and where to read more."""

    reason: str
    log: str
    exit_code: int


@dataclass
class Report:
    """What a job says of the tasks of its chunk; nothing if all was well."""

    path: Path
    failed: dict[str, Failure] = field(default_factory=dict)
    """By fingerprint."""
    stopped: int = 0
    """How often the job stopped at a safe point."""

    def write(self) -> None:
        """Replace the file."""
        failed = {fingerprint: asdict(failure) for fingerprint, failure in self.failed.items()}
        text = json.dumps({"failed": failed, "stopped": self.stopped}, indent=1)
        files.write_atomic(self.path, text)


@dataclass
class Batch:
    """An array: chunks of tasks, one a job."""

    path: Path
    stage: str
    name: str
    """The jobs' name in the queue; no two batches have the same."""
    drive: str
    """The user's command that it goes back to."""
    chunks: list[list[Entry]]
    time: float
    """Unix time, seconds; for people, never compared."""
    job: str | None = None
    """The array's number; None until sbatch has answered."""
    has_ended: bool = False
    failed: dict[str, Failure] = field(default_factory=dict)
    """Once it has ended: the tasks without a manifest, by fingerprint."""
    cancelled: list[str] = field(default_factory=list)
    """Once it has ended: fingerprints of the tasks whose jobs somebody cancelled."""

    @property
    def folder(self) -> Path:
        """Where its jobs write."""
        return self.path.with_suffix("")

    def write(self) -> None:
        """Replace the record."""
        files.write_atomic(self.path, self._text())

    def log(self, number: int) -> Path:
        """The output of one job, there once it has begun."""
        return self.folder / f"{self.place(number)}_0_log.out"

    def place(self, number: int) -> str:
        """What SLURM calls one job."""
        return f"{self.job}_{number}" if len(self.chunks) > 1 else f"{self.job}"

    def report(self, number: int) -> Report:
        """What one job has said so far."""
        path = self.folder / f"{number}.json"
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            return Report(path)
        failed = {fingerprint: Failure(**each) for fingerprint, each in values["failed"].items()}
        return Report(path, failed, values["stopped"])

    def _text(self) -> str:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "path"}
        values["chunks"] = [
            [[e.index, e.fingerprint, e.attempt] for e in chunk] for chunk in self.chunks
        ]
        values["failed"] = {name: asdict(failure) for name, failure in self.failed.items()}
        return json.dumps(values)


def read(path: Path) -> Batch:
    """The batch of a record."""
    values = json.loads(path.read_text())
    values["chunks"] = [[Entry(*entry) for entry in chunk] for chunk in values["chunks"]]
    values["failed"] = {name: Failure(**each) for name, each in values["failed"].items()}
    return Batch(path, **values)


def everything(folder: Path) -> list[Batch]:
    """All batches of a run, whose `RUN/slurm` this is, in the order of their stages and numbers."""
    return [read(path) for path in sorted(folder.glob("*-[0-9]*.json"))]


def intend(folder: Path, stage: str, drive: str, chunks: Sequence[Sequence[Entry]]) -> Batch:
    """Record that an array is about to be submitted."""
    number = len(list(folder.glob(f"{stage}-[0-9]*.json")))
    name = f"{stage}.{secrets.token_hex(4)}"
    batch = Batch(folder, stage, name, drive, [list(chunk) for chunk in chunks], time.time())
    while True:
        batch.path = folder / f"{stage}-{number:05d}.json"
        if files.publish_once(batch.path, batch._text()):
            return batch
        number += 1


def settle(run_folder: Path, queued: Mapping[str, Sequence[Queued]]) -> Iterator[Batch]:
    """Bring the records up to date with the queue, as it was just read, and yield each.

    A batch has ended once none of its jobs is queued. What is then published is done; the rest has
    failed, or was cancelled. What its jobs wrote is removed where it explains nothing. Only one
    process may do this at a time.
    """
    for batch in everything(run_folder / "slurm"):
        if not batch.has_ended:
            jobs = queued.get(batch.name, ())
            if batch.job is None:  # the driver died: sbatch may have it, its jobs have no work
                queue.cancel(sorted({job.job for job in jobs}))
                _remove(batch)
                continue
            if not jobs:
                _end(batch, run_folder / batch.stage)
        yield batch


def _end(batch: Batch, stage_folder: Path) -> None:
    assert batch.job is not None
    states: dict[int, End] | None = None
    explains = set()
    for number, chunk in enumerate(batch.chunks):
        missing = [e for e in chunk if find(stage_folder, e.fingerprint) is None]
        if not missing:
            continue
        report = batch.report(number)
        batch.failed |= {e.fingerprint: report.failed[e.fingerprint] for e in missing
                         if e.fingerprint in report.failed}  # fmt: skip
        silent = [e.fingerprint for e in missing if e.fingerprint not in report.failed]
        if not silent:
            continue
        if states is None:
            states = queue.ends(batch.job)
        end = states.get(number, End())
        log = batch.log(number)
        # If SLURM has forgotten: what never began, or stopped when asked to, was cancelled. What is
        # killed has no time to say so.
        forgotten = not end.state and (report.stopped or not log.exists())
        if end.state.startswith("CANCELLED") or forgotten:
            batch.cancelled += silent
            continue
        explains.add(log)
        reason = _reason(batch, number, end, report.stopped)
        batch.failed |= dict.fromkeys(silent, Failure(reason, str(log), KILLED))
    batch.has_ended = True
    batch.write()
    _clean(batch.folder, explains)


def _reason(batch: Batch, number: int, end: End, stopped: int) -> str:
    job = batch.place(number)
    if words := _memory_words(batch, number, end):
        return f"its job {job} {words}"
    if not end.state:
        return f"its job {job} ended without a word"
    if stopped and end.state in ("FAILED", "TIMEOUT"):
        return (
            f"its job {job} was stopped {stopped} times and not queued again; more time"
            " (slurm: time_minutes) or more tries (max_requeues) would help"
        )
    exit_code, _, signal = end.code.partition(":")
    if signal not in ("", "0"):
        return f"its job {job} ended as {end.state}, by signal {signal}"
    return f"its job {job} ended as {end.state}, exit code {exit_code}"


def _memory_words(batch: Batch, number: int, end: End) -> str:
    """That a job was killed for memory, or may have been, and the setting to raise; else empty."""
    said = _last_bytes(batch.log(number))
    raised = f"raise slurm.stages.{batch.stage}.memory_gb"
    had = f" (it had {end.memory})" if end.memory else ""
    if found := _TOO_MUCH.search(said):
        held, limit = (int(count) / 2**30 for count in found.groups())
        words = f"was killed for memory: it held {held:.3g} GiB, its limit was {limit:.3g} GiB"
        return f"{words}; {raised}"
    if end.state == "OUT_OF_MEMORY" or _OOM_KILLED.search(said):
        return f"was killed for memory{had}; {raised}"
    if end.code in _SIGKILLED:
        return (
            f"ended as {end.state}, killed (SIGKILL) as jobs are that take too much memory{had};"
            f" if nobody else killed it, {raised}"
        )
    return ""


def _last_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _LAST_BYTES))
            return stream.read()
    except FileNotFoundError:
        return b""


def _clean(folder: Path, explains: set[Path]) -> None:
    """Keep the output of jobs that ended badly; submitit's files are of no use any more."""
    if not explains:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        if path not in explains:
            path.unlink()


def _remove(batch: Batch) -> None:
    shutil.rmtree(batch.folder, ignore_errors=True)
    batch.path.unlink()

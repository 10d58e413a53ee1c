"""The one process that submits the jobs of a run, and the job that takes over from it.

A driver is the command that a user typed, `python -m pipeline build … --on slurm`, or a job that
runs the same command later. All that it knows is on disk. A lock lets one at a time submit.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import files, last_command
from pipeline.executor import HandedOver
from pipeline.lock import RunInUse, RunLock, refuse_others
from pipeline.stop import EXIT_STOPPED
from slurm import batches, following, queue, snapshot
from slurm.queue import Queue, Queued
from slurm.settings import DRIVER, SlurmSettings
from slurm.submission import submit

log = logging.getLogger(__name__)

_CONTINUATION = "continuation.json"
_LOCK = "driver.lock"
_BEAT_S = 1.0
_SILENT_S = 5 * _BEAT_S
"""A driver that was not seen to live for so long is taken for dead by who only wants to know."""
_LOCK_PATIENCE_S = 3600.0
"""How long a continuation waits for another driver to let go."""


class AnotherDrives(HandedOver):
    """Another process submits the jobs of this run, and goes on with it."""


@dataclass(frozen=True)
class Driver:
    """Who submits the jobs of a run."""

    folder: Path
    """The run's."""
    settings: SlurmSettings
    program: str
    """Module whose `main` takes the arguments of a command."""
    command: tuple[str, ...]
    """Arguments of the command that goes on with the run, without `--continues`."""
    drive: str
    """Names the user's command that this goes back to; attempts are counted within it."""
    waits: bool
    code: Path
    """The snapshot that jobs run from."""
    queue: Queue
    """What is with SLURM."""

    def go_on_after(self, jobs: Sequence[str], queued: Mapping[str, Sequence[Queued]]) -> str:
        """See to it that a continuation runs once `jobs` have ended, one and no more; its number.

        `queued` is the queue as it was before any of `jobs` was submitted.
        """
        path = self.folder / "slurm" / _CONTINUATION
        before = _read(path)
        waiting = _waiting(before, queued)
        if waiting and set(jobs) <= set(before["after"]) and before["command"] == [*self.command]:
            return waiting
        name = f"{DRIVER}.{secrets.token_hex(4)}"
        record: dict[str, Any] = {"name": name, "command": self.command, "after": list(jobs)}
        files.write_atomic(path, json.dumps(record))
        slurm = self.folder / "slurm"
        job = submit(
            [[*self.command, "--continues", self.drive]],
            settings=self.settings,
            resources=self.settings.resources(DRIVER).model_copy(update={"gpus": None}),
            program=self.program,
            name=name,
            folder=slurm / name,
            code=self.code,
            dependency="afterany:" + ":".join(jobs),
            use_srun=False,
            teardown=None,
            additional_parameters={
                "output": str(slurm / "driver.log"),
                "requeue": True,
                "kill-on-invalid-dep": "no",
            },
        )
        files.write_atomic(path, json.dumps({**record, "job": job}))
        if waiting:
            queue.cancel([waiting])
        _clean(slurm, keep=name)
        return job

    def finish(self) -> None:
        """Put away what is of no use once all is done."""
        slurm = self.folder / "slurm"
        if not all(batch.has_ended for batch in batches.everything(slurm)):
            for _ in batches.settle(self.folder, queue.read()):
                pass
        (slurm / _CONTINUATION).unlink(missing_ok=True)
        _clean(slurm)


@contextmanager
def driving(
    folder: Path,
    settings: SlurmSettings,
    *,
    command: Sequence[str],
    waits: bool,
    continues: str | None,
    program: str = "pipeline.__main__",
) -> Iterator[Driver]:
    """Be the driver of the run in `folder` while the block lasts.

    Raises `AnotherDrives` if there is one. A continuation (`continues` names its drive) waits for
    it instead: what that one saw may have been true before the arrays ended.
    """
    slurm = folder / "slurm"
    slurm.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = _acquire(slurm / _LOCK, patience_s=_LOCK_PATIENCE_S if continues else 0.0)
    try:
        drive = continues or secrets.token_hex(4)
        code = snapshot.take(folder)
        seen = Queue(settings.poll_seconds if waits else 0.0, is_empty=not _is_known(slurm))
        driver = Driver(folder, settings, program, tuple(command), drive, waits, code, seen)
        yield driver
        driver.finish()
    finally:
        lock.release()


def cancel(folder: Path, patience_s: float = 60.0) -> int:
    """Cancel all jobs of a run, the continuation first; how many there were.

    Asked until none is left, for a driver may be submitting at this moment. Where there were some,
    that is how the run's last command ended.
    """
    slurm = folder / "slurm"
    cancelled: set[tuple[str, int]] = set()
    stages: list[str] = []
    until = time.monotonic() + patience_s
    while True:
        live = [batch for batch in batches.everything(slurm) if not batch.has_ended]
        names = {batch.name for batch in live}
        queued = queue.read()
        stages = stages or [batch.stage for batch in live if batch.name in queued]
        drivers = [name for name in [continuation(slurm), *following.names(slurm)] if name]
        jobs = [job for name in (*drivers, *sorted(names)) for job in queued.get(name, ())]
        asked = [job for job in jobs if job.state != "COMPLETING"]
        if not jobs or time.monotonic() > until:
            break
        queue.cancel(list(dict.fromkeys(job.job for job in asked)))
        cancelled |= {(job.job, job.index) for job in jobs}
        time.sleep(1)
    if count := len(cancelled):
        why = f"`cancel` ended {count} job{'s' * (count != 1)}"
        last_command.end(folder, stages[0] if stages else "", why, EXIT_STOPPED)
    return count


def is_driven(slurm: Path) -> bool:
    """Whether a process on any machine is submitting jobs of a run, whose `RUN/slurm` this is.

    Takes some beats of its lock, if it is not on this machine.
    """
    try:
        refuse_others(slurm / _LOCK, job="nobody's", stale_s=_SILENT_S)
    except RunInUse:
        return True
    return False


def _is_known(slurm: Path) -> bool:
    """Whether anything of this run may be with SLURM."""
    live = any(not batch.has_ended for batch in batches.everything(slurm))
    return live or bool(continuation(slurm) or following.names(slurm))


def _acquire(path: Path, patience_s: float) -> RunLock:
    until = time.monotonic() + patience_s
    while True:
        try:
            return RunLock(path, beat_s=_BEAT_S)
        except RunInUse as error:
            if time.monotonic() > until:
                raise AnotherDrives(
                    f"{path.parent.parent}: another command is submitting the jobs of this run; it"
                    " goes on with it, so there is nothing left to do here"
                ) from error
            time.sleep(1)


def continuation(slurm: Path) -> str | None:
    """Name in the queue of the job that goes on with a run, whose `RUN/slurm` this is."""
    return _read(slurm / _CONTINUATION).get("name")


def _clean(slurm: Path, keep: str = "") -> None:
    """Remove submitit's files of continuations that have begun, this one's too."""
    for folder in slurm.glob(f"{DRIVER}.*"):
        if folder.is_dir() and folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)


def _waiting(record: Mapping[str, Any], queued: Mapping[str, Sequence[Queued]]) -> str | None:
    """The number of a continuation that has not begun yet."""
    for job in queued.get(record.get("name", ""), ()):
        if job.state == "PENDING":
            return job.job
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return values

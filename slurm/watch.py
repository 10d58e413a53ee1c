"""What the queue adds to a run's status: tasks that wait for nodes, and the jobs that go on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pipeline import last_command
from pipeline.lock import lives
from pipeline.manifest import find
from pipeline.status import StageStatus
from slurm import batches, driver, following, queue
from slurm.batches import Batch
from slurm.queue import Queued

_WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
Queue = Mapping[str, Sequence[Queued]]


def join(folder: Path, stages: Sequence[StageStatus]) -> tuple[list[str], bool | None]:
    """Count into `stages` what is with SLURM, and return lines about the run as a whole.

    With them, whether SLURM has jobs of the run, or somebody is about to submit some; None if that
    is not known. Costs one call of squeue; none for a run that has no jobs. Changes nothing on
    disk.
    """
    slurm = folder / "slurm"
    live = [batch for batch in batches.everything(slurm) if not batch.has_ended]
    continuation = driver.continuation(slurm)
    followers = following.names(slurm)
    said = last_command.read(folder)
    is_open = said is not None and said.on == "slurm" and said.is_open and not lives(said.process)
    if not (live or continuation or followers or is_open):
        return [], False
    try:
        queued = queue.read()
    except queue.QueueUnknown as error:
        return [f"what waits is not known: {error}"], None
    by_name = {stage.name: stage for stage in stages}
    for batch in live:
        if stage := by_name.get(batch.stage):
            _count(folder / batch.stage, stage, batch, queued)
    lines = [words for _, words in _arrays(live, queued)]
    for job in (job for name in followers for job in queued.get(name, ())):
        lines.append(f"job {job.job}: evaluates checkpoints beside training, {_state(job)}")
    after = " after these" if lines else ""
    for job in queued.get(continuation or "", ()):
        lines.append(f"job {job.job}: goes on with the run{after}, {job.state.lower()}")
    return lines, bool(lines) or (is_open and driver.is_driven(slurm))


def arrays(folder: Path) -> list[tuple[str, str]]:
    """Stage and state of each array of a run that has not ended, in words.

    Costs no call of squeue where none was submitted. Raises `QueueUnknown`.
    """
    live = [batch for batch in batches.everything(folder / "slurm") if not batch.has_ended]
    return list(_arrays(live, queue.read())) if live else []


def _arrays(live: Iterable[Batch], queued: Queue) -> Iterator[tuple[str, str]]:
    for batch in live:
        if jobs := queued.get(batch.name, ()):
            waiting = [job for job in jobs if job.state in _WAITS]
            why = f" ({waiting[0].reason})" if waiting else ""
            count = f"{len(jobs) - len(waiting)} running, {len(waiting)} waiting{why}"
            yield batch.stage, f"job {jobs[0].job}: {batch.stage}, {count}"


def _count(folder: Path, stage: StageStatus, batch: Batch, queued: Queue) -> None:
    """Count the tasks of an array that nobody works on: those to come, and those that are near.

    Of a job that runs and has nothing at work yet, one task at least is about to begin.
    """
    beating = {beat["index"] for beat in stage.running}
    for job in queued.get(batch.name, ()):
        chunk = batch.chunks[job.index]
        failed = batch.report(job.index).failed
        idle = sum(
            entry.index not in beating
            and entry.fingerprint not in failed
            and find(folder, entry.fingerprint) is None
            for entry in chunk
        )
        begins = bool(idle) and job.state not in _WAITS
        begins = begins and all(entry.index not in beating for entry in chunk)
        stage.starting += begins
        stage.queued += idle - begins


def _state(job: Queued) -> str:
    why = f" ({job.reason})" if job.state in _WAITS else ""
    return job.state.lower() + why

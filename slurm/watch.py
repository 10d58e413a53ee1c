"""What the queue adds to a run's status: tasks that wait for nodes, and the job that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.manifest import find
from pipeline.status import StageStatus
from slurm import batches, driver, queue


def join(folder: Path, stages: Sequence[StageStatus]) -> list[str]:
    """Count into `stages` what is with SLURM, and return lines about the run as a whole.

    Costs one call of squeue; none for a run that has no jobs. Changes nothing on disk.
    """
    slurm = folder / "slurm"
    live = [batch for batch in batches.everything(slurm) if not batch.has_ended]
    continuation = driver.continuation(slurm)
    if not live and continuation is None:
        return []
    try:
        queued = queue.read()
    except queue.QueueUnknown as error:
        return [f"what waits is not known: {error}"]
    by_name = {stage.name: stage for stage in stages}
    for batch in live:
        stage = by_name.get(batch.stage)
        waiting = {job.index for job in queued.get(batch.name, ())}
        if stage is None or not waiting:
            continue
        beating = {beat["index"] for beat in stage.running}
        for number in waiting:
            failed = batch.report(number).failed
            stage.queued += sum(
                entry.index not in beating
                and entry.fingerprint not in failed
                and find(folder / batch.stage, entry.fingerprint) is None
                for entry in batch.chunks[number]
            )
    lines = []
    for batch in live:
        jobs = queued.get(batch.name, ())
        if jobs:
            pending = [job for job in jobs if job.state == "PENDING"]
            why = f" ({pending[0].reason})" if pending else ""
            count = len(jobs) - len(pending)
            lines.append(
                f"job {jobs[0].job}: {batch.stage}, {count} running, {len(pending)} waiting{why}"
            )
    for job in queued.get(continuation or "", ()):
        lines.append(f"job {job.job}: goes on with the run after these, {job.state.lower()}")
    return lines

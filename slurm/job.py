"""What a job of an array does: its share of a stage's tasks, each in a supervised process."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from pipeline.executor import Ended, Outcome
from pipeline.local import LocalExecutor, LocalSettings
from pipeline.manifest import find
from pipeline.stage import Run, Stage
from pipeline.stop import EXIT_STOPPED, StopFlag
from slurm import training
from slurm.batches import Batch, Failure
from slurm.settings import SlurmSettings

_OWN_SHARE = 0.95
"""Of a job's memory, what its tasks may hold: this process needs a little itself."""


def start(program: str, arguments: Sequence[str]) -> NoReturn:
    """What every job begins with: `main(arguments)` of the module `program`, and its exit code.

    submitit's handlers of signals are gone once `main` has installed a `StopFlag`.
    """
    logging.getLogger("submitit").setLevel(logging.ERROR)
    # SystemExit, also of 0: submitit then writes no result, which nobody would read.
    sys.exit(importlib.import_module(program).main(list(arguments)))


def work(
    run: Run,
    stage: Stage,
    batch: Batch,
    number: int,
    *,
    settings: SlurmSettings,
    local: LocalSettings,
    stop: StopFlag,
    command: Sequence[str],
) -> int:
    """Do the tasks of one chunk that are still missing, as many at a time as the job has cores.

    Returns 75 if it was stopped before all had ended, else 0, also if some failed: those are in the
    chunk's report, with their reasons. Tasks that failed before this job was requeued stay failed.
    """
    if stage.spans_nodes:
        return training.work(run, stage, batch, number, stop)
    chunk = batch.chunks[number]
    report = batch.report(number)
    planned = {p.fingerprint: p for p in run.plan(stage.name)}
    folder = run.stage_folder(stage.name)
    missing = []
    for entry in chunk:
        if entry.fingerprint in report.failed or find(folder, entry.fingerprint):
            continue
        if entry.fingerprint in planned:  # else the configuration has changed meanwhile
            missing.append(planned[entry.fingerprint])
    if not missing:
        return 0
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", 1))
    workers = min(cores, len(missing))
    limits: dict[str, object] = {"workers": workers, "attempts": 1}
    limits["grace_s"] = min(local.grace_s, settings.signal_seconds * 0.8)
    if memory_gb := job_memory_gb(os.environ):
        limits["memory_gb"] = _OWN_SHARE * memory_gb / workers
    executor = LocalExecutor(
        local.model_copy(update=limits),
        stop,
        command,
        chunk[0].attempt,
        _more_memory(stage, memory_gb, workers),
    )
    stopped = False
    fingerprints = {p.task.index: p.fingerprint for p in missing}
    for outcome in executor.submit(run, stage, missing):
        if outcome is None:
            continue
        if outcome.ended is Ended.FAILED:
            report.failed[fingerprints[outcome.task.index]] = _failure(outcome)
            report.write()
        stopped = stopped or outcome.ended is Ended.STOPPED
    if stopped:
        report.stopped += 1
        report.write()
    return EXIT_STOPPED if stopped else 0


def _more_memory(stage: Stage, memory_gb: float | None, workers: int) -> str:
    if memory_gb is None:
        return ""
    among = f"for {workers} tasks at a time" if workers > 1 else "for one task at a time"
    return f"raise slurm.stages.{stage.name}.memory_gb, now {memory_gb:.3g} GiB {among}"


def _failure(outcome: Outcome) -> Failure:
    return Failure(outcome.reason, str(outcome.log), outcome.exit_code)


def job_memory_gb(environ: Mapping[str, str]) -> float | None:
    """Memory of this job on this node, GiB; None where the cluster does not ration it."""
    if per_node := int(environ.get("SLURM_MEM_PER_NODE", 0)):
        return per_node / 1024
    if per_core := int(environ.get("SLURM_MEM_PER_CPU", 0)):
        return per_core * int(environ.get("SLURM_CPUS_ON_NODE", 1)) / 1024
    return None

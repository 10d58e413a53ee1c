"""A stage that spans nodes, as one job: processes on all its nodes, which do its task together.

srun starts one a GPU and ends all when one fails. Those that stopped at a safe point end with 0 and
leave word, so that none is killed while it leaves; the job is then queued again. So it is when it
failed after it had saved a checkpoint: a node that dies costs what came after that, however often.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline import files, runner
from pipeline.config import UserError
from pipeline.executor import NEVER_RETRIED
from pipeline.lock import RunInUse
from pipeline.manifest import find
from pipeline.stage import Run, Stage
from pipeline.stop import EXIT_STOPPED, StopFlag, Stopped
from slurm.batches import Batch, Entry, Failure
from slurm.settings import Resources

log = logging.getLogger(__name__)

_FIRST_WORDS_S = 2.0
"""How long an error that may follow from another process's waits for that one to be told."""


def processes_per_node(resources: Resources) -> int:
    """One a GPU, unless it is said."""
    return resources.processes_per_node or resources.gpus or 1


def options(
    parameters: dict[str, Any], resources: Resources, run: Run, stage: Stage, batch: Batch
) -> dict[str, Any]:
    """What to submit such a job with, in submitit's words; `parameters` are those of any job."""
    each = processes_per_node(resources)
    counts = stage.nodes(run, each)
    further = {**parameters["additional_parameters"], "nodes": f"{counts[0]}-{counts[-1]}"}
    return {
        # Of processes sbatch hears nothing: it would hold the job to those that it first had room
        # for, and to as many nodes.
        "cpus_per_task": (resources.cpus or 1) * each,
        "additional_parameters": further,
        "setup": _choose(counts),
        "srun_args": [
            *parameters["srun_args"],
            *(f"--ntasks-per-node={each}", "--kill-on-bad-exit=1"),
        ],
        "teardown": [*_judge(run.stage_folder(stage.name), batch), *parameters["teardown"]],
    }


def _choose(counts: Sequence[int]) -> list[str]:
    """Shell lines before the step: of the nodes that the job has, it uses as many as will do."""
    descending = " ".join(str(count) for count in reversed(counts))
    return [
        f'for nodes in {descending}; do [ "$nodes" -le "$SLURM_JOB_NUM_NODES" ] && break; done',
        "export SLURM_NNODES=$nodes SLURM_JOB_NUM_NODES=$nodes",
    ]


def _judge(stage_folder: Path, batch: Batch) -> list[str]:
    """Shell lines after the step: what its exit code should have been."""
    stopped, began = (f'"$said".{word}' for word in ("stopped", "began"))
    # A node that was lost may not know it: its trainer lives until it has ended or been told.
    occupied = RunInUse.exit_code
    final = "|".join(str(c) for c in (0, EXIT_STOPPED, *NEVER_RETRIED) if c != occupied)
    checkpoints = shlex.quote(str(stage_folder / "checkpoints"))
    return [
        "code=$?",
        f'said={shlex.quote(str(batch.folder))}/"${{SLURM_ARRAY_TASK_ID:-0}}"',
        f"if [ -e {stopped} ]; then code={EXIT_STOPPED}; fi",
        f"saved=$(ls {checkpoints} 2>/dev/null | grep '^step-' | tail -n 1)",
        f'case "$code" in {final}) ;; {occupied}) code={EXIT_STOPPED} ;; *)',
        f'  if [ "$saved" != "$(cat {began} 2>/dev/null)" ]; then code={EXIT_STOPPED}; fi ;;',
        "esac",
        '(exit "$code")',
    ]


def work(run: Run, stage: Stage, batch: Batch, number: int, stop: StopFlag) -> int:
    """This process's part of the task. Returns 0 also if it was stopped; ends with an error's code.

    The log is RUN/<stage>/logs/<index>.log in the first process, and <index>-rank-<rank>.log.
    """
    [entry] = batch.chunks[number]
    folder = run.stage_folder(stage.name)
    planned = next((p for p in run.plan(stage.name) if p.fingerprint == entry.fingerprint), None)
    rank = int(os.environ.get("SLURM_PROCID", 0))
    said = batch.folder / str(number)
    if rank == 0:
        _begin(batch, number, folder / "checkpoints")
    if planned is None or find(folder, entry.fingerprint):
        return 0
    path = folder / "logs" / f"{entry.index:05d}{f'-rank-{rank}' if rank else ''}.log"
    with path.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    log.info("%s: job %s, attempt %d", stage.name, batch.place(number), entry.attempt)
    try:
        runner.work_on(run, stage, planned, entry.attempt, stop)
    except Stopped as words:
        name = signal.Signals(stop.signal).name if stop.signal else "another process"
        log.info("stopped by %s at a safe point: %s", name, words)
        if rank == 0:
            report = batch.report(number)
            report.stopped += 1
            report.write()
            files.write_atomic(said.with_suffix(".stopped"), "")
    except Exception as error:
        _fail(batch, number, entry, rank, path, error)
    return 0


def _begin(batch: Batch, number: int, checkpoints: Path) -> None:
    """What was said before this job was queued again counts no more."""
    said = batch.folder / str(number)
    report = batch.report(number)
    if report.failed:
        report.failed.clear()
        report.write()
    said.with_suffix(".stopped").unlink(missing_ok=True)
    saved = sorted(path.name for path in checkpoints.glob("step-*"))
    files.write_atomic(said.with_suffix(".began"), "".join(saved[-1:]))


def _fail(
    batch: Batch, number: int, entry: Entry, rank: int, path: Path, error: Exception
) -> NoReturn:
    known = isinstance(error, UserError)
    log.error("%s", error, exc_info=not known)
    if not known:  # it may be the end of another process that this one met
        time.sleep(_FIRST_WORDS_S)
    code = error.exit_code if isinstance(error, UserError) else 1
    words = str(error) if known else f"{type(error).__name__}: {error}"
    report = batch.report(number)
    if entry.fingerprint not in report.failed:
        report.failed[entry.fingerprint] = Failure(f"rank {rank}: {words}", str(path), code)
        report.write()
    logging.shutdown()
    # Not through the interpreter's end, where threads that wait for the other ranks may hang.
    os._exit(code)

"""Evaluation follows training: short jobs, one after another, while a job that spans nodes lives.

Each has resources of its own and never touches the trainer's nodes. It first submits the next one,
which begins some minutes later and after it, then looks at what training has saved by now. A driver
that waits submits them instead, for clusters whose jobs may submit none.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import files
from slurm import batches, queue
from slurm.batches import Batch
from slurm.queue import Queued
from slurm.settings import SlurmSettings
from slurm.submission import SubmissionFailed, submit

log = logging.getLogger(__name__)

_NAME = "evaluate"
"""Of the jobs, and of what they are given in `slurm.stages`."""


def see_to_it(
    batch: Batch,
    command: Sequence[str],
    *,
    settings: SlurmSettings,
    program: str,
    code: Path,
    queued: Mapping[str, Sequence[Queued]],
    goes_on: bool,
) -> tuple[str, str] | None:
    """Have a job run `command` in some minutes, unless one is `queued` that will.

    `goes_on`: whether it submits the next one. Returns name and number of what was submitted; that
    it cannot be is a warning.
    """
    folder = batch.path.parent
    if _next(folder) in queued:
        return None
    name = f"{_NAME}.{secrets.token_hex(4)}"
    files.write_atomic(folder / "follower.json", json.dumps({"name": name}))
    this = os.environ.get("SLURM_JOB_NAME")
    options = {
        "begin": f"now+{settings.evaluate_minutes}minutes",
        "output": str(folder / f"{_NAME}.log"),
        "open-mode": "append",
    }
    if this and this.startswith(f"{_NAME}."):
        options["dependency"] = f"afterany:{os.environ['SLURM_JOB_ID']}"
    try:
        job = submit(
            [[*command, *(("--follows", str(batch.path)) if goes_on else ())]],
            settings=settings,
            resources=settings.resources(_NAME),
            program=program,
            name=name,
            folder=folder / name,
            code=code,
            use_srun=False,
            teardown=None,
            additional_parameters=options,
        )
    except SubmissionFailed as error:
        log.warning("training goes on without being evaluated meanwhile: %s", error)
        return None
    minutes = settings.evaluate_minutes
    log.info("job %s evaluates the checkpoints that are there in %d minutes", job, minutes)
    for other in names(folder):
        if other not in (name, this) and other not in queued:
            shutil.rmtree(folder / other, ignore_errors=True)
    return name, job


def names(folder: Path) -> list[str]:
    """What jobs that follow may be called in the queue; `folder` is RUN/slurm."""
    return [path.name for path in folder.glob(f"{_NAME}.*") if path.is_dir()]


def go_on(
    path: Path, command: Sequence[str], settings: SlurmSettings, program: str = "pipeline.__main__"
) -> None:
    """From a job that follows: see to the next one, while the batch of the record `path` lives."""
    batch = batches.read(path)
    queued = queue.read()
    if batch.name not in queued:
        log.info("job %s has ended: these are its last checkpoints", batch.job)
        return
    this = os.environ["SLURM_JOB_NAME"]
    if _next(path.parent) != this:
        log.info("another job follows as well, and goes on")
        return
    queued.pop(this, None)
    see_to_it(
        batch,
        command,
        settings=settings,
        program=program,
        code=Path.cwd(),
        queued=queued,
        goes_on=True,
    )


def _next(folder: Path) -> str:
    """Name of the job that was submitted last."""
    try:
        name: str = json.loads((folder / "follower.json").read_text())["name"]
    except FileNotFoundError:
        return ""
    return name

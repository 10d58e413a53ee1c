"""Handing jobs to sbatch, through submitit: options, a clean environment, requeue after exit 75."""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from pipeline.config import UserError
from pipeline.stop import EXIT_STOPPED
from slurm import job, refusal
from slurm.settings import Resources, SlurmSettings

_PREFIX = re.compile(r"^(?:sbatch: |error: |Batch job submission failed: )*")
_SCRUBBED = ("SLURM", "SBATCH", "SRUN", "PMI", "SUBMITIT")


class SubmissionFailed(UserError):
    """sbatch refused a job; the message has its words, `said`, and what to change."""

    exit_code = 2

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


def submit(
    calls: Sequence[Sequence[str]],
    *,
    settings: SlurmSettings,
    resources: Resources,
    program: str,
    name: str,
    folder: Path,
    code: Path,
    **options: Any,
) -> str:
    """Submit one job, or an array of one element a call, and return its number.

    Each of `calls` is the arguments of `program`'s `main`, run in the folder `code`. `name` begins
    with the stage and a dot. `folder` gets the jobs' output and submitit's files. `options` are
    parameters of submitit, above all others. Raises `SubmissionFailed`.
    """
    import submitit

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    parameters = {**parameters_of(settings, resources), "job_name": name, **options}
    changed = f"cd {shlex.quote(str(code))}"
    parameters["setup"] = [*settings.setup, changed, *options.get("setup", ())]
    parameters["array_parallelism"] = len(calls)
    try:
        # submitit prints sbatch's error and raises it: it is told once, by whoever catches it.
        with clean_environment(), redirect_stderr(io.StringIO()):
            executor = submitit.SlurmExecutor(folder=folder)
            executor.update_parameters(**parameters)
            jobs = executor.map_array(job.start, [program] * len(calls), calls)
    except Exception as error:  # submitit raises plain RuntimeErrors and its own alike
        said = _words(str(error)) or type(error).__name__
        stage = name.partition(".")[0]
        advice = refusal.advice(said, stage, settings)
        raise SubmissionFailed(
            f"{stage}: sbatch refused its jobs: {said}; {advice}", said
        ) from None
    number: str = jobs[0].job_id.partition("_")[0]
    return number


def _words(text: str) -> str:
    """What sbatch says is wrong, in one line and without what it says of every error."""
    lines = [_PREFIX.sub("", line).strip() for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))[:300]


@contextmanager
def clean_environment() -> Iterator[None]:
    """Without the variables of a job that this runs in: they would become those of the next one.

    `SLURM_CONF`, which says where the cluster is, stays.
    """
    inner = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(_SCRUBBED) and name != "SLURM_CONF"
    }
    try:
        yield
    finally:
        os.environ.update(inner)


def parameters_of(settings: SlurmSettings, resources: Resources) -> dict[str, Any]:
    """What a job asks for, in submitit's words for the options of sbatch."""
    signal_s = settings.signal_seconds
    if resources.time_minutes:  # else a short job would be told to stop as it begins
        signal_s = min(signal_s, resources.time_minutes * 60 // 4)
    values = {
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "time": resources.time_minutes,
        "cpus_per_task": resources.cpus,
        "mem": None if resources.memory_gb is None else f"{int(resources.memory_gb * 1024)}M",
        "gpus_per_node": resources.gpus or None,
        "constraint": resources.constraint,
        "wckey": None,
        "stderr_to_stdout": True,
        "additional_parameters": {
            "signal": f"USR2@{signal_s}",
            "requeue": True,
            **_further(resources.extra),
        },
        # A step, so that the signal reaches it; srun does not take the job's cores by itself.
        "srun_args": [f"--cpus-per-task={resources.cpus or 1}", "--open-mode=append"],
        "teardown": _requeue_lines(settings.max_requeues),
    }
    # These have defaults in submitit, of which "not said" is no part.
    return {k: v for k, v in values.items() if v is not None or k in ("time", "wckey")}


def _further(extra: Sequence[str]) -> Mapping[str, str | bool]:
    pairs = (option.removeprefix("--").partition("=") for option in extra)
    return {name: value if equals else True for name, equals, value in pairs}


def _requeue_lines(most: int) -> list[str]:
    """Shell lines after the step: one that stopped at a safe point is queued again.

    scancel ends this shell too, so a cancelled job stays cancelled.
    """
    return [
        "code=$?",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}",
        f'if [ "$code" -eq {EXIT_STOPPED} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ]; then',
        '  scontrol requeue "${job:-$SLURM_JOB_ID}"',
        "fi",
        'exit "$code"',
    ]

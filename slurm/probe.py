"""Jobs that look around: submitted as those of a run are, they say what they see where they run."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline import files
from pipeline.config import UserError
from slurm import queue, refusal, submission
from slurm.settings import DRIVER, Resources, SlurmSettings

_ROOT = Path(__file__).parent.parent
_NAME = "openwit-check"
_VISIBLE_S = 30
"""How long what a node wrote may take to be seen here; NFS remembers for up to a minute."""


@dataclass(frozen=True)
class Seen:
    """What one job found."""

    stages: tuple[str, ...]
    fault: str = ""
    """Why there is no answer; then the fields below say nothing."""
    advice: str = ""
    host: str = ""
    python: str = ""
    seconds: float = 0.0
    """From submission to answer."""
    asked_gpus: int = 0
    """GPUs that the job asked for."""
    gpus: int = 0
    """GPUs that SLURM says it has."""
    torch_gpus: int = 0
    """GPUs that PyTorch sees; looked for only where some were asked for."""
    cannot_requeue: str = ""
    """What scontrol said that kept the job from asking for itself."""
    submits: bool = False
    """Whether it tried to submit a job, as those do that start the next stage."""
    cannot_submit: str = ""


def run(
    asked: Mapping[str, Resources], settings: SlurmSettings, place: Path, patience_s: float
) -> list[Seen]:
    """Submit one job for each kind of resources among `asked` (stage to resources) and wait.

    Their files are in a folder of their own in `place`, which goes when they have ended.
    """
    kinds: dict[Resources, tuple[str, ...]] = {}
    for stage, resources in asked.items():
        kinds[resources] = (*kinds.get(resources, ()), stage)
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".slurm-check-", dir=place.absolute()))
    (folder / "settings.json").write_text(settings.model_dump_json())
    seen, jobs = [], []
    try:
        for number, (resources, stages) in enumerate(kinds.items()):
            own = folder / str(number)
            try:
                job = submission.submit(
                    [[str(folder), str(number), str(resources.gpus or 0), *stages]],
                    settings=settings,
                    resources=resources,
                    program=__name__,
                    name=_NAME,
                    folder=own,
                    code=_ROOT,
                )
            except submission.SubmissionFailed as error:
                seen.append(
                    Seen(stages, error.said, refusal.advice(error.said, stages[0], settings))
                )
            else:
                jobs.append((job, stages, own))
        seen += [_wait(*job, time.monotonic(), patience_s) for job in jobs]
    finally:
        queue.cancel([job for job, _, _ in jobs])
        shutil.rmtree(folder, ignore_errors=True)
    return seen


def _wait(job: str, stages: tuple[str, ...], own: Path, began: float, patience_s: float) -> Seen:
    """What a job wrote to `own`.json, or why it did not."""
    answer = own.with_suffix(".json")
    ended = math.inf
    while not answer.exists():
        now = time.monotonic()
        queued = [entry for entry in queue.read().get(_NAME, []) if entry.job == job]
        if not queued and (_failed(job, own) or now > (ended := min(ended, now)) + _VISIBLE_S):
            return _unanswered(job, stages, own)
        waits = queued and queued[0].state == "PENDING"
        if waits and now > began + patience_s:
            reason = f"still waits after {patience_s:g} s: {queued[0].reason}"
            advice = "ask again when the cluster is less busy, or change what jobs ask for"
            return Seen(stages, reason, advice)
        time.sleep(1 if now < began + 60 else 10)
        list(own.parent.iterdir())  # NFS then asks the server for what is new
    values = json.loads(answer.read_text())
    return Seen(**{**values, "stages": stages, "seconds": time.monotonic() - began})


def _failed(job: str, own: Path) -> bool:
    """Whether a job has said all that it will: it failed, and its log is here."""
    states = [end.state for end in queue.ends(job).values()]
    return bool(states) and states != ["COMPLETED"] and any(own.glob("*.out"))


def _unanswered(job: str, stages: tuple[str, ...], own: Path) -> Seen:
    states = [f"{end.state}, exit code {end.code}" for end in queue.ends(job).values()]
    ending = f"ended as {states[0]}" if states else "ended"
    logs = [path.read_text(errors="replace") for path in own.glob("*.out")]
    if not logs:
        return Seen(
            stages,
            f"{ending}; nothing that it wrote is here in {own.parent.parent}",
            "put runs into a folder that is the same on all nodes",
        )
    words = logs[0].strip().splitlines() or ["none"]
    return Seen(
        stages,
        f"{ending}; its last words: {words[-1][:300]}",
        f"the project must be on all nodes as it is here ({_ROOT}), with the Python that runs this;"
        " what they need before that, such as `module load`, is slurm.setup",
    )


def main(arguments: Sequence[str]) -> int:
    """In the job: look around and write down what is seen."""
    folder, number, asked_gpus, *stages = arguments
    settings = SlurmSettings.model_validate_json((Path(folder) / "settings.json").read_text())
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("ROCR_VISIBLE_DEVICES", "")
    seen = Seen(
        tuple(stages),
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        python=platform.python_version(),
        asked_gpus=int(asked_gpus),
        gpus=len(given.split(",")) if given else 0,
        torch_gpus=_torch_gpus() if int(asked_gpus) else 0,
        cannot_requeue=_said(lambda: queue.output(["scontrol", "show", "job", _own_number()])),
        submits=DRIVER in stages,
    )
    if seen.submits:
        seen = replace(seen, cannot_submit=_said(lambda: _submit_one(Path(folder), settings)))
    files.write_atomic(Path(folder) / f"{number}.json", json.dumps(asdict(seen)))
    return 0


def _said(act: Callable[[], object]) -> str:
    """The words of the `UserError` that something ends with; empty if it ends well."""
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def _own_number() -> str:
    """This job as `scontrol requeue` must name it."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _submit_one(folder: Path, settings: SlurmSettings) -> None:
    """Submit a job as those that start the next stage do, held so that it never runs."""
    resources = settings.resources(DRIVER)
    job = submission.submit(
        [[]],
        settings=settings,
        resources=resources.model_copy(update={"extra": (*resources.extra, "--hold")}),
        program=__name__,
        name=_NAME,
        folder=folder / "held",
        code=_ROOT,
    )
    queue.cancel([job])


def _torch_gpus() -> int:
    import torch

    return torch.cuda.device_count()

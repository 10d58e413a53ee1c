"""Jobs that look around: submitted as those of a run are, they say what they see where they run."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline import files
from pipeline.config import UserError
from slurm import queue, submission
from slurm.settings import DRIVER, Resources, SlurmSettings

_ROOT = Path(__file__).parent.parent
_MINUTES = 5
"""Time limit of these jobs: short, so that they fit into gaps of the schedule."""
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
    gpus: int = 0
    """GPUs that the job was given."""
    torch_gpus: int = 0
    """GPUs that PyTorch sees; only asked for where some were given."""
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
    jobs: dict[str, tuple[str, ...]] = {}
    seen = []
    began = time.monotonic()
    try:
        for number, (resources, stages) in enumerate(kinds.items()):
            short = min(_MINUTES, resources.time_minutes or _MINUTES)
            try:
                job = submission.submit(
                    [[str(folder), str(number), *stages]],
                    settings=settings,
                    resources=resources.model_copy(update={"time_minutes": short}),
                    program=__name__,
                    name="openwit-check",
                    folder=folder / str(number),
                    code=_ROOT,
                )
            except submission.SubmissionFailed as error:
                advice = f"change what slurm asks for {', '.join(stages)}"
                seen.append(Seen(stages, str(error), advice))
            else:
                jobs[job] = stages
                seen.append(_wait(job, stages, folder, number, began, patience_s))
    finally:
        queue.cancel(list(jobs))
        shutil.rmtree(folder, ignore_errors=True)
    return seen


def main(arguments: Sequence[str]) -> int:
    """In the job: look around and write down what is seen."""
    folder, number, *stages = arguments
    settings = SlurmSettings.model_validate_json((Path(folder) / "settings.json").read_text())
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("ROCR_VISIBLE_DEVICES", "")
    gpus = len(given.split(",")) if given else 0
    seen = Seen(
        tuple(stages),
        host=socket.gethostname(),
        python=platform.python_version(),
        gpus=gpus,
        torch_gpus=_torch_gpus() if gpus else 0,
        cannot_requeue=_said(lambda: queue.output(["scontrol", "show", "job", _own_number()])),
        submits=DRIVER in stages,
    )
    if seen.submits:
        seen = replace(seen, cannot_submit=_said(lambda: _submit_one(Path(folder), settings)))
    files.write_atomic(Path(folder) / f"{number}.json", json.dumps(asdict(seen)))
    return 0

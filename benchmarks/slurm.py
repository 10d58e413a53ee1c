"""What a tiny task costs on a cluster, beside submitit's `map_array` with a job a task.

A real SLURM of fake nodes on this machine, with as many jobs at a time as cores. Tasks do nothing,
so all that is measured is what lies around them. `OPENWIT_TASKS` sets how many there are.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from tests.cluster import local_slurm
from tests.slurm import toy
from tests.slurm.calls import calls, counted

_TASKS = int(os.environ.get("OPENWIT_TASKS", 2000))
_PEER_TASKS = min(_TASKS, 64)
_JOBS = os.cpu_count() or 1
_PEER = """
import sys, submitit
executor = submitit.SlurmExecutor(folder=sys.argv[1])
executor.update_parameters(time=30, array_parallelism=int(sys.argv[3]), use_srun=False)
jobs = executor.map_array(abs, range(int(sys.argv[2])))
assert [job.result() for job in jobs] == list(range(int(sys.argv[2])))
"""


def measure() -> Iterator[dict[str, Any]]:
    """Seconds and files a task, and what the controller is asked."""
    with local_slurm.start(2) as cluster, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = counted(folder / "bin")
        variables = {
            **cluster.environment,
            "PATH": f"{path}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        with mock.patch.dict(os.environ, variables, clear=True):
            peer_s = _peer(folder / "peer")
            peer_calls, peer_files = calls(path), _files(folder / "peer")
            (path / "calls").unlink()
            wall_s, driver_s = _ours(folder)
        made, files = calls(path), _files(folder / "run" / "slurm")
    sizes = {"tasks": _TASKS, "jobs": _JOBS, "peer_tasks": _PEER_TASKS}
    rows: list[tuple[str, float, float | None, str]] = [
        ("wall time", wall_s / _TASKS, peer_s / _PEER_TASKS, "s a task"),
        ("the driver's processor time", driver_s / _TASKS, None, "s a task"),
        ("files left beside the outputs", files / _TASKS, peer_files / _PEER_TASKS, "a task"),
    ]
    for command in ("squeue", "sacct", "scontrol", "sbatch"):
        ours, peer = made[command] * 60 / wall_s, peer_calls[command] * 60 / peer_s
        rows.append((command, ours, peer, "calls a minute"))
    for what, mine, theirs, unit in rows:
        ratio = round(theirs / mine, 2) if theirs and mine else None
        row = {
            "name": f"slurm: {what}",
            "ours": round(mine, 5),
            "peer": theirs and round(theirs, 5),
        }
        yield {**row, "ratio": ratio, "unit": unit, **sizes}


def _ours(folder: Path) -> tuple[float, float]:
    """Wall seconds of a run, and processor seconds of its waiting driver."""
    slurm = {"max_submitted": _JOBS, "default": {"cpus": 1}}
    config = folder / "toy.yaml"
    config.write_text(yaml.safe_dump({"numbers": {"count": _TASKS}, "slurm": slurm}))
    command = [sys.executable, "-m", toy.PROGRAM, "build", str(config)]
    command += ["--run", str(folder / "run"), "--on", "slurm", "--wait"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    subprocess.run(command, check=True)
    wall_s = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall_s, used


def _peer(folder: Path) -> float:
    began = time.monotonic()
    command = [sys.executable, "-c", _PEER, str(folder), str(_PEER_TASKS), str(_JOBS)]
    subprocess.run(command, check=True)
    return time.monotonic() - began


def _files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))

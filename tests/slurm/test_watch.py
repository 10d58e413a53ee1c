"""Watching a run on a cluster: the disk and one question to the queue."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.calls import calls, counted
from tests.slurm.conftest import ROOT, ToyRun

pytestmark = pytest.mark.slurm


def ask(path: Path, *arguments: str) -> str:
    """Output of a command of `python -m pipeline`, with `path` before the others."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_status_says_what_runs_and_what_waits_with_one_call_of_squeue(
    toy_run: ToyRun, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    # 12 of a node's 16 GiB each: four of the six jobs have a node.
    slurm = {"default": {"memory_gb": 12}}
    toy_run.configure({"count": 6, "slow": list(range(6))}, slurm)
    toy_run.build()
    wait_for(lambda: sum(toy_run.tallies) == 4, "four tasks to begin")
    path = counted(tmp_path / "bin")
    said = ask(path, "status", str(toy_run.folder))
    assert calls(path) == {"squeue": 1}
    numbers = next(line for line in said.splitlines() if line.startswith("numbers"))
    assert "running" in numbers and "4 tasks: " in numbers and "2 queued" in numbers
    (batch,) = toy_run.batches()
    assert f"job {batch.job}: numbers, 4 running, 2 waiting (Resources)" in said
    assert "goes on with the run after these, pending" in said
    toy_run.hurry()
    wait_for(lambda: toy_run.total == 15, "the run to end")


def test_status_of_what_has_ended_asks_nobody_and_logs_show_why(
    toy_run: ToyRun, tmp_path: Path
) -> None:
    toy_run.configure({"count": 3, "faults": {1: "raise"}, "times": 9}, {"attempts": 1})
    code, _ = toy_run.build("--wait")
    assert code == 4
    path = counted(tmp_path / "bin")
    said = ask(path, "status", str(toy_run.folder))
    log = toy_run.folder / "numbers/logs/00001.log"
    assert "failed" in said and f"the fault that was asked for; log: {log}" in said
    for arguments in (("numbers",), ("numbers", "1")):
        shown = ask(path, "logs", str(toy_run.folder), *arguments)
        assert str(log) in shown and "Traceback" in shown
    assert not calls(path)


def test_a_waiting_driver_asks_the_queue_as_seldom_as_it_is_told(
    toy_run: ToyRun, tmp_path: Path
) -> None:
    toy_run.configure({"count": 4}, {"poll_seconds": 2})
    path = counted(tmp_path / "bin")
    driver = toy_run.start("--wait", path=path)
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    made = calls(path)
    assert made["sacct"] == made["scontrol"] == 0 and made["sbatch"] == 2
    looks = made["squeue"]
    log_lines = [line[:20] for line in said.splitlines()]
    assert looks <= 4 + _seconds(log_lines[0], log_lines[-1]) / 2 + 3, (looks, said)


def _seconds(first: str, last: str) -> float:
    from datetime import datetime

    form = "%Y-%m-%dT%H:%M:%SZ"
    return (datetime.strptime(last, form) - datetime.strptime(first, form)).total_seconds()

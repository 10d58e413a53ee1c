"""How jobs end on a real scheduler, and what is run again afterwards: only what is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from slurm.driver import cancel
from tests.cluster.keeper import descendants, environment
from tests.cluster.local_slurm import Cluster
from tests.slurm.conftest import ROOT, ToyRun

pytestmark = pytest.mark.slurm
Wait = Callable[..., None]


def begun(run: ToyRun, tasks: int) -> Callable[[], bool]:
    return lambda: sum(run.tallies) >= tasks


def queued(cluster: Cluster) -> list[str]:
    return cluster.run("squeue", "--noheader", "--array", "--format=%F_%K").split()


def test_tasks_that_raise_die_or_take_too_much_memory_are_tried_again(toy_run: ToyRun) -> None:
    faults = {1: "raise", 2: "kill", 3: "memory"}
    slurm = {"tasks_per_job": 3, "default": {"cpus": 2, "memory_gb": 0.5}}
    toy_run.configure({"count": 6, "faults": faults}, slurm)
    code, said = toy_run.build("--wait")
    assert code == 0, said
    assert toy_run.total == 15 and toy_run.tallies == [1, 2, 2, 2, 1, 1]
    first, second = toy_run.batches()
    reasons = [failure.reason for failure in first.failed.values()]
    limit = "memory limit is 0.2375 GiB; raise slurm.stages.numbers.memory_gb, now 0.5 GiB for 2"
    assert any(limit in reason for reason in reasons), reasons
    sizes = sorted(len(chunk) for chunk in second.chunks)
    assert sizes == [1, 1, 1], "what was killed may take its job along: it is alone"


def test_a_job_that_slurm_kills_for_memory_says_so_and_what_to_raise(toy_run: ToyRun) -> None:
    # By itself a task of these is over so soon that nobody may have looked.
    numbers = {"count": 1, "faults": {0: "memory"}}
    toy_run.configure(numbers, {"attempts": 1, "default": {"memory_gb": 0.02}})
    code, said = toy_run.build("--wait")
    assert code == 4, said
    # By slurmd, or by the executor in the job, whichever looks first.
    assert "killed for memory" in said and "limit" in said, said
    assert "raise slurm.stages.numbers.memory_gb" in said
    assert "numbers: job" in said and "has 1 task in 1 part\n" in said


def test_a_task_that_always_fails_ends_the_run_with_its_log(
    toy_run: ToyRun, cluster: Cluster, wait_for: Wait
) -> None:
    faults = {1: "raise", 3: "missing"}
    numbers = {"count": 4, "faults": faults, "times": 2}
    toy_run.configure(numbers, {"attempts": 2})
    toy_run.build()
    wait_for(lambda: "2 task(s) failed" in toy_run.driver_log, "the last driver")
    assert toy_run.tallies == [1, 2, 1, 1], "a missing input is not tried again"
    log = toy_run.folder / "numbers/logs/00001.log"
    assert f"task 1: ValueError: the fault that was asked for; log: {log}" in toy_run.driver_log
    assert log.read_text().count("Traceback") == 2
    wait_for(lambda: not queued(cluster), "the last driver to end")
    assert toy_run.total is None
    # The same command tries them again; here with success, because the fault shows twice only.
    toy_run.configure({**numbers, "faults": {1: "raise"}}, {"attempts": 2})
    code, said = toy_run.build("--wait")
    assert code == 0 and toy_run.total == 6, said
    assert toy_run.tallies == [1, 3, 1, 2]


def test_the_exit_code_of_failed_tasks_is_4_and_a_share_of_them_may_be_left_out(
    toy_run: ToyRun,
) -> None:
    numbers = {"count": 4, "faults": {2: "raise"}, "times": 9}
    toy_run.configure(numbers, {"attempts": 1}, max_failed_tasks=0.2)
    code, said = toy_run.build("--wait")
    assert code == 4 and "numbers/logs/00002.log" in said and toy_run.total is None
    toy_run.configure(numbers, {"attempts": 1}, max_failed_tasks=0.25)
    code, said = toy_run.build("--wait")
    assert code == 0 and toy_run.total == 4, said
    assert "1 of 4 tasks are left out" in said and toy_run.tallies == [1, 1, 2, 1]


def test_jobs_that_are_killed_as_a_whole_run_again_what_they_left(
    toy_run: ToyRun, cluster: Cluster, wait_for: Wait
) -> None:
    """One as the kernel does it that is out of memory, and one by power loss: SLURM itself queues
    that again."""
    toy_run.configure({"count": 6, "slow": [1, 4]}, {"tasks_per_job": 3})
    driver = toy_run.start("--wait")
    wait_for(begun(toy_run, 4), "two tasks of each job to begin")
    (batch,) = toy_run.batches()
    for pid in descendants(cluster.keeper.pid):
        variables = environment(pid)
        job, index = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
        if (job, index) == (batch.job, "1") and "SUBMITIT_EXECUTOR" in variables:
            with suppress(ProcessLookupError):  # SLURM ends what a dead one leaves
                os.kill(pid, signal.SIGKILL)
    wait_for(lambda: f"{batch.job}_1" not in queued(cluster), "the second job to die")
    (node,) = (job["BatchHost"] for job in cluster.jobs(f"{batch.job}_0"))
    cluster.kill_node(node)
    toy_run.hurry()
    said, _ = driver.communicate(timeout=150)
    cluster.start_node(node)
    assert driver.returncode == 0, said
    assert toy_run.total == 15 and toy_run.tallies == [1, 2, 1, 1, 2, 1]
    failed = toy_run.batches()[0].failed
    assert len(failed) == 2, "the task that ran and the one that had not begun"
    for failure in failed.values():
        assert "ended as FAILED" in failure.reason and Path(failure.log).exists()


def test_a_preempted_job_stops_at_a_safe_point_and_goes_on(
    toy_run: ToyRun, cluster: Cluster, wait_for: Wait
) -> None:
    toy_run.configure({"count": 3, "slow": [1]}, {"tasks_per_job": 3})
    toy_run.build()
    wait_for(begun(toy_run, 2), "the second task to begin")
    urgent = cluster.occupy()
    cluster.wait(urgent, "RUNNING")
    assert toy_run.tallies == [1, 1]
    toy_run.hurry()
    cluster.run("scancel", urgent)
    wait_for(lambda: toy_run.total == 3, "the run to end")
    assert toy_run.tallies == [1, 2, 1]
    assert [len(batch.chunks) for batch in toy_run.batches()] == [1], "the same job, queued again"


def test_a_job_at_its_time_limit_stops_at_a_safe_point_and_goes_on(
    toy_run: ToyRun, cluster: Cluster, wait_for: Wait
) -> None:
    resources = {"time_minutes": 1, "extra": ["--signal=USR2@58"]}
    toy_run.configure({"count": 3, "slow": [1]}, {"tasks_per_job": 3, "default": resources})
    driver = toy_run.start("--wait")
    wait_for(begun(toy_run, 2), "the second task to begin")
    (batch,) = toy_run.batches()
    job = str(batch.job)
    wait_for(lambda: cluster.jobs(job)[0]["Restarts"] == "1", "SLURM's signal and a new start")
    toy_run.hurry()
    said, _ = driver.communicate(timeout=100)
    assert driver.returncode == 0, said
    assert toy_run.total == 3 and toy_run.tallies == [1, 2, 1]
    assert len(toy_run.batches()) == 1


def test_what_a_user_cancels_stays_cancelled(
    toy_run: ToyRun, cluster: Cluster, wait_for: Wait
) -> None:
    toy_run.configure({"count": 3, "slow": [0, 1, 2]})
    toy_run.build()
    wait_for(begun(toy_run, 3), "the tasks to begin")
    (batch,) = toy_run.batches()
    cluster.run("scancel", f"{batch.job}_1")
    wait_for(lambda: f"{batch.job}_1" not in queued(cluster), "the job to end")
    toy_run.hurry()
    wait_for(lambda: "stopped by scancel" in toy_run.driver_log, "the continuation")
    wait_for(lambda: not queued(cluster), "an empty queue")
    assert toy_run.tallies == [1, 1, 1] and toy_run.total is None
    code, said = toy_run.build("--wait")
    assert code == 0 and toy_run.total == 3, said
    assert toy_run.tallies == [1, 2, 1]


def test_cancel_ends_the_jobs_and_their_continuation(
    toy_run: ToyRun, cluster: Cluster, wait_for: Wait
) -> None:
    toy_run.configure({"count": 2, "slow": [0, 1]})
    toy_run.build()
    wait_for(begun(toy_run, 1), "a task to begin")
    assert cancel(toy_run.folder) == 3, "two jobs and the continuation"
    assert not queued(cluster) and cancel(toy_run.folder) == 0
    assert len(toy_run.batches()) == 1
    driver = toy_run.start("--wait")
    wait_for(lambda: sum(toy_run.tallies) >= 3, "a task to begin again")
    command = [sys.executable, "-m", "pipeline", "cancel", str(toy_run.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 jobs cancelled")
    said, _ = driver.communicate(timeout=60)
    assert driver.returncode == 75 and "stopped by scancel" in said

"""Tasks as job arrays, on a real scheduler: each runs once, whoever drives, however many."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.local_slurm import Cluster
from tests.slurm.conftest import ToyRun

pytestmark = pytest.mark.slurm
Wait = Callable[..., None]


def queue_is_empty(cluster: Cluster) -> bool:
    return not cluster.run("squeue", "--noheader")


def test_a_run_goes_on_by_itself_once_it_is_submitted(
    toy_run: ToyRun, cluster: Cluster, wait_for: Wait
) -> None:
    toy_run.configure({"count": 5})
    code, said = toy_run.build()
    assert code == 0 and "goes on from there" in said
    wait_for(lambda: toy_run.total == 10 and queue_is_empty(cluster), "the run to end")
    assert toy_run.tallies == [1] * 5
    left = sorted(path.name for path in (toy_run.folder / "slurm").iterdir())
    assert left == ["driver.log", "numbers-00000.json", "total-00000.json"]
    for name in ("slurm", "code"):
        assert stat.S_IMODE((toy_run.folder / name).stat().st_mode) == 0o700
    code, said = toy_run.build()
    assert code == 0 and "job" not in said and toy_run.tallies == [1] * 5


def test_two_drivers_at_once_run_every_task_once(toy_run: ToyRun, wait_for: Wait) -> None:
    toy_run.configure({"count": 6, "slow": [0]})
    first = toy_run.start("--wait")
    wait_for(lambda: toy_run.batches(), "the first to submit")
    second = [toy_run.start(), toy_run.start("--wait")]
    for driver in second:
        said, _ = driver.communicate(timeout=60)
        assert driver.returncode == 0 and "another command is submitting the jobs" in said
    toy_run.hurry()
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert toy_run.total == 15 and toy_run.tallies == [1] * 6


def test_a_command_repeated_while_jobs_run_submits_nothing_again(
    toy_run: ToyRun, cluster: Cluster, wait_for: Wait
) -> None:
    toy_run.configure({"count": 4, "slow": [0, 1, 2, 3]})
    toy_run.build()
    before = cluster.run("squeue", "--noheader", "--array", "--format=%F %K").splitlines()
    code, said = toy_run.build()
    assert code == 0 and "4 tasks are with SLURM" in said
    after = cluster.run("squeue", "--noheader", "--array", "--format=%F %K").splitlines()
    assert sorted(after) == sorted(before), "four jobs and one continuation, as before"
    toy_run.hurry()
    wait_for(lambda: toy_run.total == 6, "the run to end")
    assert toy_run.tallies == [1] * 4


def test_more_tasks_than_the_queue_takes_go_in_waves(toy_run: ToyRun, cluster: Cluster) -> None:
    limits = {"max_array": 3, "max_submitted": 5}
    toy_run.configure({"count": 13}, limits)
    driver = toy_run.start("--wait")
    most = 0
    while driver.poll() is None:
        queued = cluster.run("squeue", "--noheader", "--array", "--format=%j").split()
        most = max(most, sum(name.startswith("numbers") for name in queued))
    said, _ = driver.communicate()
    assert driver.returncode == 0, said
    assert toy_run.tallies == [1] * 13
    sizes = [len(batch.chunks) for batch in toy_run.batches()]
    assert max(sizes) == 3 and sum(sizes) == 13 and sizes[:2] == [3, 2]
    assert 3 <= most <= 5


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_driver_killed_while_it_submits_leaves_no_task_out_and_none_twice(
    toy_run: ToyRun, tmp_path: Path, when: str
) -> None:
    """sbatch's answer is lost: the array may be there or not; its name tells."""
    toy_run.configure({"count": 3})
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    real = {"before": "", "after": '/usr/bin/sbatch "$@"\n'}[when]
    wrapper.write_text(f"#!/bin/bash\n{real}kill -9 $PPID\n")
    wrapper.chmod(0o755)
    code, _ = toy_run.build("--wait", path=wrapper.parent)
    assert code == -9 and [batch.job for batch in toy_run.batches()] == [None]
    code, said = toy_run.build("--wait")
    assert code == 0, said
    assert toy_run.total == 3 and len(toy_run.batches()) == 1
    assert toy_run.tallies == [1] * 3


def test_jobs_of_many_tasks_do_as_many_at_a_time_as_they_have_cores(toy_run: ToyRun) -> None:
    slurm = {"tasks_per_job": "auto", "max_submitted": 2, "default": {"cpus": 2}}
    toy_run.configure({"count": 8}, slurm)
    code, said = toy_run.build("--wait")
    assert code == 0, said
    (batch,) = toy_run.batches()
    assert [len(chunk) for chunk in batch.chunks] == [4, 4] and toy_run.tallies == [1] * 8


def test_what_sbatch_refuses_is_said(toy_run: ToyRun) -> None:
    toy_run.configure(slurm={"default": {"partition": "nowhere"}})
    code, said = toy_run.build()
    assert code == 2 and "invalid partition specified: nowhere" in said
    assert "Traceback" not in said

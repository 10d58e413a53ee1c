"""A run on a cluster that has ended says so in its status, and why, whoever ended it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.commands import advance, look
from pipeline.config import Settings
from pipeline.lock import RunInUse
from pipeline.stage import Run
from pipeline.status import StageStatus
from slurm import batches, queue, watch
from slurm.batches import Entry
from slurm.driver import cancel, continuation
from slurm.queue import Queued
from tests.cluster.local_slurm import Cluster
from tests.slurm.conftest import ToyRun
from tests.slurm.test_ends import queued
from tests.slurm.test_watch import ask

Wait = Callable[..., None]


def is_idle(cluster: Cluster) -> bool:
    return not cluster.run("squeue", "--noheader")


def end(run: ToyRun) -> str:
    """What `status` says of how the run ended; the line after it, of what goes on."""
    *_, stopped, again = ask(Path("/"), "status", str(run.folder)).splitlines()
    assert again == f"to go on: make build-dataset RUN={run.folder} ON=slurm"
    return stopped


@pytest.mark.slurm
def test_a_driver_that_fails_overnight_is_in_the_status(
    toy_run: ToyRun, cluster: Cluster, wait_for: Wait
) -> None:
    toy_run.configure(slurm={"stages": {"total": {"partition": "nowhere"}}})
    code, _ = toy_run.build()
    assert code == 0
    wait_for(lambda: "partition" in toy_run.driver_log, "the continuation")
    wait_for(lambda: is_idle(cluster), "its end")
    stopped = end(toy_run)
    assert stopped.startswith("the run stopped at total (") and ", exit code 2): " in stopped
    assert "partition" in stopped
    toy_run.configure()
    code, said = toy_run.build("--wait")
    assert code == 0, said
    assert "stopped" not in ask(Path("/"), "status", str(toy_run.folder))


@pytest.mark.slurm
def test_what_is_cancelled_says_by_what(toy_run: ToyRun, cluster: Cluster, wait_for: Wait) -> None:
    toy_run.configure({"count": 2, "slow": [0, 1]})
    toy_run.build()
    wait_for(lambda: sum(toy_run.tallies) == 2, "the tasks to begin")
    assert "the run stopped" not in ask(Path("/"), "status", str(toy_run.folder))
    assert cancel(toy_run.folder) == 3
    stopped = end(toy_run)
    assert stopped.startswith("the run stopped at numbers (")
    assert stopped.endswith("exit code 75): `cancel` ended 3 jobs")
    toy_run.build()
    wait_for(lambda: sum(toy_run.tallies) == 4, "the tasks to begin again")
    task = f"{toy_run.batches()[-1].job}_1"
    cluster.run("scancel", task)
    wait_for(lambda: task not in queued(cluster), "the job to end")
    toy_run.hurry()
    wait_for(lambda: "stopped by scancel" in toy_run.driver_log, "the continuation")
    wait_for(lambda: is_idle(cluster), "its end")
    assert end(toy_run).endswith("stopped by scancel, which ended jobs of numbers")


@pytest.mark.slurm
def test_that_nobody_goes_on_is_said_where_nobody_could_record_it(
    toy_run: ToyRun, cluster: Cluster, wait_for: Wait
) -> None:
    toy_run.configure({"count": 1, "slow": [0]})
    toy_run.build()
    wait_for(lambda: sum(toy_run.tallies) == 1, "the task to begin")
    name = continuation(toy_run.folder / "slurm")
    cluster.run("scancel", f"--name={name}")
    toy_run.hurry()
    wait_for(lambda: is_idle(cluster), "the jobs to end")
    stopped = end(toy_run)
    assert stopped.startswith("the run stopped, and nobody has recorded why: `build`, process")
    assert "slurm/driver.log may say more" in stopped


def test_evaluation_beside_training_is_in_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stages.json").write_text(json.dumps([{"name": "train", "unit": "samples"}]))
    (tmp_path / "slurm" / "evaluate.00000000").mkdir(parents=True)
    waits = [Queued("9", 0, "PENDING", "BeginTime")]
    monkeypatch.setattr(queue, "read", lambda: {"evaluate.00000000": waits})
    (tmp_path / "evaluate").mkdir()
    rows = [{"step": s, "datasets": {"cats": {"top1": s / 1000}}} for s in (100, 345)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "evaluate" / "by_step.jsonl").write_text(text)
    look.status(argparse.Namespace(run=tmp_path))
    said = capsys.readouterr().out
    assert "job 9: evaluates checkpoints beside training, pending (BeginTime)\n" in said
    assert "top-1 at step 345: cats 34.5 %; all 2 checkpoints that were evaluated: " in said


def test_training_here_while_a_cluster_is_to_train_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batches.intend(tmp_path / "slurm", "train", "drive", [[Entry(0, "a", 1)]])
    waits = {batch.name: [Queued("7", 0, "PENDING", "Resources")]}
    monkeypatch.setattr(queue, "read", lambda: waits)
    run = Run(tmp_path, Settings())
    words = r"job 7: train, 0 running, 1 waiting \(Resources\); wait for it, or end it: make cancel"
    with pytest.raises(RunInUse, match=words), advance.training_alone(run):
        pass
    waits.clear()
    with advance.training_alone(run):
        assert (tmp_path / "train" / "lock.json").exists()


def test_tasks_of_jobs_that_run_are_starting_and_those_behind_them_queued(tmp_path: Path) -> None:
    chunks = [[Entry(0, "a", 1), Entry(1, "b", 1)], [Entry(2, "c", 1)], [Entry(3, "d", 1)]]
    batch = batches.intend(tmp_path / "slurm", "numbers", "drive", chunks)
    states = ("RUNNING", "CONFIGURING", "PENDING")
    queued = {batch.name: [Queued("7", i, state, "None") for i, state in enumerate(states)]}
    stage = StageStatus("numbers", "numbers", 4)
    watch._count(tmp_path / "numbers", stage, batch, queued)
    assert (stage.starting, stage.queued) == (2, 2)
    working = StageStatus("numbers", "numbers", 4, running=[{"index": 0, "time": 0.0}])
    watch._count(tmp_path / "numbers", working, batch, queued)
    assert (working.starting, working.queued) == (1, 2)

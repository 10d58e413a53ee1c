"""Training over nodes of a real SLURM, disturbed in every way that clusters have."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from slurm import batches, driver
from tests.cluster.local_slurm import Cluster
from tests.slurm.recipe import prepare, start
from tests.train import recipe
from tests.train.conftest import write_pack, write_paints
from train.distributed import first_host
from train.evaluate import by_step
from train.watchdog import Beat, beat_path

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]  # each process loads torch anew

STEPS = 150


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("data") / "packed", 24, 13)


@pytest.fixture(scope="module")
def undisturbed(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in four processes of this machine."""
    folder = tmp_path_factory.mktemp("local") / "run"
    run = recipe.prepare(folder, packed, processes=4, samples=8 * STEPS)
    command = recipe.start(run)
    said, _ = command.communicate(timeout=300)
    assert command.returncode == 0, said
    return run


@contextmanager
def _training(run: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = start(run, *options)
    try:
        yield command
    finally:
        command.kill()
        command.communicate()


def _finish(command: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = command.communicate(timeout=300)
    return command.returncode, said


def _await(cluster: Cluster, run: Path, rank: int, holds: Callable[[Beat], bool]) -> Beat:
    path = beat_path(run / "train" / "heartbeats", rank)
    cluster.until(lambda: holds(Beat.read(path)), f"rank {rank} of {run.name}", timeout_s=300)
    return Beat.read(path)


def _job(cluster: Cluster, run: Path) -> dict[str, str]:
    """What SLURM knows of the run's job, of which there is one."""
    [batch] = batches.everything(run / "slurm")
    assert batch.job is not None
    [known] = cluster.jobs(batch.job)
    return known


def _losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def _weights(run: Path) -> bytes:
    return (run / "train/out/model.safetensors").read_bytes()


def _saved(run: Path) -> int:
    """Steps of the newest checkpoint."""
    names = [path.name for path in (run / "train/checkpoints").glob("step-*")]
    return int(max(names, default="step-0").removeprefix("step-"))


def _logs(run: Path) -> str:
    return "".join(path.read_text() for path in (run / "train/logs").glob("*.log"))


@pytest.mark.parametrize(("nodes", "each"), [(1, 4), (2, 2)])
def test_processes_on_any_nodes_are_those_of_one_machine(
    cluster: Cluster, packed: Path, undisturbed: Path, tmp_path: Path, nodes: int, each: int
) -> None:
    run = prepare(tmp_path / "run", packed, each, nodes=nodes, samples=8 * STEPS)
    with _training(run) as command:
        _await(cluster, run, 3, lambda beat: beat.step > 0)
        assert _job(cluster, run)["NumNodes"] == str(nodes)
        code, said = _finish(command)
    assert code == 0, said
    assert _losses(run) == _losses(undisturbed)
    assert _weights(run) == _weights(undisturbed)


def test_preempted_training_goes_on_as_if_nothing_had_been(
    cluster: Cluster, packed: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = prepare(tmp_path / "run", packed, 2, nodes=(1, 2), samples=8 * STEPS)
    with _training(run) as command:
        begun = 0
        for restart in (1, 2):
            _await(cluster, run, 3, lambda beat, last=begun: beat.step > last + 10)  # type: ignore[misc]
            urgent = cluster.occupy()
            job = cluster.until(
                lambda: (
                    (known := _job(cluster, run))["Restarts"] == str(restart)  # noqa: B023
                    and known["JobState"] == "PENDING"
                    and known
                ),
                "the job to be queued again",
            )
            assert job
            begun = _saved(run)
            if restart == 2:  # then there is room on one node
                cluster.occupy(3)
            cluster.run("scancel", urgent)
        _await(cluster, run, 1, lambda beat: beat.step > begun)
        assert _job(cluster, run)["NumNodes"] == "1"
        code, said = _finish(command)
    assert code == 0, said
    assert "trying again" not in said
    assert f"going on from {run}/train/checkpoints/step-{begun:010d}" in _logs(run)
    losses, expected = _losses(run), _losses(undisturbed)
    assert losses[:begun] == expected[:begun]  # four processes, as there
    assert losses == pytest.approx(expected, rel=1e-3)  # then two, which round differently


def test_a_time_limit_is_a_pause_and_scancel_the_end(
    cluster: Cluster, packed: Path, tmp_path: Path
) -> None:
    run = prepare(tmp_path / "run", packed, 1, nodes=2, samples=8 * 100_000)
    with _training(run) as command:
        _await(cluster, run, 1, lambda beat: beat.step > 15)
        job = _job(cluster, run)
        passed_s = (datetime.now() - datetime.fromisoformat(job["StartTime"])).total_seconds()
        minutes = int((passed_s + 20) // 60) + 1  # 20 to 80 s from now
        cluster.run("scontrol", "update", f"jobid={job['JobId']}", f"timelimit={minutes}")
        restarts = lambda: _job(cluster, run)["Restarts"]  # noqa: E731
        cluster.until(lambda: restarts() == "1", "the time limit", timeout_s=150)
        saved = _saved(run)
        assert saved > 15
        assert "stopped by SIGUSR2 at a safe point" in _logs(run)
        _await(cluster, run, 1, lambda beat: beat.step > saved)
        assert driver.cancel(run) == 1
        code, said = _finish(command)
    assert code == 75
    assert "scancel" in said
    assert cluster.states(job["JobId"]) == ["CANCELLED"]
    assert _saved(run) > saved
    time.sleep(3)
    assert not cluster.run("squeue", "--noheader")
    assert _losses(run)[: _saved(run)]


def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(
    cluster: Cluster, packed: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = prepare(tmp_path / "run", packed, 2, nodes=2, samples=8 * STEPS)
    with _training(run) as command:
        _await(cluster, run, 3, lambda beat: beat.step > 25)
        nodes = _job(cluster, run)["NodeList"]
        first, second = cluster.run("scontrol", "show", "hostnames", nodes).split()
        assert first_host(nodes) == first
        cluster.kill_node(second)
        try:
            code, said = _finish(command)
        finally:
            cluster.start_node(second)
    assert code == 0, said
    assert int(_job(cluster, run)["Restarts"]) >= 1
    assert _losses(run) == _losses(undisturbed)
    assert _weights(run) == _weights(undisturbed)


@pytest.mark.parametrize("waits", [True, False])
def test_milestones_are_evaluated_by_other_jobs_while_training_goes_on(
    cluster: Cluster, packed: Path, tmp_path: Path, waits: bool
) -> None:
    paints = {"paints": str(write_paints(tmp_path / "paints.parquet"))}
    checkpoint = {"max_lost_steps": 20, "keep": 1, "keep_every_steps": 50}
    train: dict[str, object] = {"samples": 8 * 100_000, "checkpoint": checkpoint}
    run = prepare(tmp_path / "run", packed, 1, evaluate=paints, nodes=2, **train)
    path = run / "evaluate/by_step.jsonl"
    with _training(run, *([] if waits else ["--hand-over"])) as command:
        if not waits:
            assert _finish(command)[0] == 0
        [first, *_] = cluster.until(
            lambda: [row["step"] for row in by_step.rows(path)], "the first points", timeout_s=300
        )
        cluster.until(
            lambda: [s for row in by_step.rows(path) if (s := row["step"]) > first + 50],
            *("points of another job", 300),
        )
        beat = _await(cluster, run, 1, lambda beat: True)
        assert _await(cluster, run, 1, lambda later: later.step > beat.step)
        assert _job(cluster, run)["JobState"] == "RUNNING"
        assert driver.cancel(run) >= 2  # with one that follows
        if waits:
            assert _finish(command)[0] == 75
    assert not cluster.run("squeue", "--noheader")
    steps = [row["step"] for row in by_step.rows(path)]
    assert steps == sorted(set(steps))
    assert not [step for step in steps if step % 50]


def test_an_error_is_the_tasks_and_is_not_tried_again(
    cluster: Cluster, packed: Path, tmp_path: Path
) -> None:
    train = {"init_from": str(tmp_path / "empty.safetensors")}
    (tmp_path / "empty.safetensors").write_bytes(b"")
    run = prepare(tmp_path / "run", packed, 2, nodes=1, **train)
    with _training(run) as command:
        code, said = _finish(command)
    assert code == 4
    assert "task 0: rank" in said, said


def test_numbers_of_nodes_that_will_not_do_are_refused_at_once(
    cluster: Cluster, packed: Path, tmp_path: Path
) -> None:
    run = prepare(tmp_path / "run", packed, 2, nodes=3)
    with _training(run) as command:
        code, said = _finish(command)
    assert code == 2
    assert (
        "train.nodes: 3 nodes of 2 processes are 6 processes, which do not divide train.data.lanes"
        " (4); 1, 2 nodes would do"
    ) in said
    assert not list((run / "slurm").glob("train-*"))


@pytest.mark.parametrize(
    "nodes",
    ["n[1-4]", "a[01-03,7]b[1-2],c", "gpu[003-007,9],cpu1", "n1,n2", "r1n[8-12]"],
)
def test_lists_of_nodes_are_read_as_slurm_reads_them(cluster: Cluster, nodes: str) -> None:
    assert first_host(nodes) == cluster.run("scontrol", "show", "hostnames", nodes).split()[0]


def test_the_step_says_where_its_processes_meet(cluster: Cluster) -> None:
    script = "srun --nodes=2 --ntasks=2 printenv SLURM_STEP_NODELIST SLURM_STEP_NUM_TASKS"
    job = cluster.submit(script, "--nodes=3")
    cluster.wait(job, "COMPLETED")
    nodes, tasks, *_ = cluster.output(job).split()
    assert first_host(nodes) == first_host(_nodes_of(cluster, job))
    assert tasks == "2"


def _nodes_of(cluster: Cluster, job: str) -> str:
    return cluster.jobs(job)[0]["NodeList"]

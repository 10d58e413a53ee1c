"""Ranks on one machine, as a user runs them: started, stopped, gone on with, ended together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.config import ConfigError
from pipeline.lock import RunLock
from pipeline.stage import Attempt
from tests.train import recipe
from tests.train.conftest import Pack
from tests.train.recipe import finish, prepare, start, started_by, wait_for
from train import loop, stages
from train.launch import Place, free_port, place, visible_gpus
from train.watchdog import Beat


def _losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def _weights(run: Path) -> bytes:
    return (run / "train/out/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(3, 8, 1)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}, Place(2, 4, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # the batch script, not a step
    ],
)
def test_the_place_among_processes(environ: dict[str, str], expected: Place | None) -> None:
    assert place(environ) == expected


def test_the_port_is_free_and_no_ephemeral_one() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(10_000 <= free_port() < first for _ in range(20))


def test_launching_loads_no_torch() -> None:
    code = "import sys, train.launch; print('torch' in sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=recipe.ROOT, capture_output=True, text=True, check=True
    )
    assert printed.stdout == "False\n"


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_without_a_gpu_there_is_none() -> None:
    assert visible_gpus() == 0


@pytest.mark.slow
@pytest.mark.timeout(600)  # seconds on an idle machine; each rank loads torch anew
def test_stopped_and_gone_on_with_by_another_number_of_processes(
    pack: Pack, attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    packed = pack(24, 13)
    alone = attempt(packed, run="alone", **recipe.SETTINGS)
    loop.train(alone)

    run = prepare(tmp_path / "run", packed, processes=2)
    command = start(run)
    wait_for(run, 1, lambda beat: beat.step >= 15)
    command.send_signal(signal.SIGINT)
    code, said = finish(command)
    assert code == 75, said
    assert started_by(run) == []
    logs = (run / "train/logs").glob("00000-rank-*.log")
    steps = [re.findall(r"stopped after step (\d+) of 60", log.read_text()) for log in logs]
    assert len(steps) == 2
    assert steps[0] == steps[1]
    step = int(steps[0][0])
    assert 15 <= step < 60
    said = (run / "train/logs/00000.log").read_text()
    assert f"stopped by SIGTERM at step {step}" in said
    assert (run / f"train/checkpoints/step-{step:010d}").is_dir()

    prepare(run, packed, processes=4)
    code, said = finish(start(run))
    assert code == 0, said
    assert _losses(run) == pytest.approx(_losses(tmp_path / "alone"), rel=1e-3)
    expected = load_file(alone.folder / "model.safetensors")
    for name, value in load_file(run / "train/out/model.safetensors").items():
        assert (value - expected[name]).abs().max() < 2e-3, name


def test_an_error_of_the_ranks_is_an_error_of_the_task(pack: Pack, tmp_path: Path) -> None:
    run = prepare(tmp_path / "run", pack(24), processes=2, model={"name": "ViT-B-23"})
    code, said = finish(start(run))
    assert code == 4
    assert "train.model.name: open_clip has no configuration 'ViT-B-23'" in said
    assert "trying again" not in said  # the same configuration would end the same way
    assert started_by(run) == []


def test_lanes_that_the_processes_cannot_share_are_refused_before_a_task_starts(
    pack: Pack, attempt: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attempt(pack(24)).run  # four lanes; as many processes as GPUs
    monkeypatch.setattr("train.launch.visible_gpus", lambda: 3)
    with (
        pytest.raises(ConfigError, match="3 processes cannot share 4 lanes equally; train in 2"),
        stages.TRAIN.service(run),
    ):
        pass
    monkeypatch.setattr("train.launch.visible_gpus", lambda: 2)
    with stages.TRAIN.service(run):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="8 processes"), stages.TRAIN.service(run):
        pass


def test_a_run_that_is_in_use_is_tried_once(pack: Pack, tmp_path: Path) -> None:
    run = prepare(tmp_path / "run", pack(24), processes=2)
    lock = RunLock(run / "train/checkpoints/lock.json", beat_s=0.2)
    try:
        code, said = finish(start(run))
    finally:
        lock.release()
    assert code == 4
    assert f"process {os.getpid()} on" in said
    assert "trying again" not in said


@pytest.mark.slow
@pytest.mark.timeout(600)  # seconds on an idle machine; each rank loads torch anew
def test_a_signal_to_every_process_at_any_time_is_a_stop(pack: Pack, tmp_path: Path) -> None:
    """As SLURM sends it to all of a step: also to those that load their modules, and to workers."""
    data = {"lanes": 4, "block_samples": 5, "margin": 2, "workers": 2}
    run = prepare(tmp_path / "run", pack(24), processes=2, samples=8 * 4000, data=data)
    for begun in (False, True):
        command = start(run)
        last = Beat()
        while not begun and len(started_by(run)) < 4:
            time.sleep(0.001)
        if begun:
            last = wait_for(run, 1, lambda beat: beat.step > 15)
            assert len(started_by(run)) == 7  # the task, ranks, workers
        for process in (command.pid, *started_by(run)):
            with suppress(ProcessLookupError):  # as gcc, which tells where a library is
                os.kill(process, signal.SIGUSR2)
        code, said = finish(command)
        assert code == 75, said
        logs = [path.read_text() for path in (run / "train/logs").glob("*.log")]
        assert len(logs) == 3
        assert not [text for text in logs if "is replaced" in text or "Traceback" in text]
        checkpoints = sorted(path.name for path in (run / "train/checkpoints").glob("step-*"))
        assert checkpoints[-1] >= f"step-{last.step:010d}"
        assert started_by(run) == []


@pytest.mark.slow
@pytest.mark.timeout(600)  # seconds on an idle machine; each rank loads torch anew
def test_a_killed_and_a_stopped_rank_change_no_bit(pack: Pack, tmp_path: Path) -> None:
    packed = pack(24)
    whole = prepare(tmp_path / "whole", packed, processes=2)
    assert finish(start(whole))[0] == 0
    run = prepare(tmp_path / "run", packed, processes=2, hang_timeout_s=10)
    command = start(run)
    first = wait_for(run, 1, lambda beat: beat.step >= 25)
    os.kill(first.pid, signal.SIGKILL)
    waits = wait_for(run, 1, lambda beat: beat.pid != first.pid and beat.step >= 35)
    stopped = wait_for(run, 0, lambda beat: True)
    os.kill(stopped.pid, signal.SIGSTOP)
    code, said = finish(command)
    assert code == 0, said
    assert "rank 1: killed by SIGKILL" in said
    stuck = rf"rank 0 is stuck in \S+ of step \d+ \(pid {stopped.pid}\): its process is stopped"
    assert re.search(stuck, said)
    assert re.search(rf"rank 1 waits in \S+ of step \d+ \(pid {waits.pid}\)", said)
    assert "most recent call first" in (run / "train/logs/00000-rank-1.log").read_text()
    assert _weights(run) == _weights(whole)
    assert _losses(run) == _losses(whole)
    assert started_by(run) == []


@pytest.mark.slow
@pytest.mark.timeout(600)  # seconds on an idle machine; each rank loads torch anew
def test_of_four_ranks_the_stopped_one_is_named(pack: Pack, tmp_path: Path) -> None:
    packed = pack(24)
    local: dict[str, object] = {"attempts": 1}
    run = prepare(tmp_path / "run", packed, processes=4, hang_timeout_s=10, local=local)
    command = start(run)
    stopped = wait_for(run, 2, lambda beat: beat.step >= 25)
    os.kill(stopped.pid, signal.SIGSTOP)
    code, said = finish(command)
    assert code == 4
    assert re.findall(r"rank (\d) is stuck", said.splitlines()[-1]) == ["2"]
    assert re.findall(r"rank (\d) waits", said.splitlines()[-1]) == ["0", "1", "3"]
    assert started_by(run) == []


@pytest.mark.slow
@pytest.mark.timeout(600)  # seconds on an idle machine; each rank loads torch anew
def test_attempts_are_bounded(pack: Pack, tmp_path: Path) -> None:
    local: dict[str, object] = {"attempts": 2}
    run = prepare(tmp_path / "run", pack(24), processes=2, samples=8 * 4000, local=local)
    command = start(run)
    killed = 0
    for _ in range(2):
        beat = wait_for(
            run, 0, lambda beat, last=killed: beat.pid not in (0, last) and beat.lap > 2
        )
        killed = beat.pid
        os.kill(killed, signal.SIGKILL)
    code, said = finish(command)
    assert code == 4
    assert said.count("rank 0: killed by SIGKILL") == 2
    assert started_by(run) == []

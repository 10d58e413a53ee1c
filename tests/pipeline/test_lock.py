"""The lock of a run: refused while its holder lives, taken over when it is dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.lock import RunInUse, RunLock, refuse_others

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from pipeline.lock import RunLock
lock = RunLock(Path(sys.argv[1]), beat_s=0.05, job="theirs")
print("held", flush=True)
time.sleep(60)
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _as_on_another_machine(path: Path) -> None:
    held = json.loads(path.read_text())
    # In place, as the holder's beats are.
    with path.open("r+") as stream:
        stream.write(json.dumps(held | {"machine": held["machine"][::-1]}))


def test_a_living_holder_is_named_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    process = _holder(path)
    try:
        with pytest.raises(
            RunInUse, match=rf"process {process.pid} on .*; wait for it, stop it.* RUN="
        ):
            RunLock(path)
        assert json.loads(path.read_text())["pid"] == process.pid
    finally:
        _end(process)


def test_a_killed_holder_is_followed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    _end(_holder(path))
    assert path.exists()
    began = time.monotonic()
    lock = RunLock(path)
    assert time.monotonic() - began < 5
    lock.check()
    lock.release()
    assert not path.exists()


def test_a_process_that_has_the_number_of_the_dead_one_does_not_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    RunLock(path).release()
    lock = RunLock(path)
    held = json.loads(path.read_text())
    lock.release()
    path.write_text(json.dumps(held | {"token": "other", "started": "1"}))
    assert held["pid"] == os.getpid()
    RunLock(path).release()


def test_on_another_machine_only_beats_tell(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    process = _holder(path)
    _end(process)
    _as_on_another_machine(path)
    began = time.monotonic()
    lock = RunLock(path, beat_s=0.1, stale_s=1)
    assert time.monotonic() - began >= 1
    lock.release()


def test_a_suspended_holder_that_lost_it_neither_regains_nor_harms_it(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    first = RunLock(path, beat_s=0.05)
    os.rename(path, tmp_path / "stolen")  # noqa: PTH104
    with pytest.raises(RunInUse, match="was removed"):
        first.check()
    second = RunLock(path, beat_s=0.05)
    time.sleep(0.3)  # beats of the first go to the file that was taken away
    second.check()
    with pytest.raises(RunInUse, match=f"now belongs to process {os.getpid()}"):
        first.check()
    first.release()
    second.check()
    second.release()


def test_a_stopped_process_on_this_machine_is_not_robbed(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    process = _holder(path)
    try:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(RunInUse):
            RunLock(path, stale_s=0.5)
    finally:
        _end(process)


def test_rubbish_in_the_file_holds_nobody_up_for_long(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    path.write_bytes(b"\0" * 100)
    RunLock(path, stale_s=0.3).release()


def test_only_processes_of_the_holders_job_may_go_along(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    refuse_others(path, "ours")
    process = _holder(path)
    try:
        refuse_others(path, "theirs")
        with pytest.raises(RunInUse, match=rf"process {process.pid} on .* \(since 20"):
            refuse_others(path, "ours")
    finally:
        _end(process)
    refuse_others(path, "ours")  # it is dead
    _as_on_another_machine(path)
    refuse_others(path, "ours", stale_s=0.3)
    assert path.exists()


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    _end(_holder(path))
    many = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(5)
    ]
    until = time.monotonic() + 30
    while sum(process.poll() is None for process in many) > 1 and time.monotonic() < until:
        time.sleep(0.1)
    living = [process for process in many if process.poll() is None]
    assert len(living) == 1
    assert json.loads(path.read_text())["pid"] == living[0].pid
    for process in many:
        _end(process)

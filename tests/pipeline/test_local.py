from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.local import LocalExecutor, LocalSettings, resident_bytes
from pipeline.runner import Advance, TasksFailed
from pipeline.stage import Run
from pipeline.stop import StopFlag, Stopped
from tests.pipeline import toy
from tests.pipeline.toy import Recorder

Call = Callable[..., tuple[Run, Advance]]


def total(run: Run) -> int:
    value: int = json.loads((run.folder / "total" / "out" / "sum.json").read_text())
    return value


@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_a_task_that_dies_is_tried_again(advance: Call, fault: str) -> None:
    run, done = advance({"fault": fault})
    assert total(run) == 6
    assert done.ran == {"numbers": 3, "total": 4}
    assert [m.attempt for m in run.manifests("numbers")] == [2, 2, 2]


def test_a_hanging_task_is_killed_at_its_wall_limit(advance: Call) -> None:
    began = time.monotonic()
    run, _ = advance({"fault": "hang", "count": 2}, wall_limit_s=2.0)
    assert total(run) == 3
    assert time.monotonic() - began < 30


def test_a_stage_without_limits_takes_its_time(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", toy.Toy())
    settings = LocalSettings(wall_limit_s=0.01, memory_gb=0.001, attempts=1)
    stages = [replace(stage, spans_nodes=True) for stage in toy.STAGES]
    stop = StopFlag()
    executor = LocalExecutor(settings, stop, (sys.executable, "-m", "tests.pipeline.toy"))
    done = runner.advance(run, stages, executor, stop, Recorder())
    assert done.ran == {"numbers": 3, "total": 4}


def test_a_task_runs_where_its_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So relative paths, and users' own modules, are the same in both."""
    monkeypatch.chdir(tmp_path)
    run, stop = Run(Path("run"), toy.Toy()), StopFlag()
    executor = LocalExecutor(LocalSettings(), stop, (sys.executable, "-m", "tests.pipeline.toy"))
    runner.advance(run, toy.STAGES, executor, stop, Recorder())
    assert total(run) == 6


def test_a_task_over_its_memory_limit_is_killed(advance: Call) -> None:
    with pytest.raises(TasksFailed, match=r"memory limit is 0\.25 GiB"):
        advance({"fault": "memory", "count": 1, "times": 9}, memory_gb=0.25, attempts=1)


def test_a_task_that_always_fails_names_its_reason_and_log(advance: Call) -> None:
    with pytest.raises(TasksFailed) as caught:
        advance({"fault": "raise", "count": 1, "times": 9}, attempts=2)
    message = str(caught.value)
    assert "task 0: ValueError: the fault that was asked for" in message
    log = Path(message.rpartition("log: ")[2])
    assert log.read_text().count("Traceback") == 2


def test_what_another_try_cannot_help_is_not_tried_again(advance: Call, tmp_path: Path) -> None:
    with pytest.raises(TasksFailed, match="task 0: somewhere: not there; log: "):
        advance({"fault": "missing", "count": 1, "times": 9})
    assert (tmp_path / "run" / "tally-0").read_text() == "x"


def test_a_stop_ends_at_a_safe_point_and_the_next_call_goes_on(
    advance: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = StopFlag()
    timer = threading.Timer(2.0, lambda: setattr(stop, "signal", signal.SIGTERM))
    timer.start()
    watch = Recorder()
    with pytest.raises(Stopped), caplog.at_level(logging.INFO):
        advance({"fault": "wait"}, stop=stop, watch=watch, grace_s=60)
    assert caplog.messages == ["stopping at a safe point, within 60 s"]
    assert {outcome.ended.value for outcome in watch.outcomes} == {"stopped"}
    (tmp_path / "run" / "tally-2").write_text("x")  # the third need not wait as well
    run, _ = advance({"fault": "wait"})
    assert total(run) == 6


def test_a_signal_to_a_task_alone_stops_the_command(advance: Call, tmp_path: Path) -> None:
    live = tmp_path / "run/numbers/live/00000.json"

    def stop_it() -> None:
        while not live.exists():
            time.sleep(0.05)
        os.kill(json.loads(live.read_text())["pid"], signal.SIGTERM)

    thread = threading.Thread(target=stop_it)
    thread.start()
    with pytest.raises(Stopped, match="a signal to a task of numbers"):
        advance({"fault": "wait", "count": 1})
    thread.join()


def test_tasks_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = f"""
import os, subprocess, sys
os.environ["OPENWIT_PARENT"] = str(os.getpid())
child = subprocess.Popen([sys.executable, "-c", "from pipeline.local import die_with_parent as d;"
    "import time; d(); print('up', flush=True); time.sleep(60)"], stdout=subprocess.PIPE,
    cwd={str(Path.cwd())!r}, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    orphan = int(killed.stdout)
    for _ in range(100):
        if not _running(orphan):
            return
        time.sleep(0.05)
    os.kill(orphan, signal.SIGKILL)
    raise AssertionError("the child outlived its parent")


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_resident_bytes_counts_the_whole_session(tmp_path: Path) -> None:
    """What its processes allocate, not the pages of files that they map."""
    (tmp_path / "file").write_bytes(bytes(256 << 20))
    code = (
        "import mmap, subprocess, sys, time\n"
        f"file = open({str(tmp_path / 'file')!r}, 'r+b')\n"
        "mapped = mmap.mmap(file.fileno(), 0)\n"
        "assert mapped.find(b'x') < 0\n"
        "subprocess.Popen([sys.executable, '-c', 'x = bytearray(64 << 20); print(1, flush=True);"
        " import time; time.sleep(60)'])\n"
        "time.sleep(60)"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE
    )
    try:
        assert leader.stdout is not None
        leader.stdout.readline()
        assert 64 << 20 < resident_bytes(leader.pid) < 256 << 20
    finally:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()
        assert leader.stdout is not None
        leader.stdout.close()

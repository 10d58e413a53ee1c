"""`kill -9` of a small build at random moments, its tasks done twice at once, its processes killed.

By hand, for the long measurement: `python -m tests.kill_download FOLDER --kills 200 --races 1000`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline import damage, manifest, runner
from pipeline.local import LocalExecutor, LocalSettings, die_with_parent
from pipeline.stage import Run
from pipeline.stop import StopFlag
from tests.dataset_build.download.conftest import HostileWeb
from tests.small_build import SmallBuild, digests, ended, faults, fork, journalled, load, published


def kill(folder: Path, web: HostileWeb, kills: int, seed: int) -> str:
    """Kill builds, two kills each, then let them end; raises `AssertionError` if shards differ."""
    dice = random.Random(seed)
    small = SmallBuild(web, addresses=48, wait_s=0.02)
    small.build(folder / "quiet")
    expected = digests(folder / "quiet")
    assert len(expected) >= 4 and not faults(folder / "quiet")
    addresses = {pair.uid[:8] for pair in small.pairs}
    run = folder / "loud"
    done = inside = saved = 0
    while inside < kills:
        kept: set[bytes] = set()
        for _ in range(2):
            web.hits.clear()
            pid = fork(lambda: small.build(run))
            _wait(small, pid, len(addresses - kept), dice)
            os.kill(pid, signal.SIGKILL)
            inside += ended(pid) == -signal.SIGKILL
            assert not small.asked().keys() & kept, "asked again for what was there"
            saved += len(journalled(run))
            kept = journalled(run) | published(run)
            assert not (found := faults(run)), found
        web.hits.clear()
        assert ended(fork(lambda: small.build(run))) == 0
        assert not small.asked().keys() & kept, "asked again for what was there"
        assert digests(run) == expected, "the shards differ"
        assert not (found := faults(run)), found
        assert not list(run.glob("download/partial/*"))
        shutil.rmtree(run)
        done += 1
        print(f"{inside} kills, {done} builds", file=sys.stderr)
    return f"{inside} kills in {done} builds: shards byte-identical, nothing damaged," \
           f" {saved} outcomes found in unpublished tars, none asked for again"  # fmt: skip


def _wait(small: SmallBuild, pid: int, left: int, dice: random.Random) -> None:
    """Until a build that asks for `left` addresses has asked for some, or for all and goes on."""
    asked = dice.randrange(left + left // 2 + 1)
    while len(small.web.hits) < min(asked, left) and not _has_ended(pid):
        time.sleep(0.001)
    time.sleep(dice.uniform(0, 0.02 if asked <= left else 0.5))


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def race(folder: Path, web: HostileWeb, races: int, seed: int) -> str:
    """Do a task twice at once; raises `AssertionError` unless one of the two is published."""
    dice = random.Random(seed)
    small = SmallBuild(web, addresses=4, tasks=1)
    run = folder / "raced"
    small.build(run, last=3)
    (planned,) = small.planned(run)
    pids: list[int] = []
    second = 0
    for number in range(races):
        reads, writes = os.pipe()
        pauses = (0.0, dice.choice((0.0, dice.uniform(0, 0.05))))
        pids = [fork(partial(_after, reads, pause, small, run, planned)) for pause in pauses]
        os.write(writes, b"22")
        assert [ended(pid) for pid in pids] == [0, 0]
        os.close(reads)
        os.close(writes)
        (done,) = manifest.everything(run / "download")
        second += done.store.split("-")[-2] == str(pids[1])
        assert [p.name for p in (run / "download/store").iterdir()] == [done.store]
        assert not damage.damage(run / "download", done)
        _check_pictures(run / "download/store" / done.store, len(small.pairs))
        shutil.rmtree(run / "download")
        if number % 100 == 99:
            print(f"{number + 1} double executions", file=sys.stderr)
    return f"{races} double executions: one published each time ({second} the later one's), none" \
           " mixed or damaged"  # fmt: skip


def _after(reads: int, pause_s: float, small: SmallBuild, run: Path, planned: Any) -> None:
    os.read(reads, 1)
    time.sleep(pause_s)
    small.work_on(run, planned)


def _check_pictures(store: Path, pairs: int) -> None:
    """Every outcome's picture lies where the row says, in a tar of the same attempt."""
    (path,) = store.glob("fetched-*.parquet")
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == pairs
    for row in rows:
        if row["status"] == "ok":
            with (store / row["staged"]).open("rb") as stream:
                stream.seek(row["staged_offset"])
                data = stream.read(row["staged_bytes"])
            assert hashlib.sha256(data).digest() == row["staged_sha256"]


class _Killer(LocalExecutor):
    """Kills the first attempt at every task once it says that it has begun."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.killed: list[tuple[str, int]] = []

    def _start(self, run: Run, stage: Any, planned: Any, attempt: int, environment: Any) -> Any:
        child = super()._start(run, stage, planned, attempt, environment)
        if attempt == 1:
            live = run.stage_folder(stage.name) / "live" / f"{planned.task.index:05d}.json"
            threading.Thread(target=self._kill, args=(child, live), daemon=True).start()
        return child

    def _kill(self, child: Any, live: Path) -> None:
        while child.process.poll() is None:
            if live.exists():
                child.process.kill()
                task = child.planned.task
                self.killed.append((task.stage, task.index))
                return
            time.sleep(0.001)


def kill_every_child(folder: Path, web: HostileWeb) -> str:
    """A build in processes of its own, each killed once; raises `AssertionError` if it differs."""
    small = SmallBuild(web, addresses=16)
    small.build(folder / "small-quiet")
    run = Run(folder / "turns", small.config)
    run.folder.mkdir()
    (run.folder / "web.json").write_text(json.dumps([web.host, web.port]))
    command = (sys.executable, "-m", "tests.kill_download", "--task")
    executor = _Killer(LocalSettings(workers=2), StopFlag(), command)
    runner.advance(run, small.stages, executor, StopFlag(), runner.Unwatched())
    attempts = {
        (stage.name, done.index): done.attempt
        for stage in small.stages
        for done in run.manifests(stage.name)
    }
    assert {task for task, attempt in attempts.items() if attempt == 2} == set(executor.killed)
    assert {stage for stage, _ in executor.killed} >= {"download", "screen", "pack"}
    assert digests(run.folder) == digests(folder / "small-quiet"), "the shards differ"
    return f"{len(executor.killed)} of {len(attempts)} tasks killed once: the run completes"


class _Elsewhere:
    """The web that another process serves."""

    def __init__(self, host: str, port: int) -> None:
        self.connect_to = f".example={host}:{port}"


def task(run: str, stage: str, index: str, fingerprint: str, attempt: str) -> int:
    """One attempt, as `LocalExecutor` starts it."""
    die_with_parent()
    web: Any = _Elsewhere(*json.loads((Path(run) / "web.json").read_text()))
    small = SmallBuild(web, addresses=16)
    own = Run(Path(run), small.config)
    (chosen,) = (s for s in small.stages if s.name == stage)
    planned = own.plan(stage)[int(index)]
    assert planned.fingerprint == fingerprint
    runner.work_on(own, chosen, planned, int(attempt), StopFlag().install())
    return 0


def main() -> int:
    """Print what was done to builds, and that they came out the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--races", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    load()
    web = HostileWeb()
    try:
        print(kill(options.folder, web, options.kills, options.seed))
        print(race(options.folder, web, options.races, options.seed))
        print(kill_every_child(options.folder, web))
    finally:
        web.close()
    return 0


if __name__ == "__main__":
    sys.exit(task(*sys.argv[2:]) if sys.argv[1:2] == ["--task"] else main())

"""A task that was stopped or killed goes on where it was: what had ended is not asked for again."""

from __future__ import annotations

import errno
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dataset_build.download import STAGE
from dataset_build.download.journal import Journal, read
from pipeline import damage, files, manifest, runner, tar
from pipeline.__main__ import main
from pipeline.manifest import Manifest
from pipeline.stage import Attempt, Run
from pipeline.stop import StopFlag, Stopped
from tests.dataset_build.download.conftest import HostileWeb
from tests.small_build import SmallBuild, journalled


class Task:
    """The only task of a small build's download."""

    def __init__(self, web: HostileWeb, run: Path) -> None:
        self.web, self.run = web, run
        self.small = SmallBuild(web, addresses=24, wait_s=0.05, tasks=1)
        self.small.build(run, last=3)
        (self.planned,) = self.small.planned(run)
        self.addresses = {pair.uid[:8] for pair in self.small.pairs}

    def __call__(self, stop: StopFlag | None = None) -> Manifest:
        self.web.hits.clear()
        own = Run(self.run, self.small.config)
        return runner.work_on(own, STAGE, self.planned, 1, StopFlag() if stop is None else stop)

    def stopped_after(self, addresses: int) -> set[bytes]:
        """Stop it when so many addresses have ended, now or earlier; those that have at the end."""
        stop = StopFlag()

        def wait() -> None:
            while len(journalled(self.run)) < addresses:
                time.sleep(0.005)
            stop.signal = signal.SIGTERM

        thread = threading.Thread(target=wait)
        thread.start()
        with pytest.raises(Stopped):
            self(stop)
        thread.join()
        return journalled(self.run)


@pytest.fixture
def task(web: HostileWeb, tmp_path: Path) -> Task:
    return Task(web, tmp_path / "run")


def test_a_stop_keeps_what_has_ended(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    first = task.stopped_after(4)
    assert first and first < task.addresses
    second = task.stopped_after(len(first) + 2)
    assert second > first and second < task.addresses
    assert not task.small.asked().keys() & first
    said: list[tuple[int, int | None]] = []
    honest = Attempt.progress

    def note(own: Attempt, done: int, total: int | None = None, *rest: Any) -> None:
        said.append((done, total))
        honest(own, done, total, *rest)

    monkeypatch.setattr(Attempt, "progress", note)
    done = task()
    assert set(task.small.asked()) == task.addresses - second
    assert done.stats.counts["addresses"] == len(task.addresses)
    assert done.stats.counts["addresses_resumed"] == len(second)
    assert said[0][1] is None and said[1] == (len(second), 24) and said[-1] == (24, 24)
    assert not list(task.run.glob("download/partial/*"))


def test_what_a_stop_cuts_short_has_not_failed(task: Task) -> None:
    """Transfers that it interrupts, and errors that are not tried again because of it."""
    kept = task.stopped_after(4)
    statuses = set()
    for path in task.run.glob("download/partial/*/*.tar"):
        data = path.read_bytes()
        at = -1
        while (at := data.find(b'{"digest"', at + 1)) >= 0:
            statuses.add(json.JSONDecoder().raw_decode(data[at:].decode("latin-1"))[0]["status"])
    assert statuses <= {"ok", "dead_link"}
    assert task().stats.dropped.keys() == {"dead_link"}
    assert not task.small.asked().keys() & kept


def test_after_a_full_disk_the_rest_is_asked_for(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    own = Journal._write

    def fails_at_last(journal: Journal, data: bytes) -> None:
        written.append(data)
        if len(written) == 10:
            journal.failed = True
            raise OSError(errno.ENOSPC, "No space left on device")
        own(journal, data)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_write", fails_at_last)
        with pytest.raises(OSError, match="No space left"):
            task()
    kept = journalled(task.run)
    assert len(kept) == 9
    assert task().stats.counts["addresses_resumed"] == 9
    assert set(task.small.asked()) == task.addresses - kept


def test_another_plan_takes_over_what_a_stopped_one_has_begun(task: Task) -> None:
    kept = task.stopped_after(8)
    settings = task.small.config.download.model_copy(update={"pairs_per_task": 5})
    config = task.small.config.model_copy(update={"download": settings})
    run = Run(task.run, config)
    planned = STAGE.planned(run, 0, 0)
    assert len(planned) > 3
    task.web.hits.clear()
    for one in planned:
        runner.work_on(Run(task.run, config), STAGE, one, 1, StopFlag())
    assert set(task.small.asked()) == task.addresses - kept


@pytest.mark.parametrize("fault", ["a flipped bit", "a cut", "a torn manifest"])
def test_of_damage_just_what_is_damaged_is_asked_for_again(task: Task, fault: str) -> None:
    """The rest is taken from where the task had published it."""
    done = task()
    folder = task.run / "download"
    (path,) = folder.glob("store/*/staged-*.tar")
    data = path.read_bytes()
    with tar.opened(path) as handle:
        ended = list(read(handle))
    pictures = [n for n, each in enumerate(ended) if each.outcome["status"] == "ok"]
    first = pictures[len(pictures) // 2]
    address, at = ended[first].address, ended[first].offset
    lost: set[bytes] = set()
    if fault == "a flipped bit":
        path.write_bytes(data[: at + 9] + bytes([data[at + 9] ^ 1]) + data[at + 10 :])
        assert len(damage.damage(folder, done)) == 1
        manifest.discard(folder, done)
        lost = {address}
    elif fault == "a cut":
        path.write_bytes(data[: at + 9])
        lost = {address for address, *_ in ended[first:]}
    else:
        record = manifest.manifest_path(folder, task.planned.fingerprint)
        record.write_bytes(record.read_bytes()[:50])
    manifest.withdraw(folder, task.planned.fingerprint)
    again = task()
    assert set(task.small.asked()) == lost
    assert again.stats.counts["addresses_resumed"] == len(task.addresses) - len(lost)
    assert (again.stats.rows_out, again.stats.dropped) == (done.stats.rows_out, done.stats.dropped)
    assert not damage.damage(folder, again)


def test_a_lost_tar_of_other_settings_is_not_taken(task: Task) -> None:
    manifest.discard(task.run / "download", task())
    settings = task.small.config.download.model_copy(update={"encode_quality": 80})
    task.small.config = task.small.config.model_copy(update={"download": settings})
    (task.planned,) = task.small.planned(task.run)
    assert task().stats.counts["addresses_resumed"] == 0
    assert set(task.small.asked()) == task.addresses


def test_after_damage_the_command_and_a_build_give_the_same_shards(
    web: HostileWeb, tmp_path: Path
) -> None:
    small, run = SmallBuild(web, addresses=24), tmp_path / "run"
    small.build(run)
    before = {path.name: files.sha256(path) for path in run.glob("pack/out/shards/*.tar")}
    path = sorted(run.glob("download/out/staged-*.tar"))[1]
    with tar.opened(path) as handle:
        ended = next(each for each in read(handle) if each.offset)
    with path.open("r+b") as stream:
        stream.seek(ended.offset + 9)
        stream.write(b"?!")
    web.hits.clear()
    assert main(["verify", str(run)]) == 5
    small.build(run)
    assert set(small.asked()) == {ended.address}
    assert {p.name: files.sha256(p) for p in run.glob("pack/out/shards/*.tar")} == before
    assert main(["verify", str(run)]) == 0

"""What fails here is no address's doing: it fails the attempt, and the next one loses nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataset_build.download import (
    STAGE,
    connection,
    guard,
    pictures,
    robots,
    silence,
    transfers,
    turns,
)
from dataset_build.download.silence import NoNetwork
from pipeline import runner
from pipeline.manifest import Manifest, everything
from pipeline.stage import Attempt, Run
from pipeline.stop import StopFlag
from tests.dataset_build.download.conftest import HostileWeb, picture
from tests.small_build import SmallBuild, ended, fork, journalled

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Task:
    """The only task of a small build's download: 40 addresses, each fourth one not there."""

    def __init__(self, web: HostileWeb, run: Path, **settings: Any) -> None:
        self.web, self.run = web, run
        self.small = SmallBuild(web, addresses=40, wait_s=0.02, tasks=1)
        download = self.small.config.download.model_copy(update=settings)
        self.small.config = self.small.config.model_copy(update={"download": download})
        self.small.build(run, last=3)
        (self.planned,) = self.small.planned(run)

    def __call__(self) -> Manifest:
        self.web.hits.clear()
        own = Run(self.run, self.small.config)
        return runner.work_on(own, STAGE, self.planned, 1, StopFlag())

    def is_as_if_nothing_had_been(self) -> None:
        kept = journalled(self.run)
        manifest = self()
        assert manifest.stats.dropped.keys() == {"dead_link"}
        assert manifest.stats.counts["pictures"] == 30
        assert manifest.stats.counts["addresses_resumed"] == len(kept)
        assert not self.small.asked().keys() & kept


@pytest.fixture
def task(web: HostileWeb, tmp_path: Path) -> Task:
    return Task(web, tmp_path / "run")


def failing(own: Callable[..., Any], when: Callable[[int], bool], error: Exception) -> Any:
    """`own`, but that the calls that `when` names raise."""
    calls = [0]

    def call(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if when(calls[0]):
            raise error
        return own(*arguments, **options)

    return call


def digests(error: Exception) -> Any:
    return types.SimpleNamespace(sha256=failing(hashlib.sha256, lambda n: n == 3, error))


SABOTAGE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the transfers' thread": lambda patch: patch.setattr(
        transfers.Transfers,
        "_settle",
        failing(transfers.Transfers._settle, lambda n: n > 60, MemoryError("cannot allocate")),
    ),
    "a digest": lambda patch: patch.setattr(pictures, "hashlib", digests(MemoryError("sha256"))),
    "progress": lambda patch: patch.setattr(
        Attempt, "progress", failing(Attempt.progress, lambda n: n == 8, FULL)
    ),
    "turns": lambda patch: patch.setattr(
        turns, "os", types.SimpleNamespace(**{**vars(os), "pwrite": failing(os.pwrite, _9th, FULL)})
    ),
    "robots": lambda patch: patch.setattr(robots, "_add", failing(robots._add, _2nd, FULL)),
    "sockets": lambda patch: patch.setattr(
        connection,
        "_Socket",
        failing(connection._Socket, _2nd, OSError(errno.EMFILE, "Too many open files")),
    ),
    "the resizer": lambda patch: patch.setattr(
        guard, "cpu_limited", failing(guard.cpu_limited, _9th, MemoryError("resizer"))
    ),
    "a callback": lambda patch: patch.setattr(
        connection.Connection,
        "_write",
        failing(connection.Connection._write, _9th, MemoryError("body")),
    ),
}


def _2nd(call: int) -> bool:
    return call == 2


def _9th(call: int) -> bool:
    return call == 9


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", SABOTAGE)
def test_it_fails_the_attempt_and_no_address(
    web: HostileWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    task = Task(web, tmp_path / "run", robots="respect", requests_per_s=10_000.0)
    with monkeypatch.context() as patch:
        SABOTAGE[what](patch)
        with pytest.raises((OSError, MemoryError, RuntimeError)):
            task()
    assert len(task.small.asked()) < 40, "nothing is asked for in vain"
    task.is_as_if_nothing_had_been()


def test_that_authorities_cannot_be_read_is_not_the_servers_fault(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    cacert_badfile = 77
    monkeypatch.setattr(transfers.Transfers, "perform", lambda *arguments: cacert_badfile)
    with pytest.raises(RuntimeError, match="libcurl error 77"):
        task()
    assert not journalled(task.run)


def test_a_machine_without_a_network_condemns_nobody(tmp_path: Path) -> None:
    web = HostileWeb()
    task = Task(web, tmp_path / "run", connect_timeout_s=0.5, retries=0)
    web.close()
    with pytest.raises(NoNetwork, match=r"of the last 40 addresses, of 5 domains, none .*connect"):
        task()
    assert not journalled(task.run)
    task.web = HostileWeb(port=web.port)
    task.small.web = task.web
    try:
        task.is_as_if_nothing_had_been()
    finally:
        task.web.close()


def ended_as(status: str, host: str, http_status: int = 0, received: int = 0) -> silence.Ended:
    url = f"http://{host}/a.jpg"
    outcome = {"url": url, "status": status, "http_status": http_status, "received": received}
    return host.encode(), outcome, None


def test_silence_is_believed_once_somebody_answers() -> None:
    dead = [ended_as("connect", f"a{i}.example") for i in range(30)]
    heard = silence.Silence(threads=4)
    assert not any(map(heard.after, dead))
    refused = ended_as("blocked_scheme", "b.example")
    assert heard.after(refused) == [refused]  # that says nothing of the network
    answer = ended_as("dead_link", "c.example", 404)
    assert heard.after(answer) == [*dead, answer]
    assert heard.after(dead[0]) == []
    assert heard.rest() == [dead[0]]


def test_a_few_dead_servers_are_no_dead_network() -> None:
    heard = silence.Silence(threads=4)
    large = [ended_as("dns", f"a{i}.b{i % 3}.example") for i in range(500)]
    assert not any(map(heard.after, large))
    assert heard.rest() == large
    last = [ended_as("timeout", f"a{i}.example") for i in range(33)]  # 4 of them were the slowest
    assert not any(map(heard.after, last))
    assert heard.rest() == last
    assert not any(map(heard.after, [*last, ended_as("dns", "b.example")]))
    with pytest.raises(NoNetwork, match="none answered \\(dns, timeout\\)"):
        heard.rest()


def test_a_dead_network_is_not_waited_for_to_the_end() -> None:
    heard = silence.Silence(threads=4)
    with pytest.raises(NoNetwork, match="of the last 340 addresses"):
        for i in range(10_000):
            heard.after(ended_as("timeout", f"a{i}.example"))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGXCPU])
def test_a_picture_that_kills_two_attempts_is_left_out(
    task: Task, staging: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(staging.EightBitResizer, "__call__", dying(staging, 17, number))
    attempt = lambda: ended(fork(lambda: task.small.work_on(task.run, task.planned)))  # noqa: E731
    assert [attempt(), attempt(), attempt()] == [-number, -number, 0]
    (manifest,) = everything(task.run / "download")
    assert manifest.stats.dropped.keys() == {"dead_link", "undecodable"}
    assert manifest.stats.counts["pictures"] == 29


def test_attempts_that_others_kill_condemn_no_picture(
    task: Task, staging: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(staging.EightBitResizer, "__call__", dying(staging, 17, signal.SIGKILL))
        for _ in range(3):
            assert ended(fork(lambda: task.small.work_on(task.run, task.planned))) == -9
    task.is_as_if_nothing_had_been()


def dying(staging: Any, poison: int, number: int) -> Any:
    """A resizer that one picture kills the process of."""
    own, bad = staging.EightBitResizer.__call__, picture(poison)

    def call(resizer: Any, stream: Any, boxes: Any = None) -> Any:
        if stream.getvalue() == bad:
            os.kill(os.getpid(), number)
        return own(resizer, stream, boxes)

    return call

"""Requests to a host, in step over threads and processes."""

from __future__ import annotations

import errno
import fcntl
import itertools
import multiprocessing
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.pace import Pace, pause


def never() -> bool:
    return False


def _moments(folder: Path, per_s: float, count: int) -> list[float]:
    pace = Pace(folder, per_s, "some.setting")
    moments = []
    for _ in range(count):
        pace.wait("a.example", never)
        moments.append(time.time())
    return moments


def test_processes_and_threads_share_a_rate(tmp_path: Path) -> None:
    """Three processes of two threads ask 30 times in all, 25 a second: the last after 29/25 s."""
    jobs = [(tmp_path, 25.0, 5)] * 6
    began = time.time()
    with multiprocessing.get_context("spawn").Pool(3) as pool, ThreadPoolExecutor(3) as threads:
        here = threads.map(lambda job: _moments(*job), jobs[:3])
        there = pool.starmap(_moments, jobs[3:])
        moments = sorted(itertools.chain(*here, *there))
    assert len(moments) == 30
    # Nobody is early: the n-th request is not before the n-th moment.
    for number, moment in enumerate(moments):
        assert moment >= began + number / 25 - 0.001
    (last,) = struct.unpack("<d", (tmp_path / "a.example.host").read_bytes())
    assert last >= began + 30 / 25


def test_hosts_have_a_rate_each(tmp_path: Path) -> None:
    pace = Pace(tmp_path, 0.01, "some.setting")
    began = time.monotonic()
    pace.wait("a.example:80", never)
    pace.wait("../b.example", never)
    assert time.monotonic() - began < 20
    assert len(list(tmp_path.iterdir())) == 2


def test_a_hold_is_for_all(tmp_path: Path) -> None:
    Pace(tmp_path, 1000, "some.setting").hold("a.example", 0.5)
    began = time.time()
    (moment,) = _moments(tmp_path, 1000, 1)
    assert moment >= began + 0.45


def test_a_hold_has_a_bound(tmp_path: Path) -> None:
    """A longer one would be taken for that of a clock that was set back, so for none."""
    pace = Pace(tmp_path, 1000, "some.setting")
    pace.hold("a.example", 1e9)
    pace.hold("a.example", 0)
    (held,) = struct.unpack("<d", (tmp_path / "a.example.host").read_bytes())
    assert held == pytest.approx(time.time() + 86_400, abs=60)


@pytest.mark.parametrize("host", ["..", ".", "a" * 300, "é" * 200, "a b/c"])
def test_every_host_has_a_file_of_its_own(tmp_path: Path, host: str) -> None:
    pace = Pace(tmp_path / "pace", 1000, "some.setting")
    pace.wait("a.example", never)
    pace.wait(host, never)
    assert len(list((tmp_path / "pace").iterdir())) == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_what_has_no_host_has_no_pace(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "pace", 0.01, "some.setting")
    for _ in range(3):
        pace.hold("", 100)
        pace.wait("", never)
    assert list(tmp_path.iterdir()) == []


def test_a_stop_ends_the_wait(tmp_path: Path) -> None:
    pace = Pace(tmp_path, 0.01, "some.setting")
    pace.wait("a.example", never)
    began = time.monotonic()
    pace.wait("a.example", lambda: True)
    pause(60, lambda: True)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("content", [b"", b"\0" * 3, struct.pack("<d", 9e12), b"\xff" * 8])
def test_a_file_that_makes_no_sense_holds_nobody_up(tmp_path: Path, content: bytes) -> None:
    """So it is after a clock was set back by years."""
    (tmp_path / "a.example.host").write_bytes(content)
    began = time.time()
    (moment,) = _moments(tmp_path, 10, 1)
    assert moment - began < 20


def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(ConfigError, match=r"a\.example\.host: .* no locks .* some\.setting=null"):
        Pace(tmp_path, 10, "some.setting").wait("a.example", never)
    Pace(tmp_path, None, "some.setting").wait("a.example", never)

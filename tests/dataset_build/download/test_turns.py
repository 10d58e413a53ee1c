from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dataset_build.download import DomainLimits, DownloadSettings
from dataset_build.download.connection import Detour
from dataset_build.download.transport import Transport
from dataset_build.download.turns import HeldOff, Turns
from pipeline.config import ConfigError

ROOT = Path(__file__).parents[3]
LOOPBACK = {"allow_networks": ("127.0.0.0/8",)}

# One task's worth of fetching, as a process of its own: settings, folder, detour, then addresses.
WORKER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from dataset_build.download import DownloadSettings
from dataset_build.download.connection import Detour
from dataset_build.download.transport import Transport

settings = DownloadSettings.model_validate_json(sys.argv[1])
folder = Path(sys.argv[2])
transport = Transport(settings, Detour.parse(sys.argv[3]), lambda: False, folder=folder)
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(8) as pool:
    for answer in pool.map(transport.fetch, sys.argv[4:]):
        print(answer.reason)
transport.close()
"""


def work(web: Any, folder: Path, urls: list[str], **settings: Any) -> subprocess.Popen[str]:
    given = {"retries": 0, "robots": "ignore", "requests_per_s": None, **LOOPBACK, **settings}
    text = DownloadSettings(**given).model_dump_json()
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, text, str(folder), web.connect_to, *urls],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(*workers: subprocess.Popen[str]) -> None:
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"


def begin(*workers: subprocess.Popen[str]) -> None:
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()


def reasons(workers: list[subprocess.Popen[str]]) -> list[str]:
    return [line for worker in workers for line in worker.communicate()[0].split()]


def pictures(worker: int, count: int, wait_s: float) -> list[str]:
    hosts = [f"h{i % 3}.site.example" for i in range(count)]
    return [
        f"http://{host}/picture/{worker * 100 + i}?wait={wait_s}" for i, host in enumerate(hosts)
    ]


def test_four_workers_together_keep_few_connections_to_a_domain(web: Any, tmp_path: Path) -> None:
    workers = [work(web, tmp_path, pictures(i, 12, 0.05), polite_connections=3) for i in range(4)]
    wait_for(*workers)
    begin(*workers)
    assert reasons(workers) == ["ok"] * 48
    assert web.most_active == 3  # no more, and no fewer: they are made use of


def test_four_workers_together_keep_to_a_rate(web: Any, tmp_path: Path) -> None:
    settings = {"requests_per_s": 10.0, "polite_connections": 8}
    workers = [work(web, tmp_path, pictures(i, 10, 0), **settings) for i in range(4)]
    wait_for(*workers)
    begin(*workers)
    assert reasons(workers) == ["ok"] * 40
    times = sorted(when for when, _, _ in web.requests)
    assert len(times) == 40
    # A request begins when it is its turn; by how much later it arrives, the log is uncertain.
    assert times[-1] - times[0] > 39 / 10 - 0.4
    for first, last in zip(times, times[10:], strict=False):
        assert last - first > 0.6


def test_limits_of_one_domain_are_not_anothers(web: Any, tmp_path: Path) -> None:
    urls = [f"http://h{i}.cdn.example/picture/{i}?wait=0.2" for i in range(8)]
    limits = {"cdn.example": DomainLimits(connections=8, requests_per_s=None)}
    start = time.monotonic()
    settings = {"polite_connections": 1, "requests_per_s": 1.0, "domain_limits": limits}
    made = transport(web, tmp_path, **settings)
    with ThreadPoolExecutor(8) as pool:
        assert {answer.reason for answer in pool.map(made.fetch, urls)} == {"ok"}
    made.close()
    assert time.monotonic() - start < 6  # by the usual limits it would be 8 s
    assert web.most_active > 4


def test_limits_of_what_is_no_domain_are_refused() -> None:
    """They would never be looked at."""
    for name in ("www.cdn.example", "Cdn.example"):
        with pytest.raises(ValueError, match=rf"{name}: not a registered domain.* cdn\.example"):
            DownloadSettings(domain_limits={name: DomainLimits(connections=8)})


def transport(web: Any, folder: Path | None, **settings: Any) -> Transport:
    given = {"retries": 0, "robots": "ignore", "requests_per_s": None, **LOOPBACK, **settings}
    detour = Detour.parse(web.connect_to)
    return Transport(DownloadSettings(**given), detour, lambda: False, folder=folder)


def test_a_killed_worker_takes_no_connection_with_it(web: Any, tmp_path: Path) -> None:
    hung = [f"http://site.example/mute?{i}" for i in range(2)]
    worker = work(web, tmp_path, hung, polite_connections=2, timeout_s=60, slow_s=60)
    wait_for(worker)
    begin(worker)
    while len(web.hits) < 2:
        time.sleep(0.02)
    made = transport(web, tmp_path, timeout_s=5)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(made.fetch, "http://site.example/ok.jpg")
        time.sleep(0.5)
        assert not answer.done()  # both connections are the worker's
        os.kill(worker.pid, signal.SIGKILL)
        assert answer.result(timeout=5).reason == "ok"
    made.close()
    worker.communicate()


def test_nobody_asks_a_domain_that_wants_to_be_left_alone(web: Any, tmp_path: Path) -> None:
    """One task is told; others, who have not asked yet, wait as well."""
    urls = [f"http://b.site.example/picture/{i}" for i in range(4)]
    others = [work(web, tmp_path, urls), work(web, tmp_path, ["http://other.example/ok.jpg"])]
    made = transport(web, tmp_path)
    wait_for(*others)
    told = "http://a.site.example/status/503?header=Retry-After:%203"
    assert made.fetch(told).reason == "server_error"
    begin(*others)
    until = web.requests[0][0] + 3
    assert reasons(others) == ["ok"] * 5
    asked = {host: when for when, host, _ in reversed(web.requests)}
    assert asked["b.site.example"] >= until
    assert asked["other.example"] < until
    made.close()


def test_a_domain_that_wants_too_much_patience_is_given_up(web: Any, tmp_path: Path) -> None:
    made = transport(web, tmp_path, max_wait_s=1.0, timeout_s=5)
    told = "http://a.example/status/429?header=Retry-After:%203600"
    assert made.fetch(told).reason == "too_many_requests"
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(made.fetch, ["http://b.a.example/ok.jpg"] * 50))
    made.close()
    assert {(answer.reason, answer.requests) for answer in answers} == {("held_off", 0)}
    assert time.monotonic() - start < 5  # 50 waits of a second in 8 threads would be 7 s
    assert len(web.hits) == 1


def test_patience_is_counted_over_all_waits_of_a_task(tmp_path: Path) -> None:
    turns = Turns(DownloadSettings(max_wait_s=0.7, requests_per_s=None), None, lambda: False)
    for _ in range(2):
        turns.hold("a.example", 0.3)
        with ThreadPoolExecutor(2) as pool:  # who waits together waits once
            list(pool.map(lambda _: _enter(turns, "a.example"), range(2)))
    turns.hold("a.example", 0.3)
    with pytest.raises(HeldOff, match="for another 0 s"):
        _enter(turns, "a.example")


def _enter(turns: Turns, host: str, delay_s: float = 0.0) -> float:
    with turns.turn(host, delay_s):
        return time.time()


def test_a_tenant_speaks_for_himself_alone(tmp_path: Path) -> None:
    """Though all that lies below a domain shares its connections and its rate."""
    settings = DownloadSettings(requests_per_s=5.0, max_wait_s=0)
    turns = Turns(settings, tmp_path / "turns", lambda: False)
    turns.hold("evil.blogspot.com", 86_400)
    with pytest.raises(HeldOff):
        _enter(turns, "img.evil.blogspot.com")
    _enter(turns, "slow.github.io", delay_s=20)
    times = [_enter(turns, f"good{i}.blogspot.com") for i in range(4)]
    times.append(_enter(turns, "evil2.blogspot.com", delay_s=2))
    assert times[-1] - times[0] > 4 / 5 - 0.01
    assert 1.9 > _enter(turns, "good0.blogspot.com") - times[-1] > 0.19
    assert _enter(turns, "img.evil2.blogspot.com") - times[-1] > 1.99
    turns.close()


def test_no_stranger_shares_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataset_build.download.turns._BUCKETS", 1)
    turns = Turns(DownloadSettings(requests_per_s=None, max_wait_s=0), None, lambda: False)
    for i in range(3):
        _enter(turns, f"over{i}.example", delay_s=0.001)
    time.sleep(0.01)
    for i in range(7):
        turns.hold(f"held{i}.example", 100 + i)
    for i in range(30):
        _enter(turns, f"free{i}.example")
        _enter(turns, f"slow{i}.example", delay_s=0.001)
        time.sleep(0.002)
    for i in range(7):
        with pytest.raises(HeldOff, match=f"another {100 + i} s"):
            _enter(turns, f"held{i}.example")


def test_a_hosts_own_delay_is_kept_and_bounded(web: Any, tmp_path: Path) -> None:
    web.robots["a.example"] = ("200 OK", b"User-agent: *\nCrawl-delay: 3600")
    made = transport(web, tmp_path, robots="respect", max_crawl_delay_s=0.4)
    for _ in range(3):
        assert made.fetch("http://a.example/ok.jpg").reason == "ok"
    made.close()
    _, one, two, three = (when for when, _, _ in web.requests)
    assert 0.35 < two - one < 60
    assert 0.35 < three - two < 60


def test_a_stop_ends_all_waiting(tmp_path: Path) -> None:
    stop = threading.Event()
    settings = DownloadSettings(requests_per_s=0.01)
    turns = Turns(settings, tmp_path / "turns", stop.is_set)
    _enter(turns, "a.example")
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: _enter(turns, "a.example"), range(4)))
    assert time.monotonic() - start < 50  # of 100
    timer.join()
    turns.close()


def test_a_time_from_a_clock_gone_wrong_holds_nobody(tmp_path: Path) -> None:
    settings = DownloadSettings(requests_per_s=None)
    turns = Turns(settings, tmp_path / "turns", lambda: False)
    with turns._records(turns._tenant("a.example").key) as (record,):
        record.begin = record.held = time.time() + 10**7
    start = time.monotonic()
    _enter(turns, "a.example")
    assert time.monotonic() - start < 100
    turns.close()


def test_a_file_system_without_locks_is_said_so(
    web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(ConfigError, match=r"turns: this file system has no locks .*limits_span"):
        transport(web, tmp_path)
    made = transport(web, tmp_path, limits_span="task", polite_connections=1)
    with ThreadPoolExecutor(4) as pool:
        assert {answer.reason for answer in pool.map(made.fetch, pictures(0, 4, 0.05))} == {"ok"}
    made.close()
    assert web.most_active == 1


def test_servers_are_told_whom_they_deal_with() -> None:
    with pytest.raises(ConfigError, match=r"download\.contact is not set"):
        Transport(DownloadSettings(), None, lambda: False)
    Transport(DownloadSettings(contact="https://lab.example"), None, lambda: False).close()

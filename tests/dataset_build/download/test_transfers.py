from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dataset_build.download import DownloadSettings
from dataset_build.download.connection import Detour
from dataset_build.download.transfers import Transfers
from dataset_build.download.transport import Transport


def transport(web: Any, stop: threading.Event) -> Transport:
    settings = DownloadSettings(timeout_s=10.0, retries=0, allow_networks=("127.0.0.0/8",))
    return Transport(settings, Detour.parse(web.connect_to), stop.is_set)


def test_a_connection_is_used_again_by_whichever_thread_comes_next(web: Any) -> None:
    made = transport(web, threading.Event())
    for number in range(6):
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(made.fetch, f"http://a.example/picture/{number}").result()
        assert answer.reason == "ok"
    made.close()
    assert web.connections == 1


def test_idle_connections_are_kept_within_bounds(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataset_build.download.transfers.KEPT", 3)
    made = transport(web, threading.Event())
    for number in range(12):
        assert made.fetch(f"http://h{number}.example/ok.jpg").reason == "ok"
    assert web.connections == 12
    deadline = time.monotonic() + 5
    while web.still_open > 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert web.still_open <= 3
    made.close()


def test_a_stop_ends_transfers_that_wait_for_a_silent_server(web: Any) -> None:
    stop = threading.Event()
    made = transport(web, stop)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(made.fetch, f"http://h{n}.example/mute") for n in range(8)]
        while len(web.hits) < 8:
            time.sleep(0.01)
        began = time.monotonic()
        stop.set()
        answers = [future.result() for future in asked]
        assert time.monotonic() - began < 5
    made.close()
    assert {answer.reason for answer in answers} == {"stopped"}


def test_if_its_thread_fails_nobody_waits_and_the_end_is_loud(
    web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = transport(web, threading.Event())
    assert made.fetch("http://a.example/ok.jpg").reason == "ok"

    def fails(transfers: Transfers) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(Transfers, "_settle", fails)
    for _ in range(2):  # the one that it happens to, and who comes after
        with pytest.raises(RuntimeError, match="transfers have failed"):
            made.fetch("http://a.example/ok.jpg")
    with pytest.raises(MemoryError):
        made.close()

"""Servers that drip, stall or never end, in every phase: each address ends in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from dataset_build.download import DownloadSettings
from dataset_build.download.connection import Answer, Detour
from dataset_build.download.transport import Transport

DEADLINE_S = 1.5

# Path, and what the address may end in.
PHASES = {
    "/drip-status": {"timeout"},
    "/drip-head": {"timeout"},
    "/drip-interim": {"timeout"},
    "/endless-interim": {"bad_response"},
    "/endless-head": {"bad_response"},
    "/endless-line": {"bad_response"},
    "/drip-body": {"timeout"},
    "/drip-chunk": {"timeout", "bad_response"},
    "/stall-body": {"timeout"},
    "/drip-redirect": {"ok", "timeout"},
    "/hop": {"timeout"},  # each hop in time, the chain not
    "/endless": {"too_large"},
    "/endless-chunked": {"too_large"},
    "/huge": {"too_large"},
    "/short": {"truncated"},
    "/mute": {"timeout"},
}


@contextmanager
def transport(address: tuple[str, int], **settings: Any) -> Iterator[Transport]:
    chosen: dict[str, Any] = {"timeout_s": DEADLINE_S, "max_bytes": 1 << 20, "max_redirects": 20}
    chosen |= {"polite_connections": 64, "allow_networks": ("127.0.0.0/8",)}
    chosen |= {"robots": "ignore", "requests_per_s": None, **settings}
    detour = Detour(".example", *address)
    made = Transport(DownloadSettings(**chosen), detour, lambda: False)
    yield made
    made.close()


def timed(fetch: Callable[[str], Answer], url: str) -> tuple[str, float]:
    start = time.monotonic()
    return fetch(url).reason, time.monotonic() - start


@pytest.mark.parametrize("retries", [0, 2])
def test_every_phase_of_http_ends_in_time(web: Any, retries: int) -> None:
    urls = [f"http://a{number}.example{path}" for number, path in enumerate(PHASES)]
    with (
        transport((web.host, web.port), retries=retries) as made,
        ThreadPoolExecutor(len(urls)) as pool,
    ):
        ended = dict(zip(PHASES, pool.map(lambda url: timed(made.fetch, url), urls), strict=True))
        for url, path in zip(urls, PHASES, strict=True):
            if ended[path][1] > DEADLINE_S + 1:  # beside 15 others, and all their servers
                ended[path] = timed(made.fetch, url)
    late = {path: seconds for path, (_, seconds) in ended.items() if seconds > DEADLINE_S + 1}
    assert not late
    wrong = {path: reason for path, (reason, _) in ended.items() if reason not in PHASES[path]}
    assert not wrong


def silent(client: socket.socket, ended: threading.Event) -> None:
    ended.wait(20)


def hello_drip(client: socket.socket, ended: threading.Event) -> None:
    """A TLS record of 16 KiB that claims to be a handshake, byte by byte."""
    client.sendall(b"\x16\x03\x03\x40\x00")
    while not ended.wait(0.05):
        client.sendall(b"\x02")


def alert_flood(client: socket.socket, ended: threading.Event) -> None:
    """Warnings without end, each a whole record."""
    while not ended.is_set():
        client.sendall(b"\x15\x03\x03\x00\x02\x01\x5a" * 100)


def change_cipher_flood(client: socket.socket, ended: threading.Event) -> None:
    while not ended.wait(0.01):
        client.sendall(b"\x14\x03\x03\x00\x01\x01")


Behaviour = Callable[[socket.socket, threading.Event], None]


@contextmanager
def listening(behave: Behaviour | None) -> Iterator[tuple[str, int]]:
    """A server that does one thing to every client; with None it never accepts any."""
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def serve(client: socket.socket) -> None:
        assert behave is not None
        with client:
            try:
                behave(client, ended)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(client,)))
            threads[-1].start()

    server = socket.create_server(("127.0.0.1", 0), backlog=0 if behave is None else 64)
    waiting = []
    if behave is None:  # fill the queue, so that further connections get no answer at all
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(server.getsockname())
            waiting.append(client)
    else:
        threads.append(threading.Thread(target=accept))
        threads[0].start()
    yield server.getsockname()
    ended.set()
    if behave is not None:
        server.shutdown(socket.SHUT_RDWR)
    server.close()
    for client in waiting:
        client.close()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("behave", [None, silent, hello_drip, alert_flood, change_cipher_flood])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connecting_and_shaking_hands_end_in_time(behave: Behaviour | None, scheme: str) -> None:
    with listening(behave) as address, transport(address) as made:
        reason, seconds = timed(made.fetch, f"{scheme}://a.example/ok.jpg")
    assert seconds <= DEADLINE_S + 1
    assert reason in ("timeout", "tls", "bad_response", "connection_lost")
    if behave in (None, silent):
        assert reason == "timeout"


def test_a_connection_that_does_not_come_about_ends_before_its_address_does() -> None:
    with (
        listening(None) as address,
        transport(address, connect_timeout_s=0.5, timeout_s=10, retries=0) as made,
    ):
        reason, seconds = timed(made.fetch, "http://a.example/ok.jpg")
    assert reason == "timeout"
    assert seconds < 5


def test_hostile_addresses_together_take_no_longer_than_they_may(web: Any) -> None:
    """128 of them over 32 connections: at most 1.5 times four deadlines in a row."""
    paths = [path for path, reasons in PHASES.items() if "timeout" in reasons]
    urls = [f"http://a{n}.site{n}.example{paths[n % len(paths)]}" for n in range(128)]
    start = time.monotonic()
    with (
        transport((web.host, web.port), timeout_s=1.0, retries=1) as made,
        ThreadPoolExecutor(32) as pool,
    ):
        reasons = {answer.reason for answer in pool.map(made.fetch, urls)}
    assert time.monotonic() - start <= 1.5 * 128 / 32
    assert reasons <= {"timeout", "bad_response", "ok"}

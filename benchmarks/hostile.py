"""A thousand hostile addresses: how long they hold a task up, against what their deadlines allow.

Each stalls, drips or never ends; 64 are fetched at the same time, as threads of a task do. `peer`
is the bound: every address takes its whole deadline, 64 at a time.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from dataset_build.download import DownloadSettings
from dataset_build.download.connection import Detour
from dataset_build.download.transport import Transport

ADDRESSES = 1000
CONNECTIONS = 64
DEADLINE_S = 1.0
_HEAD = b"HTTP/1.1 200 OK\r\n"
_JPEG = b"\xff\xd8\xff\xe0" + bytes(60)
# What is sent at once, then again and again, and how often a second.
_KINDS = (
    (b"", b"", 1),  # silence
    (b"HTTP/1.1 ", b" ", 10),
    (_HEAD + b"X-Drip: ", b"x", 10),
    (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 50),
    (_HEAD + b"Content-Length: 99999\r\n\r\n" + _JPEG, b"x", 10),
    (_HEAD + b"Content-Length: 99999\r\n\r\n" + _JPEG, b"", 1),
    (_HEAD + b"Transfer-Encoding: chunked\r\n\r\n40\r\n" + _JPEG + b"\r\n", b"1\r\nx\r\n", 10),
    (b"HTTP/1.1 302 Found\r\nLocation: /on\r\nContent-Length: 9999\r\n\r\n", b"x", 10),
)


def measure() -> Iterator[dict[str, Any]]:
    """Seconds until the last address has ended, and until each has at the latest."""
    with _hostile_web() as port:
        settings = DownloadSettings(
            timeout_s=DEADLINE_S,
            allow_networks=("127.0.0.0/8",),
            polite_connections=CONNECTIONS,
            requests_per_s=None,
            robots="ignore",
        )
        detour = Detour(".example", "127.0.0.1", port)
        transport = Transport(settings, detour, lambda: False)
        slowest = 0.0

        def fetch(number: int) -> str:
            nonlocal slowest
            start = time.monotonic()
            answer = transport.fetch(f"http://a.site{number}.example/{number}")
            slowest = max(slowest, time.monotonic() - start)
            return answer.reason

        start = time.monotonic()
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            reasons = list(pool.map(fetch, range(ADDRESSES)))
        seconds = time.monotonic() - start
        transport.close()
    assert set(reasons) <= {"timeout", "connection_lost"}, set(reasons)
    bound = ADDRESSES / CONNECTIONS * DEADLINE_S
    yield {
        "name": "hostile",
        "ours": round(seconds, 2),
        "peer": bound,
        "ratio": round(seconds / bound, 3),
        "unit": "s",
        "addresses": ADDRESSES,
        "connections": CONNECTIONS,
        "deadline_s": DEADLINE_S,
        "slowest_s": round(slowest, 2),
    }


@contextmanager
def _hostile_web() -> Iterator[int]:
    """The port of a server that treats its n-th request in the n-th way."""
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def serve(client: socket.socket) -> None:
        with client:
            try:
                number = int(client.recv(65536).split()[1].strip(b"/"))
                at_once, again, a_second = _KINDS[number % len(_KINDS)]
                client.sendall(at_once)
                while not ended.wait(1 / a_second):
                    # A client that has gone shows when it is sent something, or sends no more.
                    if not again and client.recv(1) == b"":
                        return
                    client.sendall(again)
            except (OSError, ValueError, IndexError):
                pass

    def accept() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(client,), daemon=True))
            threads[-1].start()

    server = socket.create_server(("127.0.0.1", 0), backlog=256)
    acceptor = threading.Thread(target=accept)
    acceptor.start()
    yield server.getsockname()[1]
    ended.set()
    server.shutdown(socket.SHUT_RDWR)
    acceptor.join()
    server.close()
    for thread in threads:
        thread.join(5)

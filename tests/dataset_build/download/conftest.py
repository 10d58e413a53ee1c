"""A web server that does everything a web server should not, on loopback."""

from __future__ import annotations

import gzip
import io
import socket
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from PIL import Image


def picture(seed: int = 0, width: int = 64, height: int = 48, form: str = "JPEG") -> bytes:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + name + data + check


def png(width: int, height: int, pixels: bytes, bits: int = 8) -> bytes:
    """A grey PNG that claims any size, whatever its pixels say."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


FILES = {
    "/ok.jpg": picture(),
    "/ok.png": picture(1, form="PNG"),
    "/ok.webp": picture(2, form="WEBP"),
    "/ok.gif": picture(3, form="GIF"),
    "/large.jpg": picture(4, 800, 600),
    "/page.html": b"<html><body>" + b"x" * 5000,
    "/drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
    "/scan.tiff": picture(5, form="TIFF"),
    "/empty.jpg": b"",
    "/half.jpg": picture(6)[:700],
    "/half.png": picture(7, form="PNG")[:3000],
    "/half.webp": picture(8, form="WEBP")[:700],
    "/bomb.png": png(30_000, 30_000, b""),
    "/tiny.png": picture(9, 8, 8, form="PNG"),
    "/long.png": picture(10, 2000, 20, form="PNG"),
    "/corrupt.png": png(64, 64, b"far too few"),
    "/deep.png": png(64, 64, (b"\0" + b"\x80\x10" * 64) * 64, bits=16),
}


def host_of(head: bytes) -> str:
    lines = head.decode("latin-1").split("\r\n")
    return next(line[6:] for line in lines if line.lower().startswith("host: "))


class HostileWeb:
    """Serves on one loopback address; `hits` are the request lines that it saw."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.hits: list[str] = []
        self.heads: list[str] = []
        self.requests: list[tuple[float, str, str]] = []  # Unix time, host, target
        self.robots: dict[str, tuple[Any, ...]] = {}
        """By host: status line, body and headers of its robots.txt."""
        self.active = self.most_active = 0
        self.sent = 0
        self.connections = 0
        self.still_open = 0
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=256)
        self.host, self.port = self._socket.getsockname()[:2]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    @property
    def connect_to(self) -> str:
        return f".example={self.host}:{self.port}"

    def close(self) -> None:
        self._ended.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._socket.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self.still_open += 1
        try:
            self._converse(client)
        finally:
            with self._lock:
                self.still_open -= 1

    def _converse(self, client: socket.socket) -> None:
        with client:
            client.settimeout(0.2)
            pending = b""
            while not self._ended.is_set():
                try:
                    data = client.recv(65536)
                except TimeoutError:
                    continue
                except OSError:
                    return
                if not data:
                    return
                pending += data
                while b"\r\n\r\n" in pending:
                    head, _, pending = pending.partition(b"\r\n\r\n")
                    target, host = head.split(b" ")[1].decode(), host_of(head)
                    with self._lock:
                        self.hits.append(target)
                        self.heads.append(head.decode("latin-1"))
                        self.requests.append((time.time(), host, target))
                    try:
                        if target == "/robots.txt" and host in self.robots:
                            status, body, *headers = self.robots[host]
                            self._send(client, body, status, *headers)
                        elif not self._answer(client, target):
                            return
                    except OSError:
                        return

    def _send(
        self, client: socket.socket, body: bytes, status: str = "200 OK", *headers: str
    ) -> bool:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
        client.sendall("\r\n".join(lines).encode() + body)
        return True

    def _drip(self, client: socket.socket, data: bytes) -> bool:
        end = time.monotonic() + 20
        while time.monotonic() < end and not self._ended.wait(0.1):
            client.sendall(data)
        return False

    def _flood(self, client: socket.socket, chunked: bool) -> bool:
        block = FILES["/ok.jpg"][:64] + bytes(65536 - 64)
        while not self._ended.is_set():
            client.sendall(b"10000\r\n" + block + b"\r\n" if chunked else block)
            self.sent += len(block)
        return False

    def _answer(self, client: socket.socket, target: str) -> bool:
        """Answer one request; False closes the connection."""
        client.settimeout(20)
        try:
            return self._route(client, urlsplit(target).path, parse_qs(urlsplit(target).query))
        finally:
            client.settimeout(0.2)

    def _route(self, client: socket.socket, path: str, query: dict[str, list[str]]) -> bool:
        head = b"HTTP/1.1 200 OK\r\n"
        if path in FILES:
            return self._send(client, FILES[path], "200 OK", *query.get("header", []))
        if path.startswith("/picture/"):
            with self._lock:
                self.active += 1
                self.most_active = max(self.active, self.most_active)
            time.sleep(float(query.get("wait", ["0"])[0]))
            with self._lock:
                self.active -= 1
            return self._send(client, picture(int(path.split("/")[2])))
        if path.startswith("/status/"):
            return self._send(client, b"no", unquote(path[8:]), *query.get("header", []))
        if path == "/redirect":
            return self._send(
                client, b"", "302 Found", f"Location: {query['to'][0]}", *query.get("header", [])
            )
        if path == "/loop":
            return self._send(client, b"", "302 Found", "Location: /loop")
        if path == "/nowhere":
            return self._send(client, b"", "302 Found")
        if path == "/flaky":
            with self._lock:
                self._counts[path] = count = self._counts.get(path, 0) + 1
            if count == 1:
                return self._send(client, b"", "503 Busy", "Retry-After: 1")
            return self._send(client, FILES["/ok.jpg"])
        if path == "/drip-head":
            client.sendall(head + b"X-Drip: ")
            return self._drip(client, b"x")
        if path == "/drip-body":
            client.sendall(head + b"Content-Length: 1000000\r\n\r\n" + FILES["/ok.jpg"][:64])
            return self._drip(client, b"x")
        if path == "/drip-status":
            client.sendall(b"HTTP/1.1 ")
            return self._drip(client, b" ")
        if path == "/drip-chunk":
            client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            return self._drip(client, b"0")
        if path == "/drip-interim":
            return self._drip(client, b"HTTP/1.1 103 Early Hints\r\n\r\n")
        if path == "/endless-interim":
            while not self._ended.is_set():
                client.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 100)
            return False
        if path == "/endless-head":
            client.sendall(head)
            while not self._ended.is_set():
                client.sendall(b"X-More: of the same\r\n" * 100)
            return False
        if path == "/endless-line":
            client.sendall(head + b"X-Long: ")
            while not self._ended.is_set():
                client.sendall(bytes(65536).replace(b"\0", b"x"))
            return False
        if path == "/stall-body":
            client.sendall(head + b"Content-Length: 99999\r\n\r\n" + FILES["/ok.jpg"])
            self._ended.wait(20)
            return False
        if path == "/hop":
            self._ended.wait(0.4)
            return self._send(client, b"", "302 Found", "Location: /hop")
        if path == "/drip-redirect":
            client.sendall(
                b"HTTP/1.1 302 Found\r\nLocation: /ok.jpg\r\nContent-Length: 9999\r\n\r\n"
            )
            return self._drip(client, b"x")
        if path == "/mute":
            self._ended.wait(20)
            return False
        if path == "/endless":
            client.sendall(head + b"\r\n")
            return self._flood(client, chunked=False)
        if path == "/endless-chunked":
            client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            return self._flood(client, chunked=True)
        if path == "/huge":
            client.sendall(head + b"Content-Length: 2147483648\r\n\r\n")
            return self._flood(client, chunked=False)
        if path == "/short":
            client.sendall(head + b"Content-Length: 99999\r\n\r\n" + FILES["/ok.jpg"])
            return False
        if path == "/gzip":
            body = gzip.compress(bytes(1 << 20))
            return self._send(client, body, "200 OK", "Content-Encoding: gzip")
        if path == "/noise":
            client.sendall(b"\x80\x81\x82 this is no HTTP\r\n\r\n")
            return False
        if path == "/hangup":
            return False
        return self._send(client, b"not here", "404 Not Found")


@pytest.fixture
def web() -> Iterator[HostileWeb]:
    server = HostileWeb()
    yield server
    server.close()


@pytest.fixture
def canary() -> Iterator[HostileWeb]:
    """A private service that no download may ever reach."""
    server = HostileWeb()
    yield server
    server.close()


@pytest.fixture
def staging() -> ModuleType:
    """`dataset_build.download.staging`, which warns while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dataset_build.download import staging
    return staging

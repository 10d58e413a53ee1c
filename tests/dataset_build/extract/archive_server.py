"""A web server on loopback that keeps archives, and has faults in the order that a test gives."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[["Handler", bytes], None]


@dataclass
class Request:
    """What the server saw, when."""

    path: str
    range: str
    time: float


class ArchiveServer(ThreadingHTTPServer):
    """Serves `files`; each request for a path uses up one of its `faults`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.requests: list[Request] = []
        self.etag: str | None = '"one"'
        self.honours_range = True
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients go away; that is no news."""


class Handler(BaseHTTPRequestHandler):
    server: ArchiveServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        asked = self.headers.get("Range", "")
        self.server.requests.append(Request(path, asked, time.time()))
        body = self.server.files.get(path)
        if body is None:
            return self.refuse(404)
        if faults := self.server.faults[path]:
            return faults.pop(0)(self, body)
        return self.give(body)

    def give(self, body: bytes, *, only: int | None = None, length: int | None = None) -> None:
        """The file as asked for; `only` so many bytes of it, `length` is what is said of them."""
        start, etag = 0, self.server.etag
        if self.server.honours_range and (match := re.match(r"bytes=(\d+)-", self.range)):
            condition = self.headers.get("If-Range")
            start = int(match[1]) if condition in (None, etag) else 0
        self.send_response(206 if start else 200)
        if etag:
            self.send_header("ETag", etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        rest = body[start:]
        self.send_header("Content-Length", str(len(rest) if length is None else length))
        self.end_headers()
        self.wfile.write(rest if only is None else rest[:only])
        if only is not None or length is not None:
            self.wfile.flush()
            self.close_connection = True

    @property
    def range(self) -> str:
        return self.headers.get("Range", "")

    def refuse(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"what")

    def log_message(self, *_: object) -> None:
        """Nothing: `requests` has it."""


def status(code: int, **headers: str) -> Fault:
    return lambda handler, body: handler.refuse(code, **headers)


def cut(at: int) -> Fault:
    """The connection ends after so many bytes of the body."""
    return lambda handler, body: handler.give(body, only=at)


def short_length(length: int) -> Fault:
    """The server believes that the file is shorter, and sends as much."""
    return lambda handler, body: handler.give(body[:length])


def stall(at: int | None) -> Fault:
    """Nothing more comes after so many bytes of the body; None: not even a header."""

    def silent(handler: Handler, body: bytes) -> None:
        if at is not None:
            handler.give(body, only=at)
        handler.server.closing.wait(30)
        handler.close_connection = True

    return silent


def chunked_cut(at: int) -> Fault:
    """A body of unknown length without its end."""

    def send(handler: Handler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\n" % (at, body[:at]))
        handler.close_connection = True

    return send


def changes(etag: str, body: bytes, before: Fault) -> Fault:
    """As `before`; then another file has the place."""

    def change(handler: Handler, old: bytes) -> None:
        before(handler, old)
        handler.server.etag = etag
        handler.server.files[handler.path] = body

    return change


def wrong_range(handler: Handler, body: bytes) -> None:
    """A part that nobody asked for."""
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes 7-{len(body) - 1}/{len(body)}")
    handler.send_header("Content-Length", str(len(body) - 7))
    handler.end_headers()
    handler.wfile.write(body[7:])


def half_of_the_rest(handler: Handler, body: bytes) -> None:
    """Less than was asked for, and well said, as a server may (RFC 9110, §15.3.7)."""
    start = int(handler.range.removeprefix("bytes=").rstrip("-"))
    end = (start + len(body)) // 2
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
    handler.send_header("Content-Length", str(end - start))
    handler.end_headers()
    handler.wfile.write(body[start:end])


def refuses_parts(code: int) -> Fault:
    """Whoever asks for a part is refused."""
    return lambda handler, body: handler.refuse(code) if handler.range else handler.give(body)


@contextmanager
def serving() -> Iterator[ArchiveServer]:
    server = ArchiveServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()

"""The sample web's HTTP server: every host's pictures and misbehaviour from `site.sqlite`.

One thread, one event loop, a parser of its own: a build that fetches thousands of pictures a
second from the same machine must not wait for the server.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import ctypes
import logging
import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

log = logging.getLogger("sample_web.server")

MAX_CONNECTIONS = 1024
MAX_HEADER = 32_768
DRIP_S = 0.4
"""Seconds between the bytes of a slow answer."""
_REASON = {
    200: "OK",
    301: "Moved Permanently",
    302: "Found",
    307: "Temporary Redirect",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    410: "Gone",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
_MISSING = b"no such page\n"


class Answer(NamedTuple):
    """What to send."""

    status: int
    type: str
    body: bytes
    action: str = "body"
    headers: str = ""
    variant: str = ""


class Site:
    """Looks up what a host serves at a path."""

    def __init__(self, path: Path, port: int, canary: Path | None) -> None:
        self._base = _open(path)
        self._port = port
        self._canary = canary
        files = self._base.execute("SELECT first, stop, name FROM files ORDER BY first").fetchall()
        self._starts = [first for first, _, _ in files]
        self._pictures = [_open(path.with_name(name)) for _, _, name in files]
        self._bodies = dict(self._base.execute("SELECT number, body FROM bodies").fetchall())

    def answer(self, host: str, path: str) -> Answer:
        """What a request of `path` (no percent signs) to `host` gets."""
        if not host.endswith(".example") or path.startswith("/canary"):
            return self._caught(host, path)
        row = self._base.execute(
            "SELECT action, status, type, body, headers, location FROM routes"
            " WHERE host = ? AND path = ?",
            (host, path),
        ).fetchone()
        if row is None:
            return self._mirror(path)
        action, status, content_type, number, headers, location = row
        if action == "redirect":
            location = location.replace("{port}", str(self._port))
            return Answer(status, "text/html", b"", "body", f"Location: {location}")
        body = self._bodies[number] if action == "body" else self._picture(number)
        return Answer(status, content_type, body, action, headers, location)

    def _mirror(self, path: str) -> Answer:
        """`/mirror/PICTURE/ANYTHING` is a picture on every host: repetitions need no table."""
        parts = path.split("/")
        if len(parts) == 4 and parts[1] == "mirror" and parts[2].isdecimal():
            with contextlib.suppress(LookupError):
                return Answer(200, "image/jpeg", self._picture(int(parts[2])), "picture")
        return Answer(404, "text/plain", _MISSING)

    def _picture(self, number: int) -> bytes:
        base = self._pictures[bisect.bisect_right(self._starts, number) - 1]
        row = base.execute("SELECT body FROM pictures WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise LookupError(number)
        return bytes(row[0])

    def _caught(self, host: str, path: str) -> Answer:
        """A request that nobody may make: write it down, and answer as a careless server would."""
        log.warning("canary: %s%s", host, path)
        if self._canary:
            with self._canary.open("a") as stream:
                stream.write(f"{host}{path}\n")
        return Answer(200, "text/plain", b"canary\n")


def _open(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; build the stage sample_web first")
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


class Connection(asyncio.Protocol):
    """One client; requests are answered in their order."""

    open = 0

    def __init__(self, site: Site) -> None:
        self._site = site
        self._buffer = b""
        self._transport: asyncio.Transport
        self._task: asyncio.Task[None] | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse more clients than the process should have sockets for."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        Connection.open += 1
        if Connection.open > MAX_CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop whatever was still being sent."""
        Connection.open -= 1
        self._flowing.set()
        if self._task:
            self._task.cancel()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        self._flowing.clear()

    def resume_writing(self) -> None:
        """The client caught up."""
        self._flowing.set()

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        if self._task:
            return
        self._buffer += data
        while not self._task and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            self._respond(head.decode("latin-1"))
        if len(self._buffer) > MAX_HEADER:
            self._transport.abort()

    def _respond(self, head: str) -> None:
        request, *lines = head.split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        words = request.split(" ")
        if len(words) != 3:
            self._send(Answer(400, "text/plain", b"bad request\n"), "GET", True)
            return
        method, target, version = words
        host = headers.get("host", "")
        if target.startswith("http://"):
            host, _, rest = target[7:].partition("/")
            target = "/" + rest
        last = version == "HTTP/1.0" or headers.get("connection", "").lower() == "close"
        if method not in ("GET", "HEAD"):
            self._send(Answer(405, "text/plain", b"only GET and HEAD\n"), method, True)
            return
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        # Bytes of an unescaped request line are Latin-1 here; a client may send UTF-8 raw.
        with contextlib.suppress(UnicodeError):
            target = target.encode("latin-1").decode()
        self._send(self._site.answer(name.lower(), unquote(target)), method, last)

    def _send(self, answer: Answer, method: str, last: bool) -> None:
        body, length = answer.body, len(answer.body)
        if answer.action == "cut":
            body = body[: length // 2]
            length = len(body)
        elif answer.action == "short":
            body, last = body[: length // 2], True
        elif answer.action in ("drip", "endless"):
            self._task = asyncio.get_running_loop().create_task(self._misbehave(answer))
            return
        head = _head(answer, f"Content-Length: {length}", last)
        self._transport.write(head if method == "HEAD" else head + body)
        if last:
            self._transport.close()

    async def _misbehave(self, answer: Answer) -> None:
        """Send slowly, or without end, until the client leaves."""
        try:
            if answer.action == "drip":
                head = _head(answer, f"Content-Length: {len(answer.body)}", True)
                # One kind drips already within its header, the other within its body.
                at_once = 20 if answer.variant == "1" else len(head) + 64
                whole = head + answer.body
                self._transport.write(whole[:at_once])
                for position in range(at_once, len(whole)):
                    await asyncio.sleep(DRIP_S)
                    self._transport.write(whole[position : position + 1])
            else:
                chunked = answer.variant == "1"
                size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {8 << 30}"
                self._transport.write(_head(answer, size, True))
                block = answer.body * (1 + 65_536 // len(answer.body))
                if chunked:
                    block = b"%x\r\n" % len(block) + block + b"\r\n"
                while not self._transport.is_closing():
                    await self._flowing.wait()
                    self._transport.write(block)
                    await asyncio.sleep(0)
        finally:
            self._transport.close()


def _head(answer: Answer, length: str, last: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {answer.status} {_REASON[answer.status]}",
        "Server: sample-web",
        f"Content-Type: {answer.type}",
        length,
    ]
    if answer.headers:
        lines.append(answer.headers)
    lines.append(f"Connection: {'close' if last else 'keep-alive'}")
    # A redirect may carry a path with letters outside ASCII.
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def die_with_parent() -> None:
    """Ask Linux for SIGKILL when the process that started this one ends, however it ends."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)


async def serve(site: Path, port: int, port_file: Path | None, canary: Path | None) -> None:
    """Listen on 127.0.0.1 until SIGTERM or SIGINT; port 0 lets the system choose."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    pages: list[Site] = []
    server = await loop.create_server(
        lambda: Connection(pages[0]), "127.0.0.1", port, backlog=512, start_serving=False
    )
    port = server.sockets[0].getsockname()[1]
    pages.append(Site(site, port, canary))
    await server.start_serving()
    log.info("serving %s on 127.0.0.1:%d", site, port)
    if port_file:
        temporary = port_file.with_name(f".{port_file.name}.tmp")
        temporary.write_text(str(port))
        temporary.replace(port_file)
    await stopped.wait()
    server.close()
    log.info("stopped")


def main() -> None:
    """Command line of the server."""
    parser = argparse.ArgumentParser(prog="python -m sample_web.server", description=__doc__)
    parser.add_argument("site", type=Path, help="site.sqlite, beside its pictures-*.sqlite")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--port-file", type=Path, help="where to write the port once it answers")
    parser.add_argument("--canary", type=Path, help="file that forbidden requests are added to")
    parser.add_argument("--with-parent", action="store_true", help="end when the parent does")
    given = parser.parse_args()
    if given.with_parent:
        die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    asyncio.run(serve(given.site, given.port, given.port_file, given.canary))


if __name__ == "__main__":
    main()

"""One address fetched to its end: checked, redirected, retried, politely, in bounded time."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from urllib.parse import quote, urlsplit

import idna

from dataset_build.domains import registered
from dataset_build.download import DownloadSettings
from dataset_build.download.addresses import is_public, literal
from dataset_build.download.connection import Answer, Connection, Detour
from dataset_build.download.transfers import Transfers

_MAX_URL = 8192
_MAX_HOST = 253  # RFC 1035, as text
_FIRST_PAUSE_S = 0.5  # before the first retry; doubles
_RETRIED = frozenset(
    {"connect", "connection_lost", "dns", "timeout", "truncated", "too_many_requests"}
) | {"server_error"}
_CONTROL = re.compile(r"[\x00-\x20\x7f]")


class Refused(Exception):
    """An address that is not asked at all; `reason` says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def checked(url: str) -> tuple[str, str]:
    """An address rebuilt from its parts in ASCII, and its host. Raises `Refused`.

    The rebuilt form leaves nothing in it that two parsers could read differently.
    """
    url = url.strip()
    if len(url) > _MAX_URL:
        raise Refused("malformed_url", f"{len(url)} characters")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise Refused("malformed_url", str(error)) from None
    scheme = parts.scheme.lower()
    if scheme not in ("http", "https"):
        raise Refused("blocked_scheme", scheme[:32])
    if "@" in parts.netloc or not host or _CONTROL.search(parts.netloc):
        raise Refused("malformed_url", "credentials, no host, or a control character")
    if port is not None and port < 1024 and port not in (80, 443):
        raise Refused("blocked_port", str(port))
    if (address := literal(host)) is not None:
        if not is_public(address):
            raise Refused("blocked_address", address)
        host = f"[{address}]" if ":" in address else address
    else:
        host = _ascii_host(host)
        if (address := literal(host)) is not None:  # spelled in digits beyond ASCII
            raise Refused("malformed_url", f"{address} in disguise")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?") if parts.query else ""
    authority = host if port is None else f"{host}:{port}"
    return f"{scheme}://{authority}{path}{query}", host


@lru_cache(maxsize=65536)
def _ascii_host(host: str) -> str:
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode()
        except idna.IDNAError as error:
            raise Refused("malformed_url", str(error)[:80]) from None
    labels = host.removesuffix(".").split(".")
    if not re.fullmatch(r"[a-z0-9_.-]+", host) or not all(0 < len(part) < 64 for part in labels):
        raise Refused("malformed_url", "not a host name")
    if len(host) > _MAX_HOST:
        raise Refused("malformed_url", f"a host name of {len(host)} characters")
    return host


class Transport:
    """Fetches addresses from any number of threads; all share their connections."""

    def __init__(
        self, settings: DownloadSettings, detour: Detour | None, stopping: Callable[[], bool]
    ) -> None:
        self._settings = settings
        self._detour = detour
        self._stopping = stopping
        self._local = threading.local()
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Semaphore] = {}
        self._open: list[Connection] = []
        self._transfers = Transfers(settings.threads, stopping)

    def fetch(self, url: str) -> Answer:
        """Get one address, following redirects and retrying, within `timeout_s` in all.

        Time spent waiting for a turn at a busy domain does not count.
        """
        end = time.monotonic() + self._settings.timeout_s
        received = requests = 0
        pause = _FIRST_PAUSE_S
        for tries_left in range(self._settings.retries, -1, -1):
            answer, end = self._follow(url, end)
            received += answer.received
            requests += answer.requests
            answer = replace(answer, received=received, requests=requests)
            wait = max(pause, answer.retry_after_s)
            in_time = time.monotonic() + wait < end
            if not tries_left or answer.reason not in _RETRIED or not in_time or self._stopping():
                break
            self._rest(wait)
            pause *= 2
        return answer

    def close(self) -> None:
        """Close every connection. No thread may be fetching."""
        self._transfers.close()
        for connection in self._open:
            connection.curl.close()

    def _follow(self, url: str, end: float) -> tuple[Answer, float]:
        """One try: the answer after all redirects, and the deadline moved by the time queued."""
        received = 0
        target = url
        for requests in range(self._settings.max_redirects + 1):
            try:
                target, host = checked(target)
            except Refused as refused:
                answer = Answer(refused.reason, str(refused), url=target)
                return replace(answer, received=received, requests=requests), end
            queued = time.monotonic()
            with self._turn(host):
                end += time.monotonic() - queued
                answer = self._connection(host).get(target, end)
            received += answer.received
            answer = replace(answer, received=received, requests=requests + 1)
            if not answer.redirect:
                return answer, end
            target = answer.redirect
        detail = f"more than {self._settings.max_redirects}"
        return replace(answer, reason="too_many_redirects", detail=detail), end

    @contextmanager
    def _turn(self, host: str) -> Iterator[None]:
        """Hold one of the connections that the host's registered domain is asked with."""
        domain = registered(host)
        with self._lock:
            if domain not in self._turns:
                self._turns[domain] = threading.Semaphore(self._settings.polite_connections)
            turn = self._turns[domain]
        with turn:
            yield

    def _connection(self, host: str) -> Connection:
        detour = self._detour if self._detour and host.endswith(self._detour.suffix) else None
        name = "detoured" if detour else "public"
        connection: Connection | None = getattr(self._local, name, None)
        if connection is None:
            connection = Connection(self._settings, self._transfers, detour, self._stopping)
            setattr(self._local, name, connection)
            with self._lock:
                self._open.append(connection)
        return connection

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._stopping():
            time.sleep(min(left, 0.2))

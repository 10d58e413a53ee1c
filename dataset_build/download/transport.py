"""One address fetched to its end: checked, redirected, retried, politely, in bounded time."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, urlsplit

import idna

from dataset_build.addresses import is_public, literal
from dataset_build.download import NO_CONTACT, DownloadSettings
from dataset_build.download.connection import Answer, Connection, Detour
from dataset_build.download.opt_out import product_token
from dataset_build.download.robots import MAX_BYTES, MAX_REDIRECTS, Robots
from dataset_build.download.transfers import Transfers
from dataset_build.download.turns import HeldOff, Turns
from dataset_build.extract.urls import without_dots
from dataset_build.lists import Lists
from pipeline.config import ConfigError

_MAX_URL = 8192
_MAX_HOST = 253  # RFC 1035, as text
_FIRST_PAUSE_S = 0.5  # before the first retry; doubles
_RETRIED = frozenset(
    {"connect", "connection_lost", "dns", "timeout", "truncated", "too_many_requests"}
) | {"server_error"}
_FOR_EVER = frozenset({501, 505, 508, 511})  # server errors that another try does not mend
_HELD_BY = frozenset({429, 503})  # whose Retry-After is meant for all that we ask of the domain
_CONTROL = re.compile(r"[\x00-\x20\x7f]")
_DOT = re.compile("%2e", re.IGNORECASE)


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
        raise Refused("malformed_url", str(error)[:80]) from None
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
    # Who asks for "/a/%2e%2e/b" is given "/b", and libcurl asks for it right away.
    path = without_dots(_DOT.sub(".", parts.path or "/"))
    path = quote(path, safe="/%:@!$&'()*+,;=~-._", errors="replace")
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?", errors="replace")
    authority = host if port is None else f"{host}:{port}"
    return f"{scheme}://{authority}{path}{'?' if query else ''}{query}", host


@lru_cache(maxsize=65536)
def _ascii_host(host: str) -> str:
    if len(host) > _MAX_HOST:
        raise Refused("malformed_url", f"a host name of {len(host)} characters")
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
    """Fetches addresses from any number of threads; all share their connections.

    `folder` is where the tasks of a run share whose turn it is and what robots.txt files say; None
    where there is no run. Raises `ConfigError` if servers would not be told whom they deal with.
    """

    def __init__(
        self,
        settings: DownloadSettings,
        detour: Detour | None,
        stopping: Callable[[], bool],
        lists: Lists | None = None,
        folder: Path | None = None,
    ) -> None:
        if detour is None and not settings.contact:
            raise ConfigError(NO_CONTACT)
        self._settings = settings
        self._detour = detour
        self._stopping = stopping
        self._lists = lists or Lists([])
        self._token = product_token(settings.user_agent)
        folder = folder if settings.limits_span == "run" else None
        self._turns = Turns(settings, folder / "turns" if folder else None, stopping)
        robots = folder / "robots" if folder else None
        self._robots = Robots(self._ask_text, self._token, robots, stopping)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: list[Connection] = []
        self._transfers = Transfers(stopping)

    def fetch(self, url: str) -> Answer:
        """Get one address, following redirects and retrying, within `timeout_s` in all.

        Time spent waiting for a turn at a busy domain does not count.
        """
        end = time.monotonic() + self._settings.timeout_s
        received = requests = 0
        pause = _FIRST_PAUSE_S
        for tries_left in range(self._settings.retries, -1, -1):
            answer, end = self._follow(url, end)
            answer = answer.after(received, requests)
            received, requests = answer.received, answer.requests
            # Whoever failed together shall not come back together.
            wait = max(pause * random.uniform(0.5, 1.5), answer.retry_after_s)
            may_pass = answer.reason in _RETRIED and answer.status not in _FOR_EVER
            in_time = time.monotonic() + wait < end
            if not tries_left or not may_pass or not in_time or self._stopping():
                break
            self._rest(wait)
            pause *= 2
        return answer

    def close(self) -> None:
        """Close every connection. No thread may be fetching."""
        self._transfers.close()
        for connection in self._open:
            connection.curl.close()
        self._turns.close()

    def _follow(self, url: str, end: float) -> tuple[Answer, float]:
        """One try: the answer after all redirects, and the deadline moved by the time queued."""
        self._local.asked = Answer("")  # what asking for robots.txt came to on the way
        received = requests = 0
        target = url
        for _ in range(self._settings.max_redirects + 1):
            answer, end = self._step(target, end)
            asked, self._local.asked = self._local.asked, Answer("")
            answer = answer.after(received, requests).after(asked.received, asked.requests)
            received, requests = answer.received, answer.requests
            if not answer.redirect:
                return answer, end
            target = answer.redirect
        detail = f"more than {self._settings.max_redirects}"
        return replace(answer, reason="too_many_redirects", detail=detail), end

    def _step(self, url: str, end: float) -> tuple[Answer, float]:
        """One address without redirects, if neither we nor others have anything against it."""
        try:
            target, host = checked(url)
        except Refused as refused:
            return Answer(refused.reason, str(refused), url=url[:_MAX_URL]), end
        if reason := self._listed(target):
            return Answer(reason, "listed", url=target), end
        delay_s = 0.0
        if self._settings.robots == "respect":
            began, self._local.end, self._local.busy_s = time.monotonic(), end, 0.0
            is_hurried = end - began < self._settings.timeout_s / 2
            rules = self._robots.rules(target, is_hurried)
            end += time.monotonic() - began - self._local.busy_s
            heeds_usage = self._settings.honour_opt_out
            reason, detail = rules.refusal(target, self._token, heeds_usage)
            if reason:
                return Answer(reason, detail, url=target), end
            delay_s = min(rules.delay_s(self._token), self._settings.max_crawl_delay_s)
        answer, queued_s = self._get(target, host, end, delay_s)
        return answer, end + queued_s

    def _listed(self, url: str) -> str:
        return self._lists.reason_of_address(url) if self._lists else ""

    def _ask_text(self, url: str) -> Answer:
        """The text at an address, by the deadline of the address that this thread is fetching."""
        end = self._local.end
        received = requests = 0
        for _ in range(MAX_REDIRECTS + 1):
            try:
                target, host = checked(url)
            except Refused as refused:
                answer = Answer(refused.reason, str(refused), url=url[:_MAX_URL])
                break
            if reason := self._listed(target):
                answer = Answer(reason, "listed", url=target)
                break
            began = time.monotonic()
            answer, queued_s = self._get(target, host, end, text_bytes=MAX_BYTES)
            end += queued_s
            self._local.busy_s += time.monotonic() - began - queued_s
            received += answer.received
            requests += answer.requests
            url = answer.redirect
            if not url:
                break
        else:
            answer = replace(answer, reason="too_many_redirects")
        self._local.asked = replace(self._local.asked, received=received, requests=requests)
        return answer

    def _get(
        self, target: str, host: str, end: float, delay_s: float = 0.0, text_bytes: int = 0
    ) -> tuple[Answer, float]:
        """One request in its turn, over by `end` and the time queued, which comes with it."""
        began = time.monotonic()
        try:
            with self._turns.turn(host, delay_s):
                queued_s = time.monotonic() - began
                if self._stopping():
                    return Answer("stopped", url=target), queued_s
                answer = self._connection(host).get(target, end + queued_s, text_bytes)
        except HeldOff as held:
            return Answer("held_off", str(held), url=target), time.monotonic() - began
        if answer.retry_after_s and answer.status in _HELD_BY:
            self._turns.hold(host, answer.retry_after_s)
        return answer, queued_s

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

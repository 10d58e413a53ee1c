"""What robots.txt files allow one crawler (RFC 9309), asked for once a day whichever task wants it.

Of a file is kept what concerns this crawler, with `Content-Usage` (IETF aipref-attach draft) beside
the rules. The tasks of a run share what they learn in RUN/download/robots/: a host's line lies in
one of 65,536 files, which is locked while the host is asked, so that nobody else asks it too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import protego
import xxhash

from dataset_build.download.connection import Answer
from dataset_build.download.opt_out import usage_refused

MAX_BYTES = 500 << 10
"""As much of a file is read; RFC 9309, §2.5."""
MAX_REDIRECTS = 5
"""RFC 9309, §2.3.1.2."""

_LIFE_S = 86_400.0  # RFC 9309, §2.4
_REFUSED_LIFE_S = 3_600.0  # of a server's answer that it cannot answer now
_FAILED_LIFE_S = 60.0  # of the network's failure, in this process alone
_TRIES = 2  # before a failure is remembered: the first one may have been bad luck
_HELD_BYTES = 8 << 20  # of rules that a process keeps ready; parsed they are some 20 times that
_HOST_BYTES = 200  # that a host without rules counts as
_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
_AGENT = frozenset({"user-agent", "user agent", "useragent"})
_RULES = {
    "allow": "Allow",
    "disallow": "Disallow",
    "disalow": "Disallow",
    "dissallow": "Disallow",
    "crawl-delay": "Crawl-delay",
}
# Reasons that say of the host what they say of its robots.txt: the picture would fare the same.
_NETWORK = frozenset(
    {"dns", "connect", "tls", "timeout", "connection_lost", "bad_response", "blocked_address"}
) | {"held_off", "stopped"}
_OWN = frozenset({"held_off", "stopped"})  # we did not ask it


@dataclass(frozen=True)
class Rules:
    """What a host lets this crawler do; `reason` is set where nobody may ask it anything now."""

    text: str = ""
    """Rules for this crawler alone."""
    usage: str = ""
    """Its usage preferences, in the form of rules: `Disallow` where training is refused."""
    reason: str = ""
    detail: str = ""

    @property
    def size(self) -> int:
        """Characters of it."""
        return len(self.text) + len(self.usage)

    @property
    def life_s(self) -> float:
        """How long it stands."""
        if self.reason in ("", "robots"):
            return _REFUSED_LIFE_S if self.reason else _LIFE_S
        return _FAILED_LIFE_S  # the network's doing

    def refusal(self, url: str, token: str, heeds_usage: bool) -> tuple[str, str]:
        """Reason and detail if `url` must not be asked for, else two empty strings."""
        if self.reason:
            return self.reason, self.detail
        if self.text and not self._parsed.can_fetch(url, token):
            return "robots", "disallowed"
        if heeds_usage and self.usage and not self._preferred.can_fetch(url, token):
            return "opt_out", "robots.txt: Content-Usage"
        return "", ""

    def delay_s(self, token: str) -> float:
        """Seconds that the host wants between requests; 0 if it does not say."""
        return (self._parsed.crawl_delay(token) or 0.0) if self.text else 0.0

    @cached_property
    def _parsed(self) -> protego.Protego:
        return protego.Protego.parse(self.text)

    @cached_property
    def _preferred(self) -> protego.Protego:
        return protego.Protego.parse(self.usage)


@dataclass
class _Host:
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while it is asked."""
    rules: Rules | None = None
    until: float = 0.0
    """Monotonic time up to which the rules stand."""
    failures: int = 0

    @property
    def size(self) -> int:
        """Bytes that it counts as."""
        return _HOST_BYTES + (self.rules.size if self.rules else 0)


class Robots:
    """Rules by scheme, host and port. `ask` gets one address as text, redirects followed."""

    def __init__(
        self,
        ask: Callable[[str], Answer],
        token: str,
        folder: Path | None,
        stopping: Callable[[], bool],
    ) -> None:
        self._ask = ask
        self._token = token
        self._folder = folder
        self._stopping = stopping
        self._lock = threading.Lock()
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._held_bytes = 0
        self._shelves: dict[str, threading.Lock] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def rules(self, url: str, is_hurried: bool = False) -> Rules:
        """What the host of a checked address allows; may ask it, or wait for another who does.

        Who `is_hurried` has less time left than a host is due: its failure then says nothing.
        """
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            if origin not in self._hosts:
                self._hosts[origin] = _Host()
                self._held_bytes += _HOST_BYTES
            host = self._hosts[origin]
            self._hosts.move_to_end(origin)
        with host.lock:
            if host.rules is not None and time.monotonic() < host.until:
                return host.rules
            rules = self._found(origin)
            if rules.life_s == _FAILED_LIFE_S:
                host.failures += not is_hurried and rules.reason not in _OWN
                is_kept = host.failures >= _TRIES
            else:
                host.failures, is_kept = 0, True
            self._remember(origin, host, rules if is_kept else None)
            return rules

    def _remember(self, origin: str, host: _Host, rules: Rules | None) -> None:
        """Keep what was found, and forget those that were asked for least lately if it is much."""
        with self._lock:
            is_held = self._hosts.get(origin) is host
            self._held_bytes -= host.size if is_held else 0
            host.rules = rules
            host.until = time.monotonic() + (rules.life_s if rules else 0.0)
            self._held_bytes += host.size if is_held else 0
            excess, forgotten = self._held_bytes - _HELD_BYTES, []
            for name, other in self._hosts.items():
                if excess <= 0:
                    break
                if not other.lock.locked():
                    excess -= other.size
                    forgotten.append(name)
            for name in forgotten:
                self._held_bytes -= self._hosts.pop(name).size

    def _found(self, origin: str) -> Rules:
        if self._folder is None:
            return self._asked(origin)
        with self._shelf(origin) as shelf:
            known = _read(shelf, origin)
            if known is None:
                known = self._asked(origin)
                if known.life_s != _FAILED_LIFE_S:
                    _add(shelf, origin, known)
            return known

    def _asked(self, origin: str) -> Rules:
        answer = self._ask(f"{origin}/robots.txt")
        if answer.reason == "ok":
            text = answer.body[:MAX_BYTES].decode("utf-8-sig", errors="replace")
            return Rules(*own_rules(text, self._token))
        # As if there were none: 4xx, but not the one that asks for patience, and endless redirects.
        gone = 400 <= answer.status < 500 and answer.status != 429
        if gone or answer.reason == "too_many_redirects":
            return Rules()
        reason = answer.reason if answer.reason in _NETWORK else "robots"
        return Rules(reason=reason, detail=f"robots.txt: {answer.detail or answer.reason}")

    @contextmanager
    def _shelf(self, origin: str) -> Iterator[int]:
        """The open file in which a host's rules are, locked against threads and processes."""
        assert self._folder is not None
        number = f"{xxhash.xxh3_64_intdigest(origin.encode()) & 0xFFFF:04x}"
        with self._lock:
            lock = self._shelves.setdefault(number, threading.Lock())
        folder = self._folder / number[:2]
        with lock:  # to close a file ends all locks that this process has on it
            folder.mkdir(exist_ok=True)
            shelf = os.open(folder / f"{number[2:]}.tsv", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                pause_s = 0.01
                while not self._stopping():
                    try:
                        fcntl.lockf(shelf, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except OSError:
                        time.sleep(pause_s)
                        pause_s = min(2 * pause_s, 0.5)
                yield shelf
            finally:
                os.close(shelf)


def _read(shelf: int, origin: str) -> Rules | None:
    """The last that was written of a host, if it is not too old. A torn line is none."""
    content = os.pread(shelf, os.fstat(shelf).st_size, 0)
    start = content.rfind(f"\n{origin}\t".encode())
    if start < 0:
        return None
    with contextlib.suppress(ValueError, TypeError):
        _, when, kept = content[start + 1 :].partition(b"\n")[0].split(b"\t")
        rules = Rules(*json.loads(kept))
        if 0 <= time.time() - float(when) < rules.life_s:
            return rules
    return None


def _add(shelf: int, origin: str, rules: Rules) -> None:
    kept = json.dumps([rules.text, rules.usage, rules.reason, rules.detail])
    os.lseek(shelf, 0, os.SEEK_END)
    os.write(shelf, f"\n{origin}\t{int(time.time())}\t{kept}\n".encode())


def own_rules(text: str, token: str) -> tuple[str, str]:
    """The group for `token`, or else that for all crawlers: its rules, and its preferences as such.

    A group is for whom its `User-agent` lines name by their product token (RFC 9309, §2.2.1);
    several groups for the same crawler are one.
    """
    groups: dict[str, tuple[list[str], list[str]]] = {}
    agents: set[str] = set()
    begun = False
    for line in text.splitlines():
        name, colon, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        name = name.lower()
        if colon and name in _AGENT:
            if begun:
                agents, begun = set(), False
            named = _TOKEN.match(value)
            agents.add("*" if value.startswith("*") else named[0].lower() if named else "")
            for agent in agents & {token.lower(), "*"}:
                groups.setdefault(agent, ([], []))
        elif colon and (name in _RULES or name == "content-usage"):
            begun = True
            for agent in agents & groups.keys():
                rules, usage = groups[agent]
                if name in _RULES:
                    rules.append(f"{_RULES[name]}: {value}")
                elif rule := _usage_rule(value):
                    usage.append(rule)
    rules, usage = groups.get(token.lower()) or groups.get("*") or ([], [])
    return _group(token, rules), _group(token, usage)


def _usage_rule(value: str) -> str:
    """`Disallow: /art` for `/art train-ai=n`; "" of what says nothing about training."""
    path, _, preferences = value.partition(" ") if value[:1] == "/" else ("/", "", value)
    if "train-ai" not in preferences.lower():
        return ""
    return f"{'Disallow' if usage_refused(preferences) else 'Allow'}: {path}"


def _group(token: str, lines: list[str]) -> str:
    return "\n".join([f"User-agent: {token}", *lines]) if lines else ""

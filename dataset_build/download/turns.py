"""Whose turn it is to ask a domain: connections, rate and Retry-After, held over all of a run.

The tasks of a run, on one machine or many, share one sparse file, RUN/download/turns. A connection
is a byte-range lock in it (`fcntl.lockf`: kept by the kernel or the file server, gone with its
process however that ends, good over NFSv4 and Lustre mounted with `flock`). When a domain may be
asked next stands in a record of two times, read and written under a lock. A domain is its hash:
two of a million share a record now and then, and are asked more slowly for it, never faster.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from dataset_build.domains import registered
from dataset_build.download import DownloadSettings
from pipeline.config import ConfigError

_RECORD = struct.Struct("<dd")  # Unix times: when the next request may begin; held off until
_RECORDS = 1 << 22
FILE_BYTES = _RECORDS * _RECORD.size
"""The longest that the file, which is sparse, may seem: 64 MiB."""
_LOCKS = 1 << 40  # where connections are locked: beyond the records, there are no bytes there
_MOST_CONNECTIONS = 1024
_LONGEST_HOLD_S = 86_400.0
_FIRST_POLL_S, _LONGEST_POLL_S = 0.005, 0.25
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


class HeldOff(Exception):
    """The domain asked to be left alone for longer than it is waited for."""


@dataclass
class _Domain:
    """What one process knows of a domain."""

    number: int
    connections: int
    interval_s: float
    """Least time from the beginning of a request to that of the next."""
    patience_s: float
    """How long, in all, this process still waits out what the domain asks for."""
    free: list[int] = field(default_factory=list)
    """Numbers of its connections that no thread of this process holds."""
    room: threading.Semaphore = field(default_factory=threading.Semaphore)
    paid_until: float = 0.0
    """Unix time up to which waiting has been taken off the patience."""


class Turns:
    """Gives turns at domains to the threads of one process, in line with all other processes.

    With `path` None the limits are held within this process alone. A process must not open the
    same path twice: closing one would drop the locks of both.
    """

    def __init__(
        self, settings: DownloadSettings, path: Path | None, stopping: Callable[[], bool]
    ) -> None:
        self._settings = settings
        self._stopping = stopping
        self._lock = threading.Lock()
        self._domains: dict[str, _Domain] = {}
        self._alone: dict[int, bytes] = {}
        self._path = path
        self._file = -1
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._locked(_LOCKS - 1, wait=True)  # now, rather than after an hour of waiting
            self._unlock(_LOCKS - 1)

    def close(self) -> None:
        """Give everything back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @contextmanager
    def turn(self, host: str, delay_s: float = 0.0) -> Iterator[None]:
        """Hold one of the domain's connections, from a moment on at which it may be asked.

        `delay_s` is what the host itself wants between two requests. Returns early, with nothing
        awaited, after a stop was asked for. Raises `HeldOff`.
        """
        domain = self._domain(host)
        domain.interval_s = max(domain.interval_s, delay_s)
        with domain.room:
            connection = self._connect(domain)
            try:
                self._await(domain)
                yield
            finally:
                self._disconnect(domain, connection)

    def hold(self, host: str, seconds: float) -> None:
        """Let nobody ask the host's domain for some time; an earlier, longer wish stands."""
        domain = self._domain(host)
        until = time.time() + min(seconds, _LONGEST_HOLD_S)
        with self._record(domain) as (begin, held):
            self._write(domain, begin, max(held, until))

    def _domain(self, host: str) -> _Domain:
        name = registered(host)
        with self._lock:
            if name not in self._domains:
                limits = self._settings.limits_of(name)
                number = xxhash.xxh3_64_intdigest(name.encode()) % _RECORDS
                self._domains[name] = _Domain(
                    number,
                    limits.connections,
                    1 / limits.requests_per_s if limits.requests_per_s else 0.0,
                    self._settings.max_wait_s,
                    list(range(limits.connections)),
                    threading.Semaphore(limits.connections),
                )
            return self._domains[name]

    def _connect(self, domain: _Domain) -> int:
        """Lock one of the domain's connections, as soon as no other process has them all."""
        pause_s = _FIRST_POLL_S
        while True:
            with self._lock:
                random.shuffle(domain.free)
                for connection in domain.free:
                    if self._locked(self._place(domain, connection), wait=False):
                        domain.free.remove(connection)
                        return connection
            if self._stopping():
                return -1
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)

    def _disconnect(self, domain: _Domain, connection: int) -> None:
        if connection >= 0:
            with self._lock:
                self._unlock(self._place(domain, connection))
                domain.free.append(connection)

    def _await(self, domain: _Domain) -> None:
        """Sleep until the domain may be asked; what comes after this request waits for its turn."""
        while not self._stopping():
            now = time.time()
            with self._record(domain) as (begin, held):
                wait_s = max(begin, held) - now
                if wait_s <= 0:
                    if domain.interval_s:
                        self._write(domain, now + domain.interval_s, held)
                    return
                if held > now:
                    self._be_patient(domain, now, held)
            time.sleep(min(wait_s, 0.2))

    def _be_patient(self, domain: _Domain, now: float, held: float) -> None:
        """Account for a hold, once for all threads. Raises `HeldOff` if it lasts too long."""
        if held > domain.paid_until:
            more_s = held - max(now, domain.paid_until)
            if more_s > domain.patience_s:
                raise HeldOff(f"for another {held - now:.0f} s")
            domain.patience_s -= more_s
            domain.paid_until = held

    @contextmanager
    def _record(self, domain: _Domain) -> Iterator[tuple[float, float]]:
        """A domain's two times, while no other thread or process reads or writes them."""
        place = domain.number * _RECORD.size
        with self._lock:
            if self._file < 0:
                content = self._alone.get(place, b"")
            else:
                self._locked(place, wait=True)
                content = os.pread(self._file, _RECORD.size, place)
            try:
                begin, held = _RECORD.unpack(content.ljust(_RECORD.size, b"\0"))
                # A clock may have been set back: nobody asks for more than a day.
                latest = time.time() + _LONGEST_HOLD_S
                yield (begin if begin < latest else 0.0, held if held <= latest else 0.0)
            finally:
                self._unlock(place)

    def _write(self, domain: _Domain, begin: float, held: float) -> None:
        place, content = domain.number * _RECORD.size, _RECORD.pack(begin, held)
        if self._file < 0:
            self._alone[place] = content
        else:
            os.pwrite(self._file, content, place)

    def _place(self, domain: _Domain, connection: int) -> int:
        return _LOCKS + domain.number * _MOST_CONNECTIONS + connection

    def _locked(self, place: int, wait: bool) -> bool:
        """Lock one byte of the file; False if another process has it and `wait` is False."""
        if self._file < 0:
            return True
        command = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.lockf(self._file, command, 1, place)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN) and not wait:
                return False
            if error.errno in _NO_LOCKS:
                raise ConfigError(
                    f"{self._path}: this file system has no locks ({error.strerror}), so the tasks"
                    " of a run cannot share a domain's limits. Mount it with them (Lustre: -o"
                    " flock), or set download.limits_span=task and divide the limits by the tasks"
                    " that run at a time"
                ) from None
            raise
        return True

    def _unlock(self, place: int) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)

"""Whose turn it is to ask a domain: connections, rate and Retry-After, held over all of a run.

The tasks of a run, on one machine or many, share one sparse file, RUN/download/turns. A connection
is a byte-range lock in it (`fcntl.lockf`: kept by the kernel or the file server, gone with its
process however that ends, good over NFSv4 and Lustre mounted with `flock`). When a domain may be
asked next stands in a record, read and written under a lock. Connections and rate are the
registered domain's; what a host asks for, by Retry-After or Crawl-delay, holds for its tenant
alone: no blog silences all blogs.
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
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from dataset_build.domains import registered, tenant
from dataset_build.download import DownloadSettings
from pipeline.config import ConfigError

_WAYS = 8
_RECORD = struct.Struct("<Qdd")  # a name's hash, and its two times
_BUCKET = struct.Struct("<" + "Qdd" * _WAYS)
_BUCKETS = 1 << 19
FILE_BYTES = _BUCKETS * _BUCKET.size
"""The longest that the file, which is sparse, may seem: 96 MiB."""
_LOCKS = 1 << 40  # where connections are locked: beyond the records, there are no bytes there
_NAMES = 1 << 42
_MOST_CONNECTIONS = 1024
_LONGEST_HOLD_S = 86_400.0
_FIRST_POLL_S, _LONGEST_POLL_S = 0.005, 0.25
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


class HeldOff(Exception):
    """The domain asked to be left alone for longer than it is waited for."""


@dataclass
class _Record:
    """What the file says of a name, by its hash; Unix times."""

    key: int
    begin: float
    """When the next request may begin."""
    held: float
    """Nobody may ask before."""


@dataclass
class _Tenant:
    """What one process knows of those who can speak for a host."""

    key: int
    patience_s: float
    """How long, in all, this process still waits out what they ask for."""
    paid_until: float = 0.0
    """Unix time up to which waiting has been taken off the patience."""
    delay_s: float = 0.0
    """Least time between requests, of a robots.txt."""


@dataclass
class _Domain:
    """What one process knows of a registered domain."""

    key: int
    connections: int
    interval_s: float
    """Least time from the beginning of a request to that of the next."""
    free: list[int] = field(default_factory=list)
    """Numbers of its connections that no thread of this process holds."""
    room: threading.Semaphore = field(default_factory=threading.Semaphore)


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
        self._tenants: dict[str, _Tenant] = {}
        self._alone = defaultdict[int, bytearray](lambda: bytearray(_BUCKET.size))
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
        domain, tenant = self._domain(host), self._tenant(host)
        tenant.delay_s = max(tenant.delay_s, delay_s)
        with domain.room:
            connection = self._connect(domain)
            try:
                self._await(domain, tenant)
                yield
            finally:
                self._disconnect(domain, connection)

    def hold(self, host: str, seconds: float) -> None:
        """Let nobody ask the host's tenant for some time; an earlier, longer wish stands."""
        until = time.time() + min(seconds, _LONGEST_HOLD_S)
        with self._records(self._tenant(host).key) as (record,):
            record.held = max(record.held, until)

    def _domain(self, host: str) -> _Domain:
        name = registered(host)
        with self._lock:
            if name not in self._domains:
                limits = self._settings.limits_of(name)
                self._domains[name] = _Domain(
                    xxhash.xxh3_64_intdigest(name.encode()),
                    limits.connections,
                    1 / limits.requests_per_s if limits.requests_per_s else 0.0,
                    list(range(limits.connections)),
                    threading.Semaphore(limits.connections),
                )
            return self._domains[name]

    def _tenant(self, host: str) -> _Tenant:
        name = tenant(host)
        with self._lock:
            if name not in self._tenants:
                key = xxhash.xxh3_64_intdigest(name.encode())
                self._tenants[name] = _Tenant(key, self._settings.max_wait_s)
            return self._tenants[name]

    def _connect(self, domain: _Domain) -> int:
        """Lock one of the domain's connections, as soon as no other process has them all."""
        pause_s = _FIRST_POLL_S
        while True:
            with self._lock:
                first = int(random.random() * len(domain.free))  # others may try the same
                for connection in domain.free[first:] + domain.free[:first]:
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

    def _await(self, domain: _Domain, tenant: _Tenant) -> None:
        """Sleep until both may be asked; what comes after this request waits for its turn."""
        keys = tuple(dict.fromkeys((domain.key, tenant.key)))  # often they are the same
        while not self._stopping():
            with self._records(*keys) as records:
                now = time.time()  # not before: others may have had the lock for long
                common, own = records[0], records[-1]
                wait_s = max(common.begin, own.begin, own.held) - now
                if wait_s <= 0:
                    if domain.interval_s:
                        common.begin = now + domain.interval_s
                    if tenant.delay_s:
                        own.begin = max(own.begin, now + tenant.delay_s)
                    return
                if own.held > now:
                    self._be_patient(tenant, now, own.held)
            time.sleep(min(wait_s, 0.2))

    def _be_patient(self, tenant: _Tenant, now: float, held: float) -> None:
        """Account for a hold, once for all threads. Raises `HeldOff` if it lasts too long."""
        if held > tenant.paid_until:
            more_s = held - max(now, tenant.paid_until)
            if more_s > tenant.patience_s:
                raise HeldOff(f"for another {held - now:.0f} s")
            tenant.patience_s -= more_s
            tenant.paid_until = held

    @contextmanager
    def _records(self, *keys: int) -> Iterator[list[_Record]]:
        """Names' records, while no other thread or process reads or writes them; what is changed
        is kept."""
        buckets = sorted({_bucket(key) for key in keys})  # so nobody waits crosswise
        with self._lock:
            try:
                for bucket in buckets:
                    self._locked(bucket, wait=True)
                found = [self._record(key) for key in keys]
                before = [(record.begin, record.held) for record in found]
                yield found
                for record, times in zip(found, before, strict=True):
                    if times != (record.begin, record.held):
                        self._write(record, keys)
            finally:
                for bucket in buckets:
                    self._unlock(bucket)

    def _record(self, key: int) -> _Record:
        """What stands of a name."""
        fields = self._fields(key)
        known = fields[::3]
        if key not in known:
            return _Record(key, 0.0, 0.0)
        at = 3 * known.index(key)
        return _Record(key, *map(_plausible, fields[at + 1 : at + 3]))

    def _write(self, record: _Record, keys: Collection[int]) -> None:
        """Put down a record: if the name has none, in the place of that which is over, or will be
        soonest, but for those of `keys`."""
        fields = self._fields(record.key)
        known = fields[::3]
        if record.key in known:
            way = known.index(record.key)
        else:
            ends = [max(map(_plausible, fields[n + 1 : n + 3])) for n in range(0, len(fields), 3)]
            ways = (way for way in range(_WAYS) if known[way] not in keys)
            way = min(ways, key=ends.__getitem__)
        content = _RECORD.pack(record.key, record.begin, record.held)
        place = way * _RECORD.size
        if self._file < 0:
            self._alone[_bucket(record.key)][place : place + len(content)] = content
        else:
            os.pwrite(self._file, content, _bucket(record.key) + place)

    def _fields(self, key: int) -> tuple[float, ...]:
        """The bucket of a name: key, begin and held of every record in it."""
        if self._file < 0:
            return _BUCKET.unpack(self._alone[_bucket(key)])
        content = os.pread(self._file, _BUCKET.size, _bucket(key))
        return _BUCKET.unpack(content.ljust(_BUCKET.size, b"\0"))

    def _place(self, domain: _Domain, connection: int) -> int:
        return _LOCKS + domain.key % _NAMES * _MOST_CONNECTIONS + connection

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


def _plausible(when: float) -> float:
    """A clock may have been set back: nobody asks for more than a day."""
    return when if when <= time.time() + _LONGEST_HOLD_S else 0.0


def _bucket(key: int) -> int:
    """Where the bucket of a name stands in the file."""
    return key % _BUCKETS * _BUCKET.size

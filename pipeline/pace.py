"""How often a host is asked, held over all processes of a run, on one machine or many.

A file for each host holds the Unix time at which the next request may begin. Who wants to ask takes
that moment under the file's lock, puts the next one an interval later, and waits for its own: one
lock a request, however many wait. `fcntl.lockf` is kept by the kernel or the file server, goes with
its process however that ends, and is good over NFSv4 and Lustre mounted with `flock`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from pipeline.config import ConfigError

_BEGIN = struct.Struct("<d")
_LONGEST_S = 86_400.0  # what lies further ahead is of a clock that was set back since
_LOOK_S = 0.2
_LONGEST_NAME = 200  # file systems have 255; hosts that begin alike for so long share a pace
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_one_at_a_time = threading.Lock()  # closing a file drops all locks that its process has on it


class Pace:
    """At most `per_s` requests a second to each host, by all who keep the same `folder`.

    Moments are 1/`per_s` seconds apart, by the clocks of the machines; a request begins at its own
    or, where the system is slow to wake it, a little later. None: no limit, and no folder.
    `setting` is what an error names.
    """

    def __init__(self, folder: Path, per_s: float | None, setting: str) -> None:
        self._folder = folder
        self._interval_s = 1 / per_s if per_s else 0.0
        self._setting = setting

    def wait(self, host: str, stopping: Callable[[], bool]) -> None:
        """Return when the host may be asked, or at once after a stop was asked for, or if it is no
        host: '' of an address that has none."""
        if self._interval_s and host:
            pause(self._take(host, self._interval_s) - time.time(), stopping)

    def hold(self, host: str, seconds: float) -> None:
        """Let nobody who has no moment yet ask the host for so long, as it has asked for."""
        if self._interval_s and host:
            self._take(host, 0.0, time.time() + min(seconds, _LONGEST_S))

    def _take(self, host: str, interval_s: float, earliest: float = 0.0) -> float:
        """The next moment, not before now and `earliest`; the one after it is put down."""
        path = self._folder / f"{quote(host, safe='')[:_LONGEST_NAME]}.host"  # also of `..`
        with _one_at_a_time:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock(file, path)
                known = os.pread(file, _BEGIN.size, 0).ljust(_BEGIN.size, b"\0")
                begin: float = _BEGIN.unpack(known)[0]
                now = time.time()  # not before: others may have had the lock for long
                if not begin <= now + _LONGEST_S:
                    begin = now
                begin = max(begin, now, earliest)
                os.pwrite(file, _BEGIN.pack(begin + interval_s), 0)
                return begin
            finally:
                os.close(file)

    def _lock(self, file: int, path: Path) -> None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise ConfigError(
                f"{path}: this file system has no locks ({error.strerror}), so the tasks of a run"
                " cannot share a limit. Mount it with them (Lustre: -o flock), or set"
                f" {self._setting}=null and run fewer tasks at a time"
            ) from None


def pause(seconds: float, stopping: Callable[[], bool]) -> None:
    """Sleep, but not on after a stop was asked for."""
    end = time.monotonic() + seconds
    while (left_s := end - time.monotonic()) > 0 and not stopping():
        time.sleep(min(left_s, _LOOK_S))

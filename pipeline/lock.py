"""One process at a time: a lock file that a live holder keeps beating and a dead one loses.

The file names machine and process. On the same machine the kernel tells whether that process
lives; from elsewhere, a beat that does not change for `stale_s` counts as dead. No clocks are
compared and no file times are trusted, so it works on any disk that nodes share.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.config import UserError

log = logging.getLogger(__name__)

_POLL_S = 0.1


class RunInUse(UserError):
    """Another trainer holds the run folder; trying again would find it there again."""

    exit_code = 9


class RunLock:
    """Holds `path` from construction to `release`.

    Raises `RunInUse` once the present holder has shown that it lives, which takes its `beat_s` at
    most and `stale_s` if it does not. `job` names the processes that train together, one of which
    holds the lock for all; `doing` is what others are told of the holder.
    """

    def __init__(
        self,
        path: Path,
        *,
        beat_s: float = 5.0,
        stale_s: float = 60.0,
        job: str = "",
        doing: str = "is training",
    ) -> None:
        self._path = path
        self._beat_s = beat_s
        self._stale_s = stale_s
        self._me = {
            "token": secrets.token_hex(8),
            **this_process(),
            "job": job,
            "doing": doing,
            "since": time.time(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self._acquire()
        # Beats go through a descriptor: should another process have replaced the file, because
        # this process was suspended for long, they reach the old file only.
        self._descriptor = os.open(path, os.O_WRONLY)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `RunInUse` if another trainer has taken the run over."""
        holder = _read(self._path)
        if holder is None or holder["token"] != self._me["token"]:
            taken = "was removed" if holder is None else f"now belongs to {_name(holder)}"
            raise RunInUse(
                f"{self._path}: the lock of this training {taken}, after this process did not run "
                "for a while; it writes no more checkpoints"
            )

    def release(self) -> None:
        """Let the next trainer in."""
        self._ended.set()
        self._thread.join()
        os.close(self._descriptor)
        holder = _read(self._path)
        if holder is not None and holder["token"] == self._me["token"]:
            self._path.unlink(missing_ok=True)

    def _acquire(self) -> None:
        sight = _Sight(self._path, self._stale_s)
        while not self._created():
            if (dead := sight.look()) is not None:
                self._take_from(dead)
            elif sight.holder is None and sight.silent_s > self._stale_s:
                self._path.unlink(missing_ok=True)  # of no use to anyone
            time.sleep(_POLL_S if sight.is_near else self._beat_s / 5)

    def _created(self) -> bool:
        try:
            if self._path.exists() or not files.publish_once(self._path, _payload(self._me, 0)):
                return False
        except FileNotFoundError:  # the new holder has just cleaned up
            return False
        for leftover in self._path.parent.glob(f".{self._path.name}.*"):
            if (found := _read(leftover)) is None or found["token"] != self._me["token"]:
                leftover.unlink(missing_ok=True)
        return True

    def _take_from(self, holder: dict[str, Any]) -> None:
        """Remove a dead holder's lock; of those who try at the same time, one gets it."""
        taken = self._path.with_name(f".{self._path.name}.{files.attempt_name()}")
        try:
            self._path.rename(taken)
        except FileNotFoundError:
            return
        found = _read(taken)
        if found is not None and found["token"] != holder["token"]:
            os.link(taken, self._path)  # of one that was quicker
        else:
            log.warning("%s did not end properly; its lock is taken over", _name(holder))
        taken.unlink(missing_ok=True)

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(self._beat_s):
            beat += 1
            try:
                os.pwrite(self._descriptor, _payload(self._me, beat), 0)
            except OSError as error:
                log.warning("%s: the lock cannot be renewed (%s)", self._path, error.strerror)


def refuse_others(path: Path, job: str, *, stale_s: float = 60.0) -> None:
    """Raise `RunInUse` if a living trainer holds `path` that is not of this `job`."""
    sight = _Sight(path, stale_s)
    while (holder := _read(path)) is not None and holder.get("job") != job:
        if sight.look() is not None:
            return
        time.sleep(_POLL_S)


def this_process() -> dict[str, Any]:
    """What tells this process from all others, wherever they run."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "machine": _machine(),
        "started": _started(pid),
    }


def lives(process: Mapping[str, Any]) -> bool | None:
    """Whether a process lives that said so of itself; None if only another machine can tell."""
    return _started(process["pid"]) == process["started"] if _is_here(process) else None


class _Sight:
    """What is seen of a lock's holder by who looks at it again and again."""

    def __init__(self, path: Path, stale_s: float) -> None:
        self.holder: dict[str, Any] | None = None
        """As first seen; None if there is none who can be read."""
        self._path = path
        self._stale_s = stale_s
        self._since = time.monotonic()

    @property
    def silent_s(self) -> float:
        """For how long nothing has changed."""
        return time.monotonic() - self._since

    @property
    def is_near(self) -> bool:
        """Whether there is no holder on another machine, whose beats come through a shared disk."""
        return self.holder is None or _is_here(self.holder)

    def look(self) -> dict[str, Any] | None:
        """The holder if it is dead, else None. Raises `RunInUse` if it is seen to live."""
        found = _read(self._path)
        if found is None:
            if self.holder is not None:
                self.holder, self._since = None, time.monotonic()
            return None
        if self.holder is None or found["token"] != self.holder["token"]:
            self.holder, self._since = found, time.monotonic()
            if not self.is_near:
                log.info("%s: %s held it; watching for up to %.0f s whether it lives",
                         self._path, _name(found), self._stale_s)  # fmt: skip
        silent = self.silent_s > self._stale_s
        if lives(found) is False:
            return found
        if found["beat"] != self.holder["beat"] or (silent and self.is_near):
            raise RunInUse(  # if it is silent, it lives but does not run
                f"{self._path}: {_name(found)} {found.get('doing', 'is training')} in this run"
                " folder; wait for it, stop"
                " it, or choose another folder with RUN=... (--run)"
            )
        return found if silent else None


def _payload(me: dict[str, Any], beat: int) -> bytes:
    # Of constant length, so that a beat overwrites the one before it exactly.
    return json.dumps({**me, "beat": f"{beat:012d}"}).encode()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = json.loads(path.read_bytes())
        return (
            holder
            if {"token", "host", "pid", "machine", "started", "beat"} <= set(holder)
            else None
        )
    except (OSError, ValueError, TypeError):
        return None


def _name(holder: dict[str, Any]) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("since", 0)))
    since = f" (since {began})" if "since" in holder else ""
    return f"process {holder['pid']} on {holder['host']}{since}"


def _is_here(holder: Mapping[str, Any]) -> bool:
    return bool(holder["machine"] == _machine())


def _machine() -> str:
    """Equal for two processes iff they see each other's process ids, and until the next boot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot; None if it is gone. Tells reused ids apart."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # fields 3 and 22 of proc_pid_stat(5)

"""The second wall: what a process may do while it handles bytes from the web.

The first wall is `connection.py`: libcurl connects in C, out of Python's sight, and asks there
before each socket. This one sees what Python does, whichever library does it: audit events
(PEP 578) for sockets, other schemes, programs and files. Native code that was taken over passes
both; for it there are limits on memory, files and time, and no secrets in the environment. All of
it ends with the context, so a process that goes on is as before; only the hook stays, asleep.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dataset_build.addresses import is_public
from dataset_build.download import DownloadSettings
from dataset_build.download.transfers import KEPT
from dataset_build.download.turns import FILE_BYTES
from pipeline.config import ConfigError

log = logging.getLogger(__name__)

# What a fetch needs none of, so nothing read from the web may set it off.
_FORBIDDEN = frozenset(
    {
        *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"),
        *("os.fork", "os.forkpty", "pickle.find_class", "webbrowser.open"),
        *("ftplib.connect", "imaplib.open", "nntplib.connect", "poplib.connect", "smtplib.connect"),
        *("telnetlib.Telnet.open", "socket.bind"),
    }
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_SECRETS = re.compile(
    r"AWS_|AZURE_|GOOGLE_|GCP_|HF_|HUGGING|WANDB_|SSH_|KRB5|SLURM_JWT"
    r"|.*(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|_PROXY$)",
    re.IGNORECASE,
)
_DECODER_BYTES = 2 << 30  # the costliest picture of `max_pixels` takes a quarter of it
_STACK_BYTES = 8 << 20
_OTHER_FILES = 128  # logs, tables, tars of earlier attempts
_NOTED = 20  # refusals written out; more are counted


class Forbidden(PermissionError):
    """Something was tried that a process which handles bytes from the web may not do."""


@dataclass
class Watch:
    """What the guard allows at the moment, and what it has refused."""

    folder: str
    """Below it files may be written, and nowhere else; resolved, with a slash at its end."""
    refused: list[str] = field(default_factory=list)


_watch: Watch | None = None
_is_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    watch = _watch
    if watch is None or not (event in _FORBIDDEN or event in _RULES):
        return
    rule = _RULES.get(event)
    if (reason := rule(watch, *arguments) if rule else event) is not None:
        watch.refused.append(reason)
        raise Forbidden(f"not while pictures are fetched: {reason}")


def _connects(watch: Watch, own: object, address: Any) -> str | None:
    """A name is refused as well: what it stands for could change before it is used."""
    host = address[0] if isinstance(address, tuple) and address else None
    if isinstance(host, str) and is_public(host):
        return None
    return f"a socket to {address!r:.100}"


def _sends(watch: Watch, own: object, address: Any) -> str | None:
    return None if address is None else _connects(watch, own, address)


def _asks(watch: Watch, url: Any, *rest: object) -> str | None:
    scheme = urlsplit(str(url)).scheme.lower()
    return None if scheme in ("http", "https") else f"urllib with {str(url)[:100]!r}"


def _opens(watch: Watch, path: Any, mode: object, flags: int) -> str | None:
    if isinstance(path, int) or not flags & _WRITING:
        return None
    return _writes(watch, path)


def _writes(watch: Watch, *paths: Any) -> str | None:
    """Of something that changes what is at some paths; an open file may be changed."""
    for path in paths:
        if isinstance(path, int):
            continue
        place = os.path.realpath(os.fsdecode(path))
        if place != os.devnull and not place.startswith(watch.folder):
            return f"writing {place}"
    return None


def _first(watch: Watch, path: Any, *rest: object) -> str | None:
    return _writes(watch, path)


def _both(watch: Watch, source: Any, target: Any, *rest: object) -> str | None:
    return _writes(watch, source, target)


_RULES: dict[str, Callable[..., str | None]] = {
    "socket.connect": _connects,
    "socket.sendto": _sends,
    "socket.sendmsg": _sends,
    "urllib.Request": _asks,
    "open": _opens,
    **{f"os.{name}": _first for name in ("remove", "rmdir", "mkdir", "truncate", "chmod", "chown")},
    **{f"os.{name}": _both for name in ("rename", "link", "symlink")},
}


@contextmanager
def confined(settings: DownloadSettings, folder: Path, addresses: int) -> Iterator[Watch]:
    """All of the guard, for a task that fetches so many addresses and writes below `folder`."""
    threads = min(settings.threads, addresses)
    # img2dataset lets two files a thread wait for the resizer; another is on its way, and is
    # copied once when it is whole.
    memory_bytes = _DECODER_BYTES + threads * (_STACK_BYTES + 4 * settings.max_bytes)
    side = settings.image_size
    stored_pixels = max(settings.max_pixels, int(side * side * settings.max_aspect_ratio))
    file_bytes = FILE_BYTES + addresses * 4 * stored_pixels
    files = 2 * threads + KEPT + _OTHER_FILES  # a host with IPv4 and IPv6 may be tried by both
    with (
        without_secrets(),
        limited(memory_bytes, file_bytes),
        open_files(files),
        watching(folder) as watch,
    ):
        yield watch


@contextmanager
def watching(folder: Path) -> Iterator[Watch]:
    """Refuse, in every thread: sockets to what is not public, schemes but http(s), programs,
    pickles, and files written outside `folder`.

    What is refused raises `Forbidden` where it was tried, and is logged at the end.
    """
    global _watch, _is_installed
    assert _watch is None, "a process works on one task at a time"
    if not _is_installed:  # there is no way to take a hook out again
        sys.addaudithook(_hook)
        _is_installed = True
    watch = Watch(f"{folder.resolve()}/")
    caches, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    _watch = watch
    try:
        yield watch
    finally:
        _watch = None
        sys.dont_write_bytecode = caches
        for reason in watch.refused[:_NOTED]:
            log.warning("refused: %s", reason)
        if len(watch.refused) > _NOTED:
            log.warning("refused: %d more", len(watch.refused) - _NOTED)


@contextmanager
def limited(memory_bytes: int, file_bytes: int) -> Iterator[None]:
    """Limit the memory that this process may take on top of what it holds, bytes, and the size of
    any file it writes; no core dumps.

    Too much memory fails where it is asked for: a decoder gives its picture up. Only writable
    memory counts (RLIMIT_DATA): threads reserve far more address space than they use.
    """
    limits = {
        resource.RLIMIT_DATA: _writable_bytes() + memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
    }
    before = {kind: resource.getrlimit(kind) for kind in limits}
    for kind, limit in limits.items():
        resource.setrlimit(kind, (_least(limit, *before[kind]), before[kind][1]))
    try:
        yield
    finally:
        for kind, pair in before.items():
            resource.setrlimit(kind, pair)


@contextmanager
def open_files(count: int) -> Iterator[None]:
    """Let this process have so many files open, at least. Raises `ConfigError` if it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and count > hard:
        raise ConfigError(
            f"download.threads needs up to {count} open files, and a process here may have {hard}"
            " (ulimit -Hn): let it have more, or set download.threads lower"
        )
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def cpu_limited(seconds: int) -> Iterator[None]:
    """Kill this process (SIGXCPU) if it uses more than so many seconds from now, of all threads."""
    before = resource.getrlimit(resource.RLIMIT_CPU)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (_least(limit, *before), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, before)


@contextmanager
def without_secrets() -> Iterator[None]:
    """Take secrets out of this process's environment, also out of what `/proc` shows of it."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    hidden = {name: value for name, value in os.environ.items() if _SECRETS.match(name)}
    for name in hidden:
        if place := libc.getenv(os.fsencode(name)):
            ctypes.memset(place, 0, len(os.fsencode(hidden[name])))
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _writable_bytes() -> int:
    """Private writable memory of this process: what RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmData:\s+(\d+) kB", status)
    assert found, "Linux says in /proc/self/status what a process holds"
    return int(found[1]) << 10


def _least(*limits: int) -> int:
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=limits[0])

"""Shards wherever they are: files, or addresses such as s3://bucket/00000.tar through fsspec.

A read is of a range of bytes, is tried again when it fails, and ends within a set time.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from braceexpand import braceexpand

from pipeline.config import ConfigError, MissingInput
from train.data.index import DatasetError

log = logging.getLogger(__name__)

_PAUSE_S = 0.5
"""Before the second try; twice as long before each further one."""
_TRIES_IN_TIME = 3
"""One try may take this part of the whole time, so that one that hangs leaves time for others."""
_PROTOCOLS = (
    *(
        "s3",
        "s3a",
        "gs",
        "gcs",
        "az",
        "abfs",
        "abfss",
        "adl",
        "oss",
        "oci",
        "hf",
        "hdfs",
        "webhdfs",
    ),
    *("http", "https", "sftp", "ssh", "file", "memory"),
)
"""Of fsspec's those that fetch bytes and no more: others run commands, unpack archives, or read
where a file of references tells them to."""
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
"""Errors that another try does not mend."""

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A file of a dataset, as a listing shows it."""

    address: str
    bytes: int
    stamp: str
    """When it was written, or its tag: a hint that the content changed where the size did not."""


def is_remote(address: str) -> bool:
    """Whether it is fsspec's to read."""
    return "://" in address


def read(address: str, offset: int, size: int, *, timeout_s: float) -> memoryview:
    """`size` bytes from `offset`. Raises `DatasetError` naming both once `timeout_s` is over."""
    once = _read_remote if is_remote(address) else _read_file
    wanted = f"{address}: bytes {offset} to {offset + size - 1}"
    return _persistently(lambda: once(address, offset, size), wanted, timeout_s)


def fetch(address: str, *, timeout_s: float) -> bytes:
    """All of a small file."""
    return _persistently(lambda: _whole(address), address, timeout_s)


def stamp(address: str, *, timeout_s: float) -> str:
    """What changes when a file is replaced; empty if there is none."""
    once = _stamp_remote if is_remote(address) else _stamp_file
    return str(_persistently(lambda: once(address), address, timeout_s))


def opened(address: str) -> BinaryIO:
    """A file to read from. Raises `DatasetError` if it is not there."""
    try:
        if not is_remote(address):
            return Path(address).open("rb")
        filesystem, path = _remote(address)
        stream: BinaryIO = filesystem.open(path, "rb")
        return stream
    except OSError as error:
        raise DatasetError(f"{address}: cannot be read ({error})") from None


def exists(address: str, *, timeout_s: float) -> bool:
    """Whether there is such a file."""
    if not is_remote(address):
        return Path(address).is_file()
    return bool(_persistently(lambda: _remote(address)[0].exists(address), address, timeout_s))


def find(pattern: str, *, timeout_s: float) -> list[Shard]:
    """The tars that a folder, a glob, braces or a single name stand for, sorted by address.

    Braces are numbers or words: {00000..00199}, {a,b}. Raises `MissingInput` if there are none or
    one named in full is not there.
    """
    try:
        each = list(braceexpand(pattern))
    except ValueError:
        raise ConfigError(f"{pattern}: its braces do not match") from None
    found = {shard.address: shard for one in each for shard in _find(one, timeout_s)}
    if not found:
        raise MissingInput(f"{pattern}: no tars there; name a folder of tars, or a pattern")
    return [found[address] for address in sorted(found)]


def _find(pattern: str, timeout_s: float) -> Iterator[Shard]:
    wild = any(c in pattern for c in "*?[")
    if is_remote(pattern):
        yield from _persistently(lambda: list(_find_remote(pattern, wild)), pattern, timeout_s)
        return
    path = Path(pattern).expanduser()
    if path.is_dir():
        path, wild = path / "*.tar", True
    if wild:
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        paths = [p for p in anchor.glob(str(path.relative_to(anchor))) if p.is_file()]
    elif path.is_file():
        paths = [path]
    else:
        raise MissingInput(f"{path}: no such file or folder; see train.data.datasets")
    for path in paths:
        status = path.stat()
        yield Shard(str(path), status.st_size, str(status.st_mtime_ns))


def _find_remote(pattern: str, wild: bool) -> Iterator[Shard]:
    filesystem, path = _remote(pattern)
    if wild:
        found = filesystem.glob(path, detail=True)
    elif path.endswith("/") or (not path.endswith(".tar") and filesystem.isdir(path)):
        found = filesystem.glob(path.rstrip("/") + "/*.tar", detail=True)
    elif filesystem.exists(path):
        found = {path: filesystem.info(path)}
    else:
        raise MissingInput(f"{pattern}: no such file or folder; see train.data.datasets")
    for name, entry in found.items():
        if entry["size"] is None:
            raise DatasetError(f"{name}: the server does not say how large it is")
        yield Shard(filesystem.unstrip_protocol(name), int(entry["size"]), _tag(entry))


def _tag(entry: dict[str, Any]) -> str:
    """What a listing shows of a file's content besides its size."""
    keys = ("ETag", "etag", "LastModified", "mtime", "updated", "created")
    return next((str(entry[key]) for key in keys if entry.get(key)), "")


def _stamp_file(path: str) -> str:
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        return ""
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _stamp_remote(address: str) -> str:
    filesystem, path = _remote(address)
    filesystem.invalidate_cache()  # it may remember a listing for as long as it lives
    try:
        entry = filesystem.info(path)
    except FileNotFoundError:
        return ""
    return f"{entry['size']} {_tag(entry)}"


def _read_file(path: str, offset: int, size: int) -> memoryview:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = bytearray(size)
        filled = 0
        # A network file system may return less than it was asked for.
        while filled < size:
            count = os.preadv(descriptor, [memoryview(data)[filled:]], offset + filled)
            if not count:
                raise DatasetError(
                    f"{path}: ends at byte {offset + filled}, but samples lie up to byte "
                    f"{offset + size}; `verify` finds damaged shards of a run"
                )
            filled += count
    finally:
        os.close(descriptor)
    return memoryview(data).toreadonly()


def _read_remote(address: str, offset: int, size: int) -> memoryview:
    filesystem, path = _remote(address)
    data = filesystem.cat_file(path, start=offset, end=offset + size)
    if len(data) > size:
        raise NotImplementedError("the server sends whole files where a range is asked for")
    if len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes came")
    return memoryview(data)


def _whole(address: str) -> bytes:
    if not is_remote(address):
        return Path(address).read_bytes()
    filesystem, path = _remote(address)
    return bytes(filesystem.cat_file(path))


def _remote(address: str) -> tuple[Any, str]:
    """The file system of an address and the path in it."""
    import fsspec

    if "::" in address or address.partition("://")[0] not in _PROTOCOLS:
        raise ConfigError(f"{address}: shards are read from one of {', '.join(_PROTOCOLS)}://…")
    try:
        filesystem, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{address}: {error}") from None
    return filesystem, path


def _persistently(call: Callable[[], T], wanted: str, timeout_s: float) -> T:
    """The result of `call`, tried again until it succeeds or the time is over."""
    deadline = time.monotonic() + timeout_s
    pause = _PAUSE_S
    tries = 0
    while True:
        tries += 1
        try:
            left = deadline - time.monotonic()
            return _within(call, min(left, timeout_s / _TRIES_IN_TIME))
        except (DatasetError, ConfigError, MissingInput):
            raise
        except Exception as error:  # each kind of storage has errors of its own
            reason = str(error) or type(error).__name__
            if isinstance(error, _LASTING):
                raise DatasetError(f"{wanted} cannot be read: {reason}") from None
            if time.monotonic() + pause >= deadline:
                raise DatasetError(
                    f"{wanted} could not be read in {timeout_s:g} s, {tries} tries: {reason}; "
                    "where the storage is just slow, raise train.data.read_timeout_s"
                ) from None
        log.warning("%s: try %d failed: %s", wanted, tries, reason)
        time.sleep(pause)
        pause *= 2


def _within(call: Callable[[], T], limit_s: float) -> T:
    """The result of `call`, or `TimeoutError`. What hangs is left behind in a thread of its own:
    neither a dead network mount nor every kind of storage can be interrupted."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="read", daemon=True).start()
    return result.result(limit_s)

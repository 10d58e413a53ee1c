"""Inputs that are elsewhere: at http(s) addresses, and wherever fsspec reaches (`s3://`, …).

Such a file is fetched whole, then read like any other. It is known by its address.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import SplitResult, urlsplit

from pipeline.config import ConfigError, MissingInput, UserError
from pipeline.pace import Pace, pause
from pipeline.stop import Stopped

log = logging.getLogger(__name__)

FRUITLESS_TRIES = 8
"""So many tries in a row that bring a file no further are the last."""
_MOST_TRIES = 100
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""After the first fruitless try; it doubles with each. Common Crawl asks for a second at least."""
LONGEST_RETRY_AFTER_S = 900.0
"""A server that wants to be left alone for longer is not waited for."""
MOST_OF_A_LIST = 256_000_000
"""Bytes of a list of paths, as it comes and unpacked. Those of a whole crawl are 13 million."""
_BLOCK = 32 << 20  # bytes of a request through fsspec
_WEB = ("http", "https")


class Cut(Exception):
    """A try that brought no whole file, where another one may."""

    def __init__(self, why: str, retry_after_s: float = 0.0) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


def is_remote(reference: str) -> bool:
    """Whether a reference or pattern is an address: has a scheme and `://`."""
    return "://" in reference


def name_of(reference: str) -> str:
    """The file's own name, without what follows it in an http(s) address."""
    path = parts(reference).path if _scheme(reference) in _WEB else reference
    return path.rstrip("/").rpartition("/")[2]


def parts(address: str) -> SplitResult:
    """Of an address, its scheme, host, path and so on. Raises `ConfigError` if it is none."""
    try:
        return urlsplit(address)
    except ValueError as error:
        raise ConfigError(f"{shown(address)}: not an address: {error}") from None


def shown(text: str) -> str:
    """A text in which no address tells the user and password that it has before its host."""
    return re.sub(r"(?<=://)[^\s/?#]*@", "", text)


def find(pattern: str, endings: Sequence[str] = ()) -> list[str]:
    """Addresses that a pattern with `://` names, sorted; never empty. A folder stands for the files
    below it that end with one of `endings`.

    Web servers list nothing, so of an http(s) address nothing is asked. Raises `ConfigError` for
    wildcards there, `MissingInput` and `UserError` if a filesystem has or lists nothing such.
    """
    if _scheme(pattern) in _WEB:
        if "*" in pattern or parts(pattern).path in ("", "/") or pattern.endswith("/"):
            raise ConfigError(
                f"{shown(pattern)}: web servers do not list their files, so neither wildcards nor"
                " folders can be followed there; name a list of paths (*.paths.gz), or files"
            )
        return [pattern]
    if not any(sign in pattern for sign in "*?[") and pattern.endswith(tuple(endings)):
        return [pattern]
    filesystem, path = _filesystem(pattern)
    try:
        if any(sign in path for sign in "*?["):
            found = filesystem.glob(path, detail=True)
        else:
            found = filesystem.find(path, detail=True)
            if path.strip("/") not in {name.strip("/") for name in found}:  # no file, so a folder
                found = {name: info for name, info in found.items() if name.endswith(endings)}
    except Exception as error:
        raise UserError(f"{shown(pattern)}: cannot be listed: {_words(error)}") from None
    names = sorted(name for name, info in found.items() if info["type"] == "file")
    if not names:
        raise MissingInput(f"{shown(pattern)}: no such input; check the path in the configuration")
    return [filesystem.unstrip_protocol(name) for name in names]


def fetch(
    address: str,
    target: Path,
    pace: Pace | None = None,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Store the whole file at `address` as `target`.

    What a network or a server may do once is tried again, going on where the file was cut off, with
    pauses that grow; a `Retry-After` holds for all who keep the same `pace`. `progress` is told
    bytes and size, the latter None while it is unknown, often. Raises `MissingInput` if there is no
    such file, `UserError` if it did not come, `Stopped`; the first two with the address. Then
    `target` may be there in part.
    """
    from pipeline.http import HttpFile

    with target.open("wb") as stream:
        file: HttpFile | _StoredFile

        def look() -> bool:
            progress(file.position, file.size)
            return stopping()

        def turn() -> None:
            if pace is not None:
                pace.wait(file.host, look)

        kind = HttpFile if _scheme(address) in _WEB else _StoredFile
        file = kind(address, stream, look)

        farthest, fruitless = 0, 0
        for tries in range(1, _MOST_TRIES + 1):
            try:
                file.read(turn)
                return
            except Cut as cut:
                if cut.retry_after_s > LONGEST_RETRY_AFTER_S:
                    raise UserError(
                        f"{file.address}: {cut}, and its server is to be left alone for"
                        f" {cut.retry_after_s:.0f} s; give the same command again then"
                    ) from None
                fruitless = 0 if file.position > farthest else fruitless + 1
                farthest = max(farthest, file.position)
                if fruitless >= FRUITLESS_TRIES or tries == _MOST_TRIES:
                    raise UserError(
                        f"{file.address}: not fetched in {tries} tries, {farthest} bytes at most;"
                        f" the last: {cut}. The same command tries again"
                    ) from None
                wait_s = min(FIRST_PAUSE_S * 2.0**fruitless, LONGEST_PAUSE_S)
                wait_s = max(random.uniform(0.5, 1.0) * wait_s, cut.retry_after_s)
                log.warning("%s: %s; trying again in %.1f s", file.address, cut, wait_s)
                if pace is not None and cut.retry_after_s:
                    pace.hold(file.host, cut.retry_after_s)
                pause(wait_s, look)


def read(address: str) -> bytes:
    """The content of a list. Raises as `fetch` does, and `ConfigError` where it is cut short: when
    more than `MOST_OF_A_LIST` bytes have come, or are announced."""
    import tempfile

    most = 0

    def progress(done: int, total: int | None) -> None:
        nonlocal most
        most = max(most, done, total or 0)

    with tempfile.TemporaryDirectory() as folder, suppress(Stopped):
        target = Path(folder, "content")
        fetch(address, target, None, lambda: most > MOST_OF_A_LIST, progress)
        return target.read_bytes()
    raise ConfigError(f"{shown(address)}: not a list of paths (more than {MOST_OF_A_LIST:,} bytes)")


class _StoredFile:
    """A file on one of fsspec's filesystems, read in blocks; an `HttpFile` in all that is used."""

    def __init__(self, address: str, target: BinaryIO, stopping: Callable[[], bool]) -> None:
        self.address = shown(address)
        self.host = parts(address).netloc.rpartition("@")[2]
        self.position = 0
        self.size: int | None = None
        self._target = target
        self._stopping = stopping
        self._version: object = None
        self._filesystem, self._path = _filesystem(address)

    def read(self, pace: Callable[[], None]) -> None:
        """Get what is missing. Raises as `HttpFile.read` does."""
        pace()
        size, version = self._ask(self._about)
        if self.position and (size is None or version != self._version):
            self._target.seek(0)
            self._target.truncate()
            self.position = 0
        self.size, self._version = size, version
        with self._ask(self._open) as stream:
            while self.size is None or self.position < self.size:
                if self._stopping():
                    raise Stopped("a stop while a file was fetched")
                pace()
                if not (block := self._ask(lambda: stream.read(_BLOCK))):
                    break
                self._target.write(block)
                self.position += len(block)
        if self.size is not None and self.position != self.size:
            raise Cut(f"{self.position} bytes came of {self.size}")

    def _about(self) -> tuple[int | None, object]:
        """The file's size in bytes, if the filesystem knows it, and what changes with the file."""
        self._filesystem.invalidate_cache(self._path)  # what a listing once said of it
        about = self._filesystem.info(self._path)
        size = about.get("size")
        return size, (about.get("ETag") or about.get("etag") or about.get("mtime"), size)

    def _open(self) -> Any:
        """The file from `position` on."""
        # Without read-ahead: a block is a request, on s3 one that demands the same ETag.
        stream = self._filesystem.open(self._path, "rb", block_size=_BLOCK, cache_type="none")
        stream.seek(self.position)
        return stream

    def _ask(self, call: Callable[[], Any]) -> Any:
        """What a client of whatever kind answers; its errors in our words."""
        try:
            return call()
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise MissingInput(
                f"{self.address}: {_words(error)}; check the address, and who may read it"
            ) from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.address}: cannot be fetched: {_words(error)}") from None
        except Exception as error:  # clients of networks have their own classes
            raise Cut(_words(error)) from None


def _scheme(reference: str) -> str:
    return reference.partition("://")[0].lower()


def _filesystem(address: str) -> tuple[Any, str]:
    """fsspec's filesystem behind an address, and the path there. Raises `ConfigError`."""
    from fsspec.core import url_to_fs

    try:
        found: tuple[Any, str] = url_to_fs(address)
    except ImportError as error:
        extra = " (pip install -e '.[s3]')" if _scheme(address) in ("s3", "s3a") else ""
        raise ConfigError(
            f"{shown(address)}: a package is missing that reads {_scheme(address)}:// addresses"
            f"{extra}: {error}"
        ) from None
    except Exception as error:  # kinds of addresses have their own classes
        raise ConfigError(
            f"{shown(address)}: no such kind of address, or it cannot be opened: {_words(error)}"
        ) from None
    return found


def _words(error: BaseException) -> str:
    return shown(f"{type(error).__name__}: {error}") if str(error) else type(error).__name__

"""The tar in which a task stages what became of its addresses; it is its own journal.

An address ends as `HASH.jpg`, its picture if it has one, and then `HASH.json`, its whole outcome.
Both are with the kernel before the next address ends: a process that is killed leaves all but the
addresses at work, and the next attempt at its task asks for those alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from dataset_build import uid_range
from dataset_build.download.earlier import MARK
from pipeline import tar
from pipeline.manifest import Damaged, everything
from pipeline.stage import Attempt

log = logging.getLogger(__name__)

Outcome = dict[str, Any]
"""See `outcome.outcome`."""

_HEAD = b'{"digest": "%b", '  # of SHA-256, over all that follows with a brace before it
_DIGEST = slice(12, 76)
_NAME = re.compile(r"[0-9a-f]{16}\.(jpg|json)")


class Journal:
    """A tar that grows by one address at a time. Leave the `with` block before you verify it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed = False
        """Whether a write has failed; what came after it would not be found."""
        self._stream = path.open("xb", buffering=0)
        self._ended: dict[bytes, bytes] = {}

    def end(self, address: bytes, outcome: Outcome, picture: bytes | None) -> None:
        """Write what became of an address. Raises `OSError`, and from then on always does."""
        assert address not in self._ended, address.hex()
        record = _encode(address, outcome)
        members = io.BytesIO()
        if picture is not None:
            tar.write_member(members, f"{address.hex()}.jpg", picture)
        tar.write_member(members, f"{address.hex()}.json", record)
        self._write(members.getvalue())
        self._ended[address] = record[_DIGEST]

    def verified(self) -> dict[bytes, tuple[Outcome, int]]:
        """Every address's outcome and the place of its picture's bytes, as the file tells them.

        Raises `Damaged` unless it holds exactly what was written to it.
        """
        found: dict[bytes, tuple[Outcome, int]] = {}
        with tar.opened(self.path) as handle:
            for address, outcome, offset, digest in read(handle):
                if self._ended.get(address) != digest:
                    raise Damaged(f"{self.path}: {address.hex()} is not what was written")
                found[address] = outcome, offset
        if len(found) != len(self._ended):
            raise Damaged(f"{self.path}: {len(found)} addresses read, {len(self._ended)} written")
        return found

    def _write(self, data: bytes) -> None:
        if self.failed:
            raise OSError(f"{self.path}: an earlier write failed")
        view = memoryview(data)
        try:
            while view:
                view = view[self._stream.write(view) :]
        except BaseException:
            self.failed = True
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with self._stream:
            if error is None:
                end = io.BytesIO()
                tar.finish(end)
                self._write(end.getvalue())


class Ended(NamedTuple):
    """An address that ended in a tar."""

    address: bytes
    outcome: Outcome
    offset: int
    """Of its picture's bytes, or 0."""
    digest: bytes
    """SHA-256 of address and outcome, in hexadecimal digits."""


def read(handle: tar.Tar, *, passes_damage: bool = False) -> Iterator[Ended]:
    """The addresses that ended in a tar.

    Raises `Damaged` at the first byte that is not as it was written, a missing end included. With
    `passes_damage`, an address whose picture or outcome has changed is passed over; where the tar's
    own structure is broken it still raises.
    """
    picture: tuple[str, int, int, bytes] | None = None  # key, offset, size and digest
    try:
        for member in tar.members(handle, _NAME, canonical=True):
            key, _, kind = member.name.partition(".")
            data = bytes(handle.read(member.offset, member.size))
            if kind == "jpg" and picture is None:
                picture = key, member.offset, member.size, hashlib.sha256(data).digest()
                continue
            own, picture = picture or (key, 0, 0, bytes(32)), None
            try:
                outcome = _decode(handle, member.name, data)
                claimed = (outcome["staged_bytes"], outcome["staged_sha256"])
                if (key, *claimed) != (own[0], *own[2:]):
                    raise Damaged(f"{handle.name}: {member.name} does not belong to its picture")
            except Damaged:
                if passes_damage:
                    continue
                raise
            yield Ended(bytes.fromhex(key), outcome, own[1], data[_DIGEST])
    except tar.BrokenTar as broken:
        raise Damaged(str(broken)) from None
    if picture:
        raise Damaged(f"{handle.name}: {picture[0]} has no outcome")


class Unfinished:
    """What attempts that never were published have left: outcomes of addresses, and pictures.

    Attempts at tasks of another plan count too, if their settings make the same pictures. Others
    may still write to these tars; they are only read, as far as they are whole. So are tars that
    the task had published, if it is done again because some of its files are damaged.
    """

    def __init__(self, attempt: Attempt, marks: str, wanted: Collection[bytes]) -> None:
        self._places: dict[bytes, _Place] = {}
        self._handles = ExitStack()
        if attempt.partial is None:
            return
        first, last = min(wanted), max(wanted)
        try:
            paths = sorted(attempt.partial.parent.glob(f"*/*.{marks}.*.tar"))
        except FileNotFoundError:  # while we looked; see below
            paths = []
        for path in paths:
            low, high = uid_range.of_file(path.name.partition(".")[0])
            if low[:8] <= last and high[:8] >= first:
                self._take(path, wanted, attempt.stop.check)
        for path in _lost(attempt, marks):
            self._take(path, wanted, attempt.stop.check)

    def _take(self, path: Path, wanted: Collection[bytes], check: Callable[[], None]) -> None:
        try:
            handle = self._handles.enter_context(tar.opened(path))
        except FileNotFoundError:  # its task has just been published by another process
            return
        before = len(self._places)
        try:
            for ended in read(handle, passes_damage=True):
                check()
                if ended.address in wanted:
                    place = _Place(handle, ended.outcome, ended.offset)
                    self._places.setdefault(ended.address, place)
            end = "to its end"
        except Damaged as torn:
            end = str(torn)
        log.info("%d addresses are taken from %s, %s", len(self._places) - before, path.name, end)

    @property
    def outcomes(self) -> Mapping[bytes, Outcome]:
        """What became of each address."""
        return {address: place.outcome for address, place in self._places.items()}

    def picture(self, address: bytes) -> bytes | None:
        """The picture of an address, if it has one. Raises `Damaged` if it has changed since."""
        place = self._places[address]
        if place.outcome["status"] != "ok":
            return None
        data = bytes(place.handle.read(place.offset, place.outcome["staged_bytes"]))
        if hashlib.sha256(data).digest() != place.outcome["staged_sha256"]:
            raise Damaged(f"{place.handle.name}: the picture of {address.hex()} has changed")
        return data

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.close()


def _lost(attempt: Attempt, marks: str) -> list[Path]:
    """The tars that this task has published and that no manifest names any more.

    With what settings they were made, the table beside them says; without it they are not used.
    """
    stage_folder = attempt.run.stage_folder(attempt.task.stage)
    folders = set(stage_folder.glob(f"store/{attempt.task.index:05d}.*")) - {attempt.folder}
    if folders:
        folders -= {stage_folder / "store" / done.store for done in everything(stage_folder)}
    found: list[Path] = []
    for folder in sorted(folders):
        try:
            (table,) = folder.glob("fetched-*.parquet")
            own = (pq.read_schema(table).metadata or {}).get(MARK, b"").decode()
        except (ValueError, OSError):  # none, or it cannot be read; or the folder has just gone
            continue
        if own.startswith(marks):
            found += sorted(folder.glob("staged-*.tar"))
    return found


@dataclass(frozen=True)
class _Place:
    handle: tar.Tar
    outcome: Outcome
    offset: int


def share(attempt: Attempt, path: Path, marks: str) -> None:
    """Let later attempts find a tar that this one has just begun, under a second name."""
    if attempt.partial is not None:
        part, parts = attempt.task.params["part"], attempt.task.params["parts"]
        name = f"staged-{part}-of-{parts}.{marks}.{attempt.folder.name}.tar"
        try:
            attempt.partial.mkdir(parents=True, exist_ok=True)
            os.link(path, attempt.partial / name)
        except FileNotFoundError:  # another process has just published the task: nothing to keep
            log.info("the task is done elsewhere")


def _encode(address: bytes, outcome: Outcome) -> bytes:
    """An outcome with its address and the digest of both."""
    plain = {k: v.hex() if isinstance(v, bytes) else v for k, v in sorted(outcome.items())}
    plain["address"] = address.hex()
    body = json.dumps(plain).encode()
    return _HEAD % hashlib.sha256(body).hexdigest().encode() + body[1:]


def _decode(handle: tar.Tar, name: str, data: bytes) -> Outcome:
    body = b"{" + data[len(_HEAD % data[_DIGEST]) :]
    digest = hashlib.sha256(body).hexdigest().encode()
    if data != _HEAD % digest + body[1:]:
        raise Damaged(f"{handle.name}: {name} is not an outcome as it was written")
    outcome: Outcome = json.loads(body)
    if name != f"{outcome.pop('address')}.json":
        raise Damaged(f"{handle.name}: {name} is the outcome of another address")
    for field in ("sha256", "staged_sha256"):
        outcome[field] = bytes.fromhex(outcome[field])
    return outcome

"""A packed dataset read again, every byte of it: what is not as it was packed, and where.

It needs the dataset's folder alone. Three accounts must agree: the checksums of `dataset.json`, the
tar's own structure, and the index, which says of every file where it lies and what its hash is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataset_build import pack, processes, records, sample
from pipeline import files, tar
from pipeline.manifest import digest
from pipeline.tar import BrokenTar, Member, Tar

_AT_ONCE = 256 << 20
"""Bytes of shards that are read sooner than other processes start."""
_SAID = 20
"""Faults of a shard that are said one by one."""
_SHARD = re.compile(r"[0-9]{5,}\.tar")
_PARTS = "index-*.parquet"


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was packed."""

    file: str
    """Below the dataset's folder."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class _Shard:
    """A shard with what is known of it; an empty checksum is one that need not be compared."""

    name: str
    bytes: int
    sha256: str
    first: int
    """Row of its first sample in the index."""
    samples: int
    has_part: bool = False
    """Whether its part of the index must be there and agree."""

    @property
    def file(self) -> str:
        return f"shards/{self.name}"

    @property
    def part(self) -> str:
        return f"index-{self.name.removesuffix('.tar')}.parquet"


@dataclass(frozen=True)
class _Found:
    faults: list[Fault]
    uids: tuple[bytes, bytes] | None
    """First and last in the index."""
    size: int
    """Bytes of the shard."""
    gone: bytes = b""
    """Uids that were removed, as its part of the index has them."""


def verify(
    folder: Path,
    *,
    decodes: bool = True,
    workers: int = 0,
    known: Mapping[str, str] | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[Fault]:
    """All faults of the dataset in `folder`.

    `decodes`: whether every picture is decoded too, which takes most of the time. `known`: SHA-256
    of files whose bytes have just been read, by name. `tick` is told bytes of shards, done and in
    all. `workers`: processes; 0: one a core.
    """
    known = known or {}
    described, faults = _description(folder)
    indexed = not faults
    if described:
        faults += _index_faults(folder, described, known)
        indexed = not faults
        shards = list(_shards(described, known, _parts(folder, known)))
    else:
        shards = [
            _Shard(path.name, path.stat().st_size, "", 0, 0)
            for path in sorted((folder / "shards").glob("*.tar"))
        ]
    named = {name for shard in shards for name in (shard.file, shard.part)}
    for path in sorted((*folder.glob("shards/*"), *folder.glob(_PARTS))):
        if (name := path.relative_to(folder).as_posix()) not in named:
            faults.append(Fault(name, "is no part of the dataset"))
    total = sum(shard.bytes for shard in shards)
    count = workers or os.cpu_count() or 1
    done, last, gone = 0, b"", b""
    check = partial(_check, folder, indexed, decodes and indexed)
    try:
        with processes.mapping(count if total > _AT_ONCE else 0) as each:
            for one in chain.from_iterable(each(check, _batches(shards, count))):
                faults += one.faults
                done += one.size
                gone += one.gone
                if one.uids and one.uids[0] <= last:
                    faults.append(Fault("index.parquet", f"{one.uids[0].hex()} is out of order"))
                last = one.uids[1] if one.uids else last
                tick(done, total)
    except processes.Killed as killed:
        what = "for want of memory or by a picture; not all shards are checked: `--workers 1` tells"
        what += " which, `--no-decode` decodes no picture"
        faults.append(Fault("shards", f"{killed}, {what}"))
    if faults or not all(shard.has_part for shard in shards):
        return faults
    if hashlib.sha256(gone).hexdigest() != described["removed"]["sha256"]:
        return [Fault(_PARTS, "other uids were removed than dataset.json says")]
    return []


def _description(folder: Path) -> tuple[dict[str, Any], list[Fault]]:
    """What `dataset.json` says; empty, with the reason, if it is not what was written."""
    try:
        text = (folder / "dataset.json").read_text()
        values = json.loads(text)
        rest = {key: value for key, value in values.items() if key != "fingerprint"}
        names = [shard["name"] for shard in values["pairs_by_shard"]]
        if values["fingerprint"] != digest(rest) or text != pack.written(values):
            what = "its fingerprint is not that of what it says"
        elif not all(isinstance(values[of]["sha256"], str) for of in ("index", "removed")):
            what = "is not what was written"
        elif strange := [name for name in names if not _SHARD.fullmatch(name)]:
            what = f"{strange[0]!r} is no name of a shard"
        else:
            return values, []
    except OSError as error:
        what = _unreadable(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        what = "is not what was written"
    return {}, [Fault("dataset.json", f"{what}; the shards are compared with nothing")]


def _parts(folder: Path, known: Mapping[str, str]) -> Callable[[str], bool]:
    """Which parts of the index are to be read. Who copies a dataset takes all of them or none."""
    are_there = any(folder.glob(_PARTS))
    return lambda name: are_there and name not in known


def _shards(
    described: Mapping[str, Any], known: Mapping[str, str], has_part: Callable[[str], bool]
) -> Iterator[_Shard]:
    first = 0
    for entry in described["pairs_by_shard"]:
        read = known.get(f"shards/{entry['name']}") == entry["sha256"]
        sha256 = "" if read else entry["sha256"]
        shard = _Shard(entry["name"], entry["bytes"], sha256, first, entry["samples"])
        yield replace(shard, has_part=has_part(shard.part))
        first += shard.samples


def _index_faults(
    folder: Path, described: Mapping[str, Any], known: Mapping[str, str]
) -> list[Fault]:
    name = "index.parquet"
    try:
        if (known.get(name) or files.sha256(folder / name)) != described["index"]["sha256"]:
            return [Fault(name, "its bytes differ from those that were packed")]
        with files.open_parquet(folder / name) as parquet:
            if not parquet.schema_arrow.equals(records.INDEX):
                return [Fault(name, "has other columns than an index has")]
            if (rows := parquet.metadata.num_rows) != described["samples"]:
                return [Fault(name, f"{rows} rows, but {described['samples']} samples")]
    except (OSError, pa.ArrowException) as error:
        return [Fault(name, _unreadable(error))]
    return []


def _batches(shards: Sequence[_Shard], workers: int) -> list[Sequence[_Shard]]:
    """Shards side by side: the index is opened once for each batch."""
    size = max(1, len(shards) // (16 * workers))
    return [shards[start : start + size] for start in range(0, len(shards), size)]


def _check(folder: Path, indexed: bool, decodes: bool, shards: Sequence[_Shard]) -> list[_Found]:
    if not indexed:
        return [_check_shard(folder, shard, None, decodes) for shard in shards]
    found = []
    try:
        with files.open_parquet(folder / "index.parquet") as index:
            starts = _starts(index)
            for shard in shards:
                rows = _rows(index, starts, shard.first, shard.samples)
                one = _check_shard(folder, shard, rows.to_pylist(), decodes)
                found.append(_with_part(folder, shard, rows, one) if shard.has_part else one)
    except (OSError, pa.ArrowException) as error:
        what = f"{_unreadable(error)}, where it has {shards[len(found)].name}"
        found.append(_Found([Fault("index.parquet", what)], None, 0))
    processes.note("")
    return found


def _starts(index: Any) -> list[int]:
    """The first row of each row group, and the number of all rows."""
    groups = range(index.num_row_groups)
    return list(accumulate((index.metadata.row_group(n).num_rows for n in groups), initial=0))


def _rows(index: Any, starts: Sequence[int], first: int, count: int) -> pa.Table:
    """Rows of the index, which has a row group for each shard or cuts them otherwise."""
    low, high = bisect_right(starts, first) - 1, bisect_left(starts, first + count)
    groups = list(range(low, min(high, len(starts) - 1)))
    return index.read_row_groups(groups).slice(first - starts[low], count)


def _with_part(folder: Path, shard: _Shard, rows: pa.Table, found: _Found) -> _Found:
    """What was found of a shard, and whether its part of the index says the same as the whole."""
    what, gone = "", b""
    try:
        with files.open_parquet(folder / shard.part) as part:
            gone = (part.schema_arrow.metadata or {}).get(pack.REMOVED, b"")
            if not part.read().equals(rows):
                what = "says other than index.parquet"
    except (OSError, pa.ArrowException) as error:
        what = _unreadable(error)
    more = [Fault(shard.part, what)] if what else []
    return replace(found, faults=found.faults + more, gone=gone)


def _unreadable(error: Exception) -> str:
    """Said in one line; pyarrow's errors have several."""
    number = getattr(error, "errno", None)
    return f"cannot be read ({os.strerror(number) if number else ' '.join(str(error).split())})"


def _check_shard(
    folder: Path, shard: _Shard, rows: list[dict[str, Any]] | None, decodes: bool
) -> _Found:
    faults: list[str] = []
    path = folder / "shards" / shard.name
    try:
        if (size := path.stat().st_size) != shard.bytes:
            faults.append(f"{size} bytes, packed with {shard.bytes}")
        elif shard.sha256 and files.sha256(path) != shard.sha256:
            faults.append("its bytes differ from those that were packed")
        with tar.opened(path) as source:
            faults += _structure(source, rows)
            faults += _misled(shard, rows or [])
            for row in rows or []:
                processes.note(f"sample {row['uid'].hex()} of {shard.name}")
                faults += [
                    f"sample {row['uid'].hex()}: {w}" for w in sample.faults(source, row, decodes)
                ]
    except OSError as error:
        faults.append(_unreadable(error))
    if len(faults) > _SAID:
        faults[_SAID:] = [f"and {len(faults) - _SAID} faults more"]
    uids = (rows[0]["uid"], rows[-1]["uid"]) if rows else None
    return _Found([Fault(shard.file, what) for what in faults], uids, shard.bytes)


def _structure(source: Tar, rows: list[dict[str, Any]] | None) -> Iterator[str]:
    """Whether every byte belongs to what a shard has, and its files are those of the index."""
    try:
        found = list(tar.members(source, pack.NAMES, canonical=True))
    except BrokenTar as error:
        yield str(error).removeprefix(f"{source.name}: ")
        return
    if rows is None:
        return
    expected = [
        Member(f"{row['uid'].hex()}.{extension}", at - tar.BLOCK, at, row[f"{kind}_bytes"])
        for row in rows
        for kind, extension in sample.KINDS
        for at in [row[f"{kind}_offset"]]
    ]
    for ours, theirs in zip(expected, found, strict=False):
        if ours != theirs:
            yield f"{theirs.name} at byte {theirs.offset}, where the index has {ours.name}"
            return
    if len(expected) != len(found):
        yield f"{len(found)} files, the index has {len(expected)}"


def _misled(shard: _Shard, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Rows of the index that contradict each other, or the shard they belong to."""
    before = b""
    for row in rows:
        name, end = row["uid"].hex(), row["json_offset"] + row["json_bytes"]
        if row["shard"] != shard.name:
            yield f"sample {name}: the index has it in {row['shard']}"
        if row["offset"] != row["image_offset"] - tar.BLOCK or not (
            0 <= row["offset"] + row["length"] - end < tar.BLOCK
        ):
            yield f"sample {name}: the index has it from byte {row['offset']} on"
        if row["uid"] <= before:
            yield f"sample {name}: it is out of order"
        before = row["uid"]

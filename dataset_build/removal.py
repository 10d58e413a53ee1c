"""A request to remove: lists are read, what they name in the run is found, and it is put in force.

What is asked for by address, digest or uid is a picture: its digests, its addresses and its uids
are listed too, so it does not come back from elsewhere, and its perceptual hash, by which `screen`
knows what looks like it when it decides again. A domain stands for what lies there; the same file
elsewhere stays.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build import list_entries, removed
from dataset_build.list_entries import Kind
from dataset_build.lists import Lists
from pipeline import files
from pipeline.config import ConfigError, MissingInput
from pipeline.manifest import everything
from pipeline.stage import Run

_DEAD_S = 24 * 3600
"""A request is written in less."""
_FEW = 10


@dataclass(frozen=True)
class Request:
    """What one call asked for, and what that was found to be."""

    number: int
    found: Mapping[str, int]
    """Samples with a picture, by the kind of entry that names them; `in all`; `known already`."""
    unknown: Sequence[str]
    """Entries that name nothing which the run has; they are kept."""


@dataclass
class Asked:
    """Entries of lists, by kind, each once; and where they are from."""

    entries: dict[Kind, dict[str, None]] = field(
        default_factory=lambda: {k: {} for k in removed.LISTS}
    )
    sources: list[dict[str, Any]] = field(default_factory=list)


def read(paths: Iterable[Path]) -> Asked:
    """The entries of lists: what a line is shows by its form, or by the file's name if that is a
    kind's, such as `domains.txt`. Raises `ConfigError` naming every bad line, up to ten."""
    asked, faults = Asked(), []
    for path in paths:
        kind: Kind | None = next((kind for kind in removed.LISTS if path.stem == kind), None)
        count = 0
        try:
            content = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise MissingInput(f"{path}: the list cannot be read ({error})") from None
        for number, line in enumerate(content.splitlines(), 1):
            # An address may have a `#` in it; in a list a comment follows a space or begins a line.
            if not (entry := re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()):
                continue
            count += 1
            try:
                own = kind or _kind(entry)
                list_entries.key(own, entry)
                asked.entries[own][entry] = None
            except ValueError as error:
                faults.append(f"{path}:{number}: {entry[:80]!r}: {error}")
        asked.sources.append({"list": str(path), "sha256": files.sha256(path), "entries": count})
    if faults:
        more = [f"and {len(faults) - _FEW} more lines"] if len(faults) > _FEW else []
        raise ConfigError("\n".join([*faults[:_FEW], *more]))
    return asked


def carried(other: Path) -> list[Path]:
    """The lists of another run's requests. Raises `MissingInput` if it has none."""
    found = [path / f"{kind}.txt" for path in removed.folders(other) for kind in removed.LISTS]
    if not (found := [path for path in found if path.exists()]):
        raise MissingInput(f"{other}: nothing was removed from this run: {other / 'removed'}")
    return found


def _kind(entry: str) -> Kind:
    if "://" in entry:
        return "addresses"
    if re.fullmatch(r"[0-9a-fA-F]{64}", entry):
        return "sha256"
    if re.fullmatch(r"[0-9a-fA-F]{32}", entry):
        return "uids"
    if re.fullmatch(r"[0-9a-fA-F]+", entry) or "." not in entry:
        raise ValueError(
            "neither an address (https://…), a domain, a SHA-256 (64 hexadecimal digits) nor a uid"
            " (32 of them)"
        )
    return "domains"


def ask(run: Run, asked: Asked, reason: str = "") -> Request:
    """Put a request in force. What the loader and later builds read is there as a whole or not."""
    below = run.folder / "removed"
    _sweep(below)
    private = below / f".{files.attempt_name()}"
    private.mkdir(parents=True)
    try:
        found = _found(run, asked)
        for kind in removed.LISTS:
            names = sorted({*asked.entries[kind], *found.entries[kind]})
            if kind == "uids":
                names = sorted({name.lower() for name in names})  # as the loader reads them
            names = [name for name in names if name]
            if names:
                (private / f"{kind}.txt").write_text("".join(f"{name}\n" for name in names))
        record = {
            "time": round(time.time(), 3),
            "reason": reason,
            "lists": asked.sources,
            "entries": {kind: len(asked.entries[kind]) for kind in removed.KINDS},
            "samples": dict(found.samples),
            "unknown": len(found.unknown),
            "fingerprint": removed.fingerprint(run.folder),
        }
        (private / removed.RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False))
        for path in (*files.walk(private), private):
            files.fsync(path)
        number = _rename(private, below)
    except BaseException:
        shutil.rmtree(private, ignore_errors=True)
        raise
    return Request(number, found.samples, found.unknown)


def _rename(private: Path, below: Path) -> int:
    """The number that a request gets: the first after all that there ever were."""
    known = [*removed.in_force(below.parent), *removed.carried_out(below.parent)]
    number = 1 + max(map(int, known), default=0)
    while True:
        try:
            private.rename(below / f"{number:06d}")
        except OSError:  # a folder that is not empty cannot be replaced
            if not (below / f"{number:06d}").exists():
                raise
            number += 1
            continue
        files.fsync(below)
        return number


def _sweep(below: Path) -> None:
    """Delete what processes left that ended while they wrote a request."""
    for path in below.glob(".*"):
        if path.is_dir() and time.time() - path.stat().st_mtime > _DEAD_S:
            shutil.rmtree(path, ignore_errors=True)


@dataclass
class _Found:
    entries: dict[Kind, set[str]] = field(
        default_factory=lambda: {kind: set() for kind in removed.LISTS}
    )
    samples: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)


def _found(run: Run, asked: Asked) -> _Found:
    """What the entries are in this run."""
    found = _Found()
    given = {kind: _lists(kind, asked.entries[kind]) for kind in removed.KINDS}
    met: dict[Kind, set[int]] = {kind: set() for kind in removed.KINDS}
    pictures: set[bytes] = set()
    for table in removed.outcomes(run):
        hits = removed.hits(given, table)
        has_picture = ~removed.is_not(table, "ok")
        for kind, mask in hits.items():
            found.samples[kind] += int((mask & has_picture).sum())
            met[kind].update(_keys_of(kind, table.filter(pa.array(mask))))
        found.samples["removed before"] += int(
            (
                np.logical_or.reduce(list(hits.values())) & ~removed.is_not(table, removed.STATUS)
            ).sum()
        )
        named = table.filter(pa.array(hits["addresses"] | hits["sha256"] | hits["uids"]))
        for name in removed.DIGESTS:
            pictures.update(named[name].to_pylist())
    pictures.discard(bytes(32))
    found.entries["sha256"] = {sha256.hex() for sha256 in pictures}
    of_pictures = pa.array(sorted(pictures), pa.binary(32))
    shown: set[bytes] = set()
    for table in removed.outcomes(run):
        same = np.zeros(len(table), np.bool_)
        for name in removed.DIGESTS:
            same |= pc.is_in(table[name], value_set=of_pictures).to_numpy()
        hits = removed.hits(given, table)
        same |= hits["addresses"] | hits["uids"]
        shown.update(table.filter(pa.array(same & ~removed.is_not(table, "ok")))["uid"].to_pylist())
        left = removed.is_not(table, removed.STATUS)
        found.entries["addresses"].update(table.filter(pa.array(same & left))["url"].to_pylist())
        gone = (same | hits["domains"]) & left
        found.samples["in all"] += int((gone & ~removed.is_not(table, "ok")).sum())
        for uid in table.filter(pa.array(gone))["uid"].to_pylist():
            found.entries["uids"].add(uid.hex())
    found.entries["perceptual"].update(_looks(run, shown))
    for kind in removed.KINDS:
        entries = asked.entries[kind]
        found.unknown += [name for name in entries if list_entries.key(kind, name) not in met[kind]]
    return found


def _looks(run: Run, uids: Collection[bytes]) -> Iterator[str]:
    """Perceptual hashes, as far as `screen` has them, but of pictures with too little to see:
    those are known by their files alone."""
    from dataset_build.screen.near import MIN_QUALITY

    among = pa.array(sorted(uids), pa.binary(16))
    folder = run.stage_folder("screen")
    for manifest in everything(folder) if uids else ():
        for output in manifest.outputs:
            if output.name.startswith("looked-"):
                path = folder / "store" / manifest.store / output.name
                table = pq.read_table(path, columns=["uid", "pdq", "pdq_quality"])
                told = pc.greater_equal(table["pdq_quality"], MIN_QUALITY)
                own = table.filter(pc.and_(pc.is_in(table["uid"], value_set=among), told))
                yield from (pdq.hex() for pdq in own["pdq"].to_pylist())


def _lists(kind: Kind, entries: Iterable[str]) -> Lists:
    keys = np.unique(np.array([list_entries.key(kind, entry) for entry in entries], np.uint64))
    return Lists([(removed.STATUS, kind, keys)])


def _keys_of(kind: Kind, table: pa.Table) -> Iterator[int]:
    """What `lists.key` gives for whatever could have named these rows."""
    if kind in ("addresses", "domains"):
        names = {*table["url"].to_pylist(), *table["final_url"].to_pylist()}
        if kind == "domains":
            hosts = [(urlsplit(name).hostname or "").split(".") for name in names]
            names = {".".join(host[first:]) for host in hosts for first in range(len(host))}
    elif kind == "sha256":
        names = {digest.hex() for name in removed.DIGESTS for digest in table[name].to_pylist()}
    else:
        names = {uid.hex() for uid in table["uid"].to_pylist()}
    for name in names:
        try:
            yield list_entries.key(kind, name)
        except ValueError:
            continue  # no entry of a list could have said so

"""What somebody asked to have removed: tombstones, which every later build of the run honours.

RUN/removed/000001/, 000002/, …: one folder a request, made complete under another name and then
renamed, so that it is in force as a whole or not there; of two requests at the same time each gets
a number. In it: `addresses.txt`, `domains.txt`, `sha256.txt`, `uids.txt`, lists as `lists` reads
them, and `request.json`: who, when, why, and what was found. What is asked for by address, digest
or uid is a picture: its digests, its addresses and its uids are listed too, so it does not come
back from elsewhere. A domain stands for what lies there; the same file elsewhere stays.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build import lists
from dataset_build.lists import Kind, Lists
from pipeline import files
from pipeline.config import ConfigError, MissingInput
from pipeline.manifest import digest, everything
from pipeline.stage import Run

STATUS = "removed"
"""Of a pair in `fetched-*.parquet` whose picture, text and address are gone."""

KINDS: tuple[Kind, ...] = ("addresses", "domains", "sha256", "uids")
COLUMNS = ("uid", "url", "final_url", "status", "sha256", "staged_sha256")
"""Of `records.FETCHED`: what entries may name."""
_NUMBER = re.compile(r"\d{6,}")
_FEW = 10

Mask = npt.NDArray[np.bool_]


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

    entries: dict[Kind, dict[str, None]] = field(default_factory=lambda: {k: {} for k in KINDS})
    sources: list[dict[str, Any]] = field(default_factory=list)


def folders(run_folder: Path) -> list[Path]:
    """The requests that are in force, in their order."""
    below = (run_folder / "removed").glob("[0-9]*")
    return sorted(path for path in below if _NUMBER.fullmatch(path.name))


def in_force(run_folder: Path) -> str:
    """Names the requests that are in force; empty if there are none."""
    names = [path.name for path in folders(run_folder)]
    return digest(names) if names else ""


def read(paths: Iterable[Path]) -> Asked:
    """The entries of lists: what a line is shows by its form, or by the file's name if that is a
    kind's, such as `domains.txt`. Raises `ConfigError` naming every bad line, up to ten."""
    asked, faults = Asked(), []
    for path in paths:
        kind: Kind | None = next((kind for kind in KINDS if path.stem == kind), None)
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
                lists.key(own, entry)
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
    found = [path / f"{kind}.txt" for path in folders(other) for kind in KINDS]
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


class Tombstones:
    """What is in force in a run."""

    def __init__(self, run_folder: Path) -> None:
        named = {kind: _named(run_folder, kind) for kind in KINDS}
        self._lists = Lists.read({STATUS: named})
        self._by_kind = {kind: Lists.read({STATUS: {kind: named[kind]}}) for kind in KINDS}

    def cover(self, pair: Mapping[str, Any], known: Mapping[str, Any] | None) -> bool:
        """Whether a pair must not be asked for, or kept if it is `known` already."""
        if not self._lists:
            return False
        if known is not None and (
            known["status"] == STATUS
            or self.cover_file(known["sha256"], known["final_url"])
            or self.cover_file(known["staged_sha256"])
        ):
            return True
        lists = self._lists
        return bool(lists.reason_of_uid(pair["uid"]) or lists.reason_of_address(pair["url"]))

    def cover_file(self, sha256: bytes, final_url: str = "") -> bool:
        """Whether a file must not be kept, wherever it is from."""
        if not self._lists:
            return False
        digest_listed = any(sha256) and self._lists.reason_of_digest(sha256)
        return bool(digest_listed or (final_url and self._lists.reason_of_address(final_url)))

    def rows(self, outcomes: pa.Table) -> Mask:
        """Which rows of `records.FETCHED` they cover and are not removed yet."""
        covered: Mask = np.logical_or.reduce(list(_hits(self._by_kind, outcomes).values()))
        return covered & _is_not(outcomes, STATUS)


def outcomes(run: Run, columns: Sequence[str] = COLUMNS) -> Iterator[pa.Table]:
    """What the run's downloads know of every pair, some columns of it, file by file."""
    folder = run.stage_folder("download")
    for manifest in everything(folder):
        for output in manifest.outputs:
            if output.name.startswith(("fetched-", "unused-")):
                path = folder / "store" / manifest.store / output.name
                yield pq.read_table(path, columns=list(columns))


def ask(run: Run, asked: Asked, reason: str = "") -> Request:
    """Put a request in force. What the loader and later builds read is there as a whole or not."""
    below = run.folder / "removed"
    private = below / f".{files.attempt_name()}"
    private.mkdir(parents=True)
    try:
        found = _found(run, asked)
        for kind in KINDS:
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
            "entries": {kind: len(asked.entries[kind]) for kind in KINDS},
            "samples": dict(found.samples),
            "unknown": len(found.unknown),
            "fingerprint": fingerprint(run.folder),
        }
        (private / "request.json").write_text(json.dumps(record, indent=1, ensure_ascii=False))
        for path in (*files.walk(private), private):
            files.fsync(path)
        number = _rename(private, below)
    except BaseException:
        shutil.rmtree(private, ignore_errors=True)
        raise
    return Request(number, found.samples, found.unknown)


def _rename(private: Path, below: Path) -> int:
    """The number that a request gets: the first that is free."""
    number = len(folders(below.parent)) + 1
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


def fingerprint(run_folder: Path) -> str:
    """Of the run's packed dataset; empty if there is none."""
    try:
        description = json.loads((run_folder / "pack/out/dataset.json").read_bytes())
    except FileNotFoundError:
        return ""
    return str(description["fingerprint"])


def requests(run_folder: Path) -> list[dict[str, Any]]:
    """`request.json` of all requests, in their order."""
    return [json.loads((path / "request.json").read_bytes()) for path in folders(run_folder)]


def uids(run_folder: Path) -> list[str]:
    """All pairs that were asked for or found, hexadecimal, ascending."""
    named = (path.read_text().split() for path in _named(run_folder, "uids"))
    return sorted({uid for each in named for uid in each})


def redacted(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A row of `records.FETCHED` without what it is about: the digests stay, to know it by, and the
    host. `names` are all columns."""
    host = re.match(r"https?://[^/?#]*", row["url"])
    kept = {"uid", "source", "snapshot", "texts", *_DIGESTS}
    blank = {str: "", bytes: b"", int: 0, float: 0.0}
    result = {name: row[name] if name in kept else blank.get(type(row[name])) for name in names}
    # Where the picture was, and when: nobody asks for it any more.
    return {**result, "url": f"{host[0]}/" if host else "", "status": STATUS}


@dataclass
class _Found:
    entries: dict[Kind, set[str]] = field(default_factory=lambda: {kind: set() for kind in KINDS})
    samples: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)


def _found(run: Run, asked: Asked) -> _Found:
    """What the entries are in this run."""
    found = _Found()
    given = {kind: _lists(kind, asked.entries[kind]) for kind in KINDS}
    met: dict[Kind, set[int]] = {kind: set() for kind in KINDS}
    pictures: set[bytes] = set()
    for table in outcomes(run):
        hits = _hits(given, table)
        has_picture = ~_is_not(table, "ok")
        for kind, mask in hits.items():
            found.samples[kind] += int((mask & has_picture).sum())
            met[kind].update(_keys_of(kind, table.filter(pa.array(mask))))
        found.samples["removed before"] += int(
            (np.logical_or.reduce(list(hits.values())) & ~_is_not(table, STATUS)).sum()
        )
        named = table.filter(pa.array(hits["addresses"] | hits["sha256"] | hits["uids"]))
        for name in _DIGESTS:
            pictures.update(named[name].to_pylist())
    pictures.discard(bytes(32))
    found.entries["sha256"] = {sha256.hex() for sha256 in pictures}
    of_pictures = pa.array(sorted(pictures), pa.binary(32))
    for table in outcomes(run):
        same = np.zeros(len(table), np.bool_)
        for name in _DIGESTS:
            same |= pc.is_in(table[name], value_set=of_pictures).to_numpy()
        hits = _hits(given, table)
        same |= hits["addresses"] | hits["uids"]
        left = _is_not(table, STATUS)
        found.entries["addresses"].update(table.filter(pa.array(same & left))["url"].to_pylist())
        gone = (same | hits["domains"]) & left
        found.samples["in all"] += int((gone & ~_is_not(table, "ok")).sum())
        for uid in table.filter(pa.array(gone))["uid"].to_pylist():
            found.entries["uids"].add(uid.hex())
    for kind in KINDS:
        entries = asked.entries[kind]
        found.unknown += [name for name in entries if lists.key(kind, name) not in met[kind]]
    return found


_DIGESTS = ("sha256", "staged_sha256")


def _named(run_folder: Path, kind: Kind) -> list[Path]:
    return [p for folder in folders(run_folder) if (p := folder / f"{kind}.txt").exists()]


def _lists(kind: Kind, entries: Iterable[str]) -> Lists:
    keys = np.unique(np.array([lists.key(kind, entry) for entry in entries], np.uint64))
    return Lists([(STATUS, kind, keys)])


def _hits(by_kind: Mapping[Kind, Lists], table: pa.Table) -> dict[Kind, Mask]:
    """The rows that the lists of each kind name."""
    address, domain = by_kind["addresses"], by_kind["domains"]
    masks: dict[Kind, Mask] = {kind: np.zeros(len(table), np.bool_) for kind in KINDS}
    for name in ("url", "final_url"):
        urls = table[name].fill_null("")
        masks["addresses"] |= address.codes_of_addresses(urls) > 0
        masks["domains"] |= domain.codes_of_addresses(urls) > 0
    for name in _DIGESTS:
        masks["sha256"] |= by_kind["sha256"].codes_of_digests(table[name]) > 0
    masks["uids"] |= by_kind["uids"].codes_of_uids(table["uid"]) > 0
    return masks


def _keys_of(kind: Kind, table: pa.Table) -> Iterator[int]:
    """What `lists.key` gives for whatever could have named these rows."""
    if kind in ("addresses", "domains"):
        names = {*table["url"].to_pylist(), *table["final_url"].to_pylist()}
        if kind == "domains":
            hosts = [(urlsplit(name).hostname or "").split(".") for name in names]
            names = {".".join(host[first:]) for host in hosts for first in range(len(host))}
    elif kind == "sha256":
        names = {digest.hex() for name in _DIGESTS for digest in table[name].to_pylist()}
    else:
        names = {uid.hex() for uid in table["uid"].to_pylist()}
    for name in names:
        try:
            yield lists.key(kind, name)
        except ValueError:
            continue  # no entry of a list could have said so


def _is_not(table: pa.Table, status: str) -> Mask:
    mask: Mask = pc.not_equal(table["status"], status).to_numpy()
    return mask

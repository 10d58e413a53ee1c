"""What somebody asked to have removed: tombstones, which every later build of the run honours.

RUN/removed/000001/, 000002/, …: one folder a request, made complete under another name and then
renamed, so that it is in force as a whole or not there; of two requests at the same time each gets
a number. In it: `addresses.txt`, `domains.txt`, `sha256.txt`, `uids.txt`, `perceptual.txt`, lists
as `lists` reads them, and `request.json`: who, when, why, and what was found. `removal`
makes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build.extract.urls import canonical
from dataset_build.list_entries import Kind
from dataset_build.lists import Lists
from pipeline import files
from pipeline.manifest import everything
from pipeline.stage import Run

STATUS = "removed"
"""Of a pair in `fetched-*.parquet` whose picture, text and address are gone."""

KINDS: tuple[Kind, ...] = ("addresses", "domains", "sha256", "uids")
LISTS: tuple[Kind, ...] = (*KINDS, "perceptual")
"""What a request has a file for."""
COLUMNS = ("uid", "url", "final_url", "status", "sha256", "staged_sha256")
"""Of `records.FETCHED`: what entries may name."""
DONE = "done.json"
"""In RUN/removed: the requests that were carried out."""
RECORD = "request.json"
_NUMBER = re.compile(r"\d{6,}")
_HOST = re.compile(r"https?://[^/?#]*", re.IGNORECASE)

Mask = npt.NDArray[np.bool_]


def folders(run_folder: Path) -> list[Path]:
    """The requests that are in force, in their order."""
    below = (run_folder / "removed").glob("[0-9]*")
    return sorted(path for path in below if _NUMBER.fullmatch(path.name))


def in_force(run_folder: Path) -> dict[str, str]:
    """The requests that are in force: their numbers, and digests of what they are."""
    return {path.name: files.sha256(path / RECORD) for path in folders(run_folder)}


def carried_out(run_folder: Path) -> dict[str, str]:
    """The requests that were carried out, as `in_force` has them; also those that are gone."""
    try:
        done = json.loads((run_folder / "removed" / DONE).read_bytes())
    except FileNotFoundError:
        return {}
    return dict(done["carried_out"])


class Tombstones:
    """What is in force in a run, or some requests of it."""

    def __init__(self, run_folder: Path, requests: Collection[str] | None = None) -> None:
        named = {kind: _named(run_folder, kind, requests) for kind in KINDS}
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
        covered: Mask = np.logical_or.reduce(list(hits(self._by_kind, outcomes).values()))
        return covered & is_not(outcomes, STATUS)


def looks(run_folder: Path) -> npt.NDArray[np.uint64]:
    """Perceptual hashes of pictures that were asked for, uint64 [hashes, 4], first bits first."""
    return Lists.read({STATUS: {"perceptual": _named(run_folder, "perceptual")}}).perceptual[0]


def outcomes(run: Run, columns: Sequence[str] = COLUMNS) -> Iterator[pa.Table]:
    """What the run's downloads know of every pair, some columns of it, file by file."""
    folder = run.stage_folder("download")
    for manifest in everything(folder):
        for output in manifest.outputs:
            if output.name.startswith(("fetched-", "unused-")):
                path = folder / "store" / manifest.store / output.name
                yield pq.read_table(path, columns=list(columns))


def fingerprint(run_folder: Path) -> str:
    """Of the run's packed dataset; empty if there is none."""
    try:
        description = json.loads((run_folder / "pack/out/dataset.json").read_bytes())
    except FileNotFoundError:
        return ""
    return str(description["fingerprint"])


def requests(run_folder: Path) -> list[dict[str, Any]]:
    """`request.json` of all requests, in their order."""
    return [request(run_folder, path.name) for path in folders(run_folder)]


def request(run_folder: Path, number: str) -> dict[str, Any]:
    """`request.json` of one."""
    found: dict[str, Any] = json.loads((run_folder / "removed" / number / RECORD).read_bytes())
    return found


def uids(run_folder: Path, requests: Collection[str] | None = None) -> list[str]:
    """All pairs that were asked for or found, hexadecimal, ascending; or by some requests."""
    named = (path.read_text().split() for path in _named(run_folder, "uids", requests))
    return sorted({uid for each in named for uid in each})


def also_found(run_folder: Path, request: str, more: Iterable[bytes]) -> None:
    """Add pairs to a request that were fetched while it was made, so that loaders know them."""
    known = uids(run_folder, [request])
    both = sorted({*known, *(uid.hex() for uid in more)})
    if both != known:
        path = run_folder / "removed" / request / "uids.txt"
        files.write_atomic(path, "".join(f"{uid}\n" for uid in both))


def redacted(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A row of `records.FETCHED` without what it is about: the digests stay, to know it by, and the
    host. `names` are all columns."""
    kept = {"uid", "source", "snapshot", "texts", *DIGESTS}
    blank = {str: "", bytes: b"", int: 0, float: 0.0}
    result = {name: row[name] if name in kept else blank.get(type(row[name])) for name in names}
    # Where the picture was, and when: nobody asks for it any more.
    return {**result, "url": _host(row["url"]), "status": STATUS}


def _host(url: str) -> str:
    """An address without anything below its host."""
    host = _HOST.match(url)
    return f"{host[0]}/" if host else ""


DIGESTS = ("sha256", "staged_sha256")


def _named(run_folder: Path, kind: Kind, requests: Collection[str] | None = None) -> list[Path]:
    return [
        path
        for folder in folders(run_folder)
        if (requests is None or folder.name in requests)
        and (path := folder / f"{kind}.txt").exists()
    ]


def hits(by_kind: Mapping[Kind, Lists], table: pa.Table) -> dict[Kind, Mask]:
    """The rows that the lists of each kind name."""
    address, domain = by_kind["addresses"], by_kind["domains"]
    masks: dict[Kind, Mask] = {kind: np.zeros(len(table), np.bool_) for kind in KINDS}
    for urls in (table["url"], _moved(table)) if address or domain else ():
        masks["addresses"] |= address.codes_of_addresses(urls) > 0
        masks["domains"] |= domain.codes_of_addresses(urls) > 0
    for name in DIGESTS:
        masks["sha256"] |= by_kind["sha256"].codes_of_digests(table[name]) > 0
    masks["uids"] |= by_kind["uids"].codes_of_uids(table["uid"]) > 0
    return masks


def _moved(table: pa.Table) -> pa.Array:
    """Where redirects ended, as lists know addresses, for a server may spell its own in any way;
    "" for pairs without one."""
    urls = np.full(len(table), "", object)
    moved = pc.not_equal(table["final_url"], table["url"]).fill_null(False).to_numpy()
    ends = table["final_url"].filter(pa.array(moved)).to_pylist()
    for row, url in zip(np.flatnonzero(moved), ends, strict=True):
        # One that is too long is of a domain still.
        urls[row] = canonical(url)[0] or canonical(_host(url))[0]
    return pa.array(urls, pa.string())


def is_not(table: pa.Table, status: str) -> Mask:
    """The rows with another status."""
    mask: Mask = pc.not_equal(table["status"], status).to_numpy()
    return mask

"""What must not be in a dataset: addresses, domains, files, pictures and pairs that lists name.

A list is a text file of one entry a line; `#` begins a comment. It may be gzipped (`.gz`), or a
parquet file with a column of its kind's name. Entries become 64-bit hashes, sorted: 8 bytes each,
80 MB for ten million. A run keeps them in RUN/lists/, where all its processes map the same pages.
Of 10⁹ rows one is taken for one of ten million entries with a probability of 5·10⁻⁴.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from dataset_build import domains
from dataset_build.extract.urls import canonical, canonical_host
from dataset_build.hashing import U64
from dataset_build.list_entries import (
    Kind,
    address_key,
    address_keys,
    key_of,
    keys_of,
    keys_of_file,
    uid_keys,
    words_of,
)
from pipeline import files
from pipeline.config import MissingInput, Settings, UserError
from pipeline.stage import Attempt, Run, Task

Codes = npt.NDArray[np.uint8]
_KEYS = 2  # raise it when the same entry becomes another key


class ListSettings(Settings):
    """Files of entries, by kind; a pattern is a path with wildcards."""

    addresses: tuple[str, ...] = ()
    """Addresses of pictures, http or https; either stands for both."""
    domains: tuple[str, ...] = ()
    """Domains or hosts; each covers everything below it. A public suffix (`co.uk`) is refused."""
    sha256: tuple[str, ...] = ()
    """SHA-256 of files as their servers send them, 64 hexadecimal digits."""
    perceptual: tuple[str, ...] = ()
    """Perceptual hashes (PDQ) of pictures, 64 hexadecimal digits."""
    uids: tuple[str, ...] = ()
    """Pairs, 32 hexadecimal digits."""


class ListsSettings(Settings):
    """Lists of what must not be fetched or kept. Who changes a list changes the next build."""

    blocked: ListSettings = Field(default_factory=ListSettings)
    """What must never be in a dataset: known abuse, malware, other people's blocklists."""
    opted_out: ListSettings = Field(default_factory=ListSettings)
    """What its owners have asked you to leave alone."""


def reading(run: Run, tasks: Iterable[Task], *kinds: Kind) -> list[Task]:
    """The tasks, made to read the lists of these kinds that the run's settings name.

    The lists go last in `reads`; `params["lists"]` says what each is, with the digest of all of it,
    so a task is done again if a list that it reads has changed, and only then.
    """
    settings: ListsSettings = run.settings("lists")
    references: list[str] = []
    about: list[tuple[str, Kind, str]] = []
    for reason in type(settings).model_fields:
        for kind in kinds:
            found: set[str] = set()
            for pattern in getattr(getattr(settings, reason), kind):
                try:
                    found.update(run.find(pattern))
                except MissingInput as error:
                    raise MissingInput(f"lists.{reason}.{kind}: {error}") from None
            for reference in sorted(found):
                references.append(reference)
                about.append((reason, kind, files.sha256(run.path(reference))))
    if not references:
        return list(tasks)
    return [
        replace(
            task,
            reads=(*task.reads, *references),
            params={**task.params, "lists": [list(each) for each in about]},
        )
        for task in tasks
    ]


class Lists:
    """Whether something is listed, and why: the first reason of those that `read` was given."""

    def __init__(self, entries: Iterable[tuple[str, Kind, npt.NDArray[np.uint64]]]) -> None:
        self.reasons: tuple[str, ...] = ("",)
        """What the codes that `codes_of_…` give stand for; 0 is "not listed"."""
        self._entries: dict[Kind, list[tuple[int, npt.NDArray[np.uint64]]]] = {
            kind: [] for kind in get_args(Kind)
        }
        for reason, kind, keys in entries:
            if reason not in self.reasons:
                self.reasons += (reason,)
            if len(keys):
                self._entries[kind].append((self.reasons.index(reason), keys))

    @classmethod
    def of(cls, attempt: Attempt) -> Lists:
        """What the task reads, by `reading`."""
        about = attempt.task.params.get("lists", [])
        paths = attempt.inputs()[len(attempt.task.reads) - len(about) :]
        cache = attempt.run.folder / "lists"
        return cls(
            (reason, kind, _kept(cache, kind, path, sha256))
            for (reason, kind, sha256), path in zip(about, paths, strict=True)
        )

    @classmethod
    def read(cls, named: Mapping[str, Mapping[Kind, Sequence[Path]]]) -> Lists:
        """Files by reason and kind. Raises `ConfigError` that names bad lines."""
        return cls(
            (reason, kind, keys_of_file(path, kind))
            for reason, by_kind in named.items()
            for kind, paths in by_kind.items()
            for path in paths
        )

    def __bool__(self) -> bool:
        return any(self._entries.values())

    def reason_of_address(self, url: str) -> str:
        """Why this address, in any spelling, must not be asked; "" if it may."""
        codes = []
        if self._entries["addresses"] and (address := canonical(url)[0]):
            codes.append(self._code("addresses", address_key(address)))
        if self._entries["domains"]:
            try:
                host = urlsplit(url).hostname or ""
            except ValueError:
                host = ""
            # A server may have a name that none should have, as `_a.example`, below one that is
            # listed.
            host = canonical_host(host) or host.lower().rstrip(".")
            while "." in host:
                codes.append(self._code("domains", key_of(host)))
                host = host.partition(".")[2]
        return self.reasons[min(filter(None, codes), default=0)]

    def reason_of_digest(self, sha256: bytes) -> str:
        """Why the file with this digest must not be kept; "" if it may."""
        return self.reasons[self._code("sha256", int.from_bytes(sha256[:8], "big"))]

    def reason_of_uid(self, uid: bytes) -> str:
        """Why this pair must not be kept; "" if it may."""
        (key,) = uid_keys(np.frombuffer(uid, ">u8")[None]).tolist()
        return self.reasons[self._code("uids", key)]

    def codes_of_addresses(self, urls: pa.Array | pa.ChunkedArray) -> Codes:
        """For canonical addresses, as in `records.CANDIDATES`: uint8 [rows], see `reasons`."""
        codes = np.zeros(len(urls), np.uint8)
        if self._entries["addresses"]:
            codes = self._codes("addresses", address_keys(urls))
        if self._entries["domains"]:
            hosts = domains.hosts(urls)
            of_hosts = self._host_codes(hosts.dictionary.to_pylist())
            codes = _either(codes, of_hosts[hosts.indices.to_numpy()])
        return codes

    def codes_of_digests(self, column: pa.Array | pa.ChunkedArray) -> Codes:
        """For SHA-256 digests, binary(32): uint8 [rows], see `reasons`."""
        return self._codes("sha256", words_of(column, 4)[:, 0])

    def codes_of_uids(self, column: pa.Array | pa.ChunkedArray) -> Codes:
        """For uids, binary(16): uint8 [rows], see `reasons`."""
        return self._codes("uids", uid_keys(words_of(column, 2)))

    @property
    def perceptual(self) -> tuple[U64, Codes]:
        """All perceptual hashes, uint64 [entries, 4], first bits first; uint8 [entries] reasons."""
        own = self._entries["perceptual"]
        hashes = np.concatenate([np.empty((0, 4), np.uint64), *(keys for _, keys in own)])
        codes = [np.full(len(keys), code, np.uint8) for code, keys in own]
        return hashes, np.concatenate([np.empty(0, np.uint8), *codes])

    def _code(self, kind: Kind, key: int) -> int:
        """As `_codes` of one key, without arrays: it is asked for every address on its way."""
        wanted = np.uint64(key)
        codes = []
        for code, entries in self._entries[kind]:
            place = int(entries.searchsorted(wanted))
            if place < len(entries) and entries[place] == wanted:
                codes.append(code)
        return min(codes, default=0)

    def _host_codes(self, hosts: Sequence[str]) -> Codes:
        """Whether a host or any domain above it is listed."""
        names: list[str] = []
        owners: list[int] = []
        for owner, host in enumerate(hosts):
            while "." in host:
                names.append(host)
                owners.append(owner)
                host = host.partition(".")[2]
        found = self._codes("domains", keys_of(names))
        worst = len(self.reasons)
        first = np.full(len(hosts), worst, np.int64)
        np.minimum.at(first, owners, np.where(found == 0, worst, found).astype(np.int64))
        return np.where(first == worst, 0, first).astype(np.uint8)

    def _codes(self, kind: Kind, keys: U64) -> Codes:
        codes = np.zeros(len(keys), np.uint8)
        for code, entries in self._entries[kind]:
            place = np.minimum(np.searchsorted(entries, keys), len(entries) - 1)
            codes[(entries[place] == keys) & ((codes == 0) | (codes > code))] = code
        return codes


def _either(one: Codes, other: Codes) -> Codes:
    """The first reason of two, row by row."""
    both = np.minimum(one, other)
    return np.where(both > 0, both, np.maximum(one, other))


def _kept(cache: Path, kind: Kind, path: Path, sha256: str) -> npt.NDArray[np.uint64]:
    """The keys of a list, from RUN/lists/ if some task of the run has read it before."""
    name = cache / f"{kind}-{_KEYS}-{sha256}.npy"
    if not name.exists():
        keys = keys_of_file(path, kind)
        if files.sha256(path) != sha256:
            raise UserError(f"{path}: changed since this task was planned; run the command again")
        content = io.BytesIO()
        np.save(content, keys)
        files.write_atomic(name, content.getvalue())
    kept: npt.NDArray[np.uint64] = np.load(name, mmap_mode="r")
    return kept

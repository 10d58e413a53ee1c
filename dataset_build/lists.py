"""What must not be in a dataset: addresses, domains, files, pictures and pairs that lists name.

A list is a text file of one entry a line; `#` begins a comment. It may be gzipped (`.gz`), or a
parquet file with a column of its kind's name. Entries become 64-bit hashes, sorted: 8 bytes each,
80 MB for ten million. A run keeps them in RUN/lists/, where all its processes map the same pages.
Of 10⁹ rows one is taken for one of ten million entries with a probability of 5·10⁻⁴.
"""

from __future__ import annotations

import gzip
import io
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import Field

from dataset_build import domains
from dataset_build.extract.urls import canonical, canonical_host, without_dots
from dataset_build.hashing import U64, mix64
from pipeline import files
from pipeline.config import ConfigError, MissingInput, Settings, UserError
from pipeline.stage import Attempt, Run, Task

Kind = Literal["addresses", "domains", "sha256", "perceptual", "uids"]
Codes = npt.NDArray[np.uint8]

_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "addresses": ("url", "address"),
    "domains": ("domain",),
    "sha256": ("sha256",),
    "perceptual": ("pdq", "perceptual"),
    "uids": ("uid",),
}
_KEYS = 2  # raise it when the same entry becomes another key
_FEW_FAULTS = 10
# One address may be spelled in several ways within the canonical form (RFC 3986, §6.2.2).
_ODD = r"[%|\[\]]"
_ESCAPE = re.compile(r"%[0-9a-fA-F]{2}|[|\[\]]")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


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
            (reason, kind, _keys(path, kind))
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
            codes.append(self._code("addresses", _address_key(address)))
        if self._entries["domains"]:
            try:
                host = urlsplit(url).hostname or ""
            except ValueError:
                host = ""
            # A server may have a name that none should have, as `_a.example`, below one that is
            # listed.
            host = canonical_host(host) or host.lower().rstrip(".")
            while "." in host:
                codes.append(self._code("domains", _hash(host)))
                host = host.partition(".")[2]
        return self.reasons[min(filter(None, codes), default=0)]

    def reason_of_digest(self, sha256: bytes) -> str:
        """Why the file with this digest must not be kept; "" if it may."""
        return self.reasons[self._code("sha256", int.from_bytes(sha256[:8], "big"))]

    def reason_of_uid(self, uid: bytes) -> str:
        """Why this pair must not be kept; "" if it may."""
        (key,) = _uid_keys(np.frombuffer(uid, ">u8")[None]).tolist()
        return self.reasons[self._code("uids", key)]

    def codes_of_addresses(self, urls: pa.Array | pa.ChunkedArray) -> Codes:
        """For canonical addresses, as in `records.CANDIDATES`: uint8 [rows], see `reasons`."""
        codes = np.zeros(len(urls), np.uint8)
        if self._entries["addresses"]:
            codes = self._codes("addresses", _address_keys(urls))
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
        return self._codes("uids", _uid_keys(words_of(column, 2)))

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
        found = self._codes("domains", _hashes(names))
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


def key(kind: Kind, entry: str) -> int:
    """What an entry is known by, but for perceptual ones. Raises `ValueError` if it is none."""
    return _READ[kind](entry)[0]


def _kept(cache: Path, kind: Kind, path: Path, sha256: str) -> npt.NDArray[np.uint64]:
    """The keys of a list, from RUN/lists/ if some task of the run has read it before."""
    name = cache / f"{kind}-{_KEYS}-{sha256}.npy"
    if not name.exists():
        keys = _keys(path, kind)
        if files.sha256(path) != sha256:
            raise UserError(f"{path}: changed since this task was planned; run the command again")
        content = io.BytesIO()
        np.save(content, keys)
        files.write_atomic(name, content.getvalue())
    kept: npt.NDArray[np.uint64] = np.load(name, mmap_mode="r")
    return kept


def _keys(path: Path, kind: Kind) -> npt.NDArray[np.uint64]:
    """Sorted, unique keys of a file's entries: uint64 [entries], or [entries, 4] if perceptual."""
    read, keys = _READ[kind], array("Q")
    faults: list[str] = []
    for place, entry in _entries(path, kind):
        try:
            keys.extend(read(entry))
        except ValueError as error:
            faults.append(f"{path}:{place}: {entry[:80]!r}: {error}")
            if len(faults) == _FEW_FAULTS:
                break
    if faults:
        raise ConfigError("\n".join(faults))
    columns = 4 if kind == "perceptual" else 1
    table = np.frombuffer(keys, np.uint64).reshape(-1, columns)
    return np.unique(table, axis=0) if columns > 1 else np.unique(table[:, 0])


def _entries(path: Path, kind: Kind) -> Iterator[tuple[int, str]]:
    """Lines, or rows of a parquet file, counted from 1, with what they say."""
    if path.suffix == ".parquet":
        with files.open_parquet(path) as parquet:
            names = [name for name in _COLUMNS[kind] if name in parquet.schema_arrow.names]
            if not names:
                expected = " or ".join(_COLUMNS[kind])
                raise ConfigError(f"{path}: a list of {kind} has a column {expected}")
            place = 0
            for batch in parquet.iter_batches(columns=names[:1]):
                for value in batch.column(0).to_pylist():
                    place += 1
                    yield place, value.hex() if isinstance(value, bytes) else str(value)
        return
    place = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for place, line in enumerate(stream, 1):
                # An address's fragment is none of the server's business, so it may go as well.
                entry = line.decode("utf-8-sig" if place == 1 else "utf-8").partition("#")[0]
                if entry := entry.strip():
                    yield place, entry
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}:{place}: cannot be read ({error})") from None


def _read_address(entry: str) -> tuple[int, ...]:
    address, why = canonical(entry)
    if not address:
        raise ValueError(f"not the address of a picture, http://… or https://… ({why})")
    return (_address_key(address),)


def _read_domain(entry: str) -> tuple[int, ...]:
    host = canonical_host(entry)
    if not host or ":" in host:
        raise ValueError("not a domain; one such as example.org covers all hosts below it")
    if domains.is_public_suffix(host):
        raise ValueError("a public suffix: under it there are domains of many owners")
    return tuple(_hashes([host]).tolist())


def _read_sha256(entry: str) -> tuple[int, ...]:
    return _hexadecimal(entry, 4)[:1]


def _read_perceptual(entry: str) -> tuple[int, ...]:
    return _hexadecimal(entry, 4)


def _read_uid(entry: str) -> tuple[int, ...]:
    return tuple(_uid_keys(np.array([_hexadecimal(entry, 2)], np.uint64)).tolist())


_READ: dict[Kind, Callable[[str], tuple[int, ...]]] = {
    "addresses": _read_address,
    "domains": _read_domain,
    "sha256": _read_sha256,
    "perceptual": _read_perceptual,
    "uids": _read_uid,
}


def _hexadecimal(entry: str, words: int) -> tuple[int, ...]:
    if not re.fullmatch(rf"[0-9a-fA-F]{{{16 * words}}}", entry):
        raise ValueError(f"not {16 * words} hexadecimal digits")
    return tuple(int(entry[start : start + 16], 16) for start in range(0, 16 * words, 16))


def _address_key(address: str) -> int:
    """Of a canonical address, whichever its scheme."""
    return _hash(_spelled(address.partition(":")[2]))


def _address_keys(urls: pa.Array | pa.ChunkedArray) -> U64:
    if isinstance(urls, pa.ChunkedArray):
        urls = urls.combine_chunks()
    bare = pc.replace_substring_regex(urls, "^https?:", "")
    names: list[Any] = bare.to_pylist()
    odd = pc.match_substring_regex(bare, _ODD).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(odd):
        names[row] = _spelled(names[row])
    return _hashes(names)


def _spelled(address: str) -> str:
    """//host/path?query with as few escapes as can be, in capitals, brackets and bars escaped, and
    no dot segments that hid in escapes."""

    def spell(match: re.Match[str]) -> str:
        found = match[0]
        if len(found) == 1:
            return f"%{ord(found):02X}"
        plain = chr(int(found[1:], 16))
        return plain if plain in _UNRESERVED else found.upper()

    host, slash, rest = _ESCAPE.sub(spell, address)[2:].partition("/")
    return f"//{host}{without_dots(slash + rest)}"


def _hash(name: str) -> int:
    value: int = xxhash.xxh3_64_intdigest(name.encode(errors="replace"))
    return value


def _hashes(names: Sequence[str]) -> U64:
    return np.fromiter(map(_hash, names), np.uint64, len(names))


def _uid_keys(words: npt.NDArray[Any]) -> U64:
    """[rows, 2] halves -> [rows]. The first half alone would say the same of a whole address."""
    words = words.astype(np.uint64)
    key: U64 = mix64(words[:, 0]) ^ words[:, 1]
    return key


def words_of(column: pa.Array | pa.ChunkedArray, words: int) -> U64:
    """Fixed-size binary of 8 x `words` bytes as big-endian numbers, uint64 [rows, words]."""
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    assert column.type == pa.binary(8 * words), column.type
    assert not column.null_count
    buffer = column.buffers()[1]
    data = np.frombuffer(buffer if buffer is not None else b"", ">u8")
    own = data[words * column.offset : words * (column.offset + len(column))]
    return own.reshape(-1, words).astype(np.uint64)

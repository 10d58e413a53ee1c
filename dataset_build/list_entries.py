"""Entries of lists, and the 64-bit keys by which they are known."""

from __future__ import annotations

import gzip
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from dataset_build import domains
from dataset_build.extract.urls import canonical, canonical_host, without_dots
from dataset_build.hashing import U64, mix64
from pipeline import files
from pipeline.config import ConfigError

Kind = Literal["addresses", "domains", "sha256", "perceptual", "uids"]
_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "addresses": ("url", "address"),
    "domains": ("domain",),
    "sha256": ("sha256",),
    "perceptual": ("pdq", "perceptual"),
    "uids": ("uid",),
}
_FEW_FAULTS = 10
# One address may be spelled in several ways within the canonical form (RFC 3986, §6.2.2).
_ODD = r"[%|\[\]]"
_ESCAPE = re.compile(r"%[0-9a-fA-F]{2}|[|\[\]]")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def key(kind: Kind, entry: str) -> int:
    """What an entry is known by, but for perceptual ones. Raises `ValueError` if it is none."""
    return _READ[kind](entry)[0]


def keys_of_file(path: Path, kind: Kind) -> npt.NDArray[np.uint64]:
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
    return (address_key(address),)


def _read_domain(entry: str) -> tuple[int, ...]:
    host = canonical_host(entry)
    if not host or ":" in host:
        raise ValueError("not a domain; one such as example.org covers all hosts below it")
    if domains.is_public_suffix(host):
        raise ValueError("a public suffix: under it there are domains of many owners")
    return tuple(keys_of([host]).tolist())


def _read_sha256(entry: str) -> tuple[int, ...]:
    return _hexadecimal(entry, 4)[:1]


def _read_perceptual(entry: str) -> tuple[int, ...]:
    return _hexadecimal(entry, 4)


def _read_uid(entry: str) -> tuple[int, ...]:
    return tuple(uid_keys(np.array([_hexadecimal(entry, 2)], np.uint64)).tolist())


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


def address_key(address: str) -> int:
    """Of a canonical address, whichever its scheme."""
    return key_of(_spelled(address.partition(":")[2]))


def address_keys(urls: pa.Array | pa.ChunkedArray) -> U64:
    """Of canonical addresses, as `address_key`: uint64 [rows]."""
    if isinstance(urls, pa.ChunkedArray):
        urls = urls.combine_chunks()
    bare = pc.replace_substring_regex(urls, "^https?:", "")
    names: list[Any] = bare.to_pylist()
    odd = pc.match_substring_regex(bare, _ODD).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(odd):
        names[row] = _spelled(names[row])
    return keys_of(names)


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


def key_of(name: str) -> int:
    """The key of a name: a domain, or an address as it is spelled here."""
    value: int = xxhash.xxh3_64_intdigest(name.encode(errors="replace"))
    return value


def keys_of(names: Sequence[str]) -> U64:
    """`key_of` each: uint64 [names]."""
    return np.fromiter(map(key_of, names), np.uint64, len(names))


def uid_keys(words: npt.NDArray[Any]) -> U64:
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

"""Where every sample's picture and text lie, as arrays, shard by shard."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline import files
from pipeline.config import UserError
from pipeline.manifest import REMOVED, digest

if TYPE_CHECKING:
    import pyarrow as pa  # the loader's workers import this module, not arrow

Bytes = bytes | memoryview

MAX_SAMPLE_BYTES = 256 << 20
"""A sample is read at once, and several at a time."""
_CHUNK = 8 << 20
_CHECKS: tuple[Literal["none", "sha256", "sha256 and xxh3"], ...]
_CHECKS = "none", "sha256", "sha256 and xxh3"
_SHARD = re.compile(r"\w[\w.-]*\.tar", re.ASCII)


class DatasetError(UserError):
    """A dataset that cannot be trained on."""

    exit_code = 4


@dataclass(frozen=True)
class Part:
    """One dataset of an index: consecutive rows, of shards that are its own."""

    name: str
    fingerprint: str
    """Names the content; the order of training depends on it."""
    samples: int
    caption: str = "txt"
    """What the text's bytes are: `txt` the text, `json:FIELD` an object that has it in a field."""
    checks: Literal["none", "sha256", "sha256 and xxh3", "xxh3"] = "none"
    """What `Index.image_check` is: the first 64 bits of SHA-256, or xxh3-64. With the latter, there
    is an xxh3-64 of each text too."""


@dataclass(frozen=True)
class Index:
    """All samples, in the order of shards and of offsets within a shard. Arrays are [samples]."""

    fingerprint: str
    """Names the content; checkpoints depend on it."""
    shards: tuple[str, ...]
    """Paths, or addresses such as s3://bucket/00000.tar."""
    shard: NDArray[np.int32]
    """Position in `shards`."""
    uid: NDArray[np.uint64]
    """[samples, 2]: high and low half of the 128-bit identifier."""
    offset: NDArray[np.int64]
    """Of the sample's first tar header in its shard, bytes."""
    length: NDArray[np.int64]
    """Of all its members with headers and padding, bytes."""
    image_offset: NDArray[np.int64]
    image_bytes: NDArray[np.int64]
    text_offset: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    image_check: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    """Checksums; empty where no part has them. They are cut to 64 bits, which notice damage as well
    and take a quarter of the memory."""
    text_check: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    parts: tuple[Part, ...] = ()
    """The datasets it consists of."""
    read_timeout_s: float = 60.0
    """Most time that one read from a shard may take, further tries included."""
    removed_at: tuple[str, ...] = ()
    """Addresses of lists of samples that are removed, see `train.data.removed`; each may be
    missing, and appear while training goes on."""

    def __post_init__(self) -> None:
        if not self.parts:
            whole = Part("the dataset", self.fingerprint, len(self.shard))
            object.__setattr__(self, "parts", (whole,))

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, sample: int) -> str:
        """The sample's identifier in hexadecimal."""
        high, low = self.uid[sample]
        return f"{int(high):016x}{int(low):016x}"

    def part(self, sample: int) -> Part:
        """The dataset of a row."""
        return self.parts[bisect_right(self._ends, sample)]

    def text(self, sample: int, data: Bytes) -> str:
        """The text in a sample's text bytes. Raises `ValueError` if there is none."""
        return text_of(data, self.part(sample).caption)

    def intact(self, sample: int, image: Bytes, text: Bytes) -> bool:
        """Whether the bytes are those that were checksummed; True where there are no checksums."""
        checks = self.part(sample).checks
        if checks == "none":
            return True
        of_image = xxhash.xxh3_64_intdigest if checks == "xxh3" else short_sha256
        if of_image(image) != int(self.image_check[sample]):
            return False
        return checks == "sha256" or xxhash.xxh3_64_intdigest(text) == int(self.text_check[sample])

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(part.samples for part in self.parts))


def text_of(data: Bytes, caption: str) -> str:
    """The text in the bytes of a member, see `Part.caption`; not blank, or `ValueError`."""
    text: Any = bytes(data).decode()
    kind, _, name = caption.partition(":")
    if kind == "json":
        value = json.loads(text)
        text = value.get(name) if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its text is empty")
    return str(text)


def short_sha256(data: Bytes) -> int:
    """The first 64 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def read_index(index: Path, shards: Mapping[str, str], dataset: Path | None = None) -> Index:
    """Read a packed dataset's `index.parquet`; `shards` maps a shard's file name to where it is.

    `dataset` is `dataset.json`, whose fingerprint names the content; without it the index's own
    bytes do. Raises `DatasetError` if a shard is missing or the index is empty or damaged.
    """
    if dataset is None:
        described = {"fingerprint": files.sha256(index)}
    else:
        described = description(str(dataset), dataset.read_bytes())
    with index.open("rb") as stream:
        return parse_index(str(index), stream, shards, described)


def description(name: str, data: bytes) -> dict[str, Any]:
    """What `dataset.json` says. Raises `DatasetError` if it is not what was written."""
    try:
        described = json.loads(data)
        rest = {key: value for key, value in described.items() if key != "fingerprint"}
        whole = not rest or described["fingerprint"] == digest(rest)
        names = [str(shard["name"]) for shard in rest.get("pairs_by_shard", ())]
    except (ValueError, KeyError, AttributeError, TypeError):
        whole, names = False, []
    if not whole:
        raise DatasetError(f"{name}: its fingerprint is not that of what it says; it is damaged")
    if strange := [shard for shard in names if not _SHARD.fullmatch(shard)]:
        raise DatasetError(f"{name}: {strange[0]!r} is no name of a shard")
    return dict(described)


def parse_index(
    name: str, stream: BinaryIO, shards: Mapping[str, str], described: Mapping[str, Any]
) -> Index:
    """`read_index` of an open file, with what `dataset.json` says; `name` is for messages."""
    if "index" in described:
        found = hashlib.sha256()
        while chunk := stream.read(_CHUNK):
            found.update(chunk)
        if found.hexdigest() != described["index"]["sha256"]:
            raise DatasetError(f"{name}: its bytes differ from those that were packed")
        stream.seek(0)
    fingerprint = str(described["fingerprint"])
    source = files.open_parquet(stream)
    columns = [*_NUMBERS, "uid", "shard"]
    checks = [check for check in ("sha256", "caption_hash") if check in source.schema_arrow.names]
    table = source.read(columns=[*columns, *checks])
    if not table.num_rows:
        raise DatasetError(f"{name}: no samples; see the report for where the pairs were dropped")
    encoded = table["shard"].combine_chunks().dictionary_encode()
    missing = sorted({str(shard) for shard in encoded.dictionary.to_pylist()} - set(shards))
    if missing:
        raise DatasetError(f"{name}: names the shard {missing[0]}, which is not there")
    ordered = sorted(str(shard) for shard in encoded.dictionary.to_pylist())
    rank = {shard: position for position, shard in enumerate(ordered)}
    names = np.array([rank[str(shard)] for shard in encoded.dictionary.to_pylist()], np.int32)
    shard = names[encoded.indices.to_numpy()]
    order = np.lexsort((table["offset"].to_numpy(), shard))
    image_check = text_check = np.empty(0, np.uint64)
    if "sha256" in checks:
        image_check = words_of(table["sha256"])[order, 0]
        if "caption_hash" in checks:
            text_check = table["caption_hash"].to_numpy().astype(np.uint64)[order]
    numbers = {name: values[order] for name, values in numbers_of(table).items()}
    if (row := _misplaced(numbers)) is not None:
        uid = table["uid"].combine_chunks()[int(order[row])].as_py().hex()
        raise DatasetError(f"{name}: {uid} has bytes outside of itself; the index is damaged")
    return Index(
        fingerprint=fingerprint,
        shards=tuple(shards[shard] for shard in ordered),
        shard=shard[order],
        uid=words_of(table["uid"])[order],
        image_check=image_check,
        text_check=text_check,
        parts=(Part("pack", fingerprint, len(order), checks=_CHECKS[len(checks)]),),
        **numbers,
    )


def _misplaced(numbers: Mapping[str, NDArray[np.int64]]) -> int | None:
    """The first row whose picture or text does not lie in it, or which is larger than any is."""
    offset, length = numbers["offset"], numbers["length"]
    wrong = (offset < 0) | (length < 0) | (length > MAX_SAMPLE_BYTES)
    for kind in ("image", "text"):
        at, size = numbers[f"{kind}_offset"], numbers[f"{kind}_bytes"]
        wrong |= (at < offset) | (size < 0) | (at + size > offset + length)
    return int(wrong.argmax()) if wrong.any() else None


def open_dataset(folder: Path) -> Index:
    """The index of a packed dataset's folder: `index.parquet`, `dataset.json`, `shards/*.tar`."""
    shards = {path.name: str(path) for path in sorted((folder / "shards").glob("*.tar"))}
    dataset = folder / "dataset.json"
    index = read_index(folder / "index.parquet", shards, dataset if dataset.exists() else None)
    return replace(index, removed_at=(str(folder / REMOVED),))


def concatenated(indexes: Sequence[Index]) -> Index:
    """One index of the samples of several, one after the other."""
    if len(indexes) == 1:
        return indexes[0]
    shards_before = np.cumsum([0, *(len(index.shards) for index in indexes)])
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(index, name) for index in indexes])
        for name in ("uid", *_NUMBERS)
    }
    for name in ("image_check", "text_check"):
        each = [getattr(index, name) for index in indexes]
        joined[name] = np.concatenate(
            [
                check if len(check) else np.zeros(len(index), np.uint64)
                for check, index in zip(each, indexes, strict=True)
            ]
        )
    shard = [i.shard + n for i, n in zip(indexes, shards_before[:-1].astype(np.int32), strict=True)]
    parts = tuple(part for index in indexes for part in index.parts)
    named = "\n".join(f"{part.name} {part.fingerprint}" for part in parts)
    return Index(
        fingerprint=hashlib.sha256(named.encode()).hexdigest(),
        shards=tuple(shard for index in indexes for shard in index.shards),
        shard=np.concatenate(shard),
        parts=parts,
        removed_at=tuple(address for index in indexes for address in index.removed_at),
        **joined,
    )


_NUMBERS = ("offset", "length", "image_offset", "image_bytes", "text_offset", "text_bytes")


def numbers_of(table: pa.Table) -> dict[str, Any]:
    """The columns that say where bytes lie."""
    return {name: table[name].to_numpy().astype(np.int64) for name in _NUMBERS}


def words_of(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """A column of binary values of one length as 64-bit numbers, [rows, words]."""
    import pyarrow as pa

    words = len(column[0].as_py()) // 8
    fixed = column.cast(pa.binary(8 * words))
    chunks = [
        np.frombuffer(chunk.buffers()[1], ">u8")[words * chunk.offset :][: words * len(chunk)]
        for chunk in fixed.chunks
        if len(chunk)
    ]
    return np.concatenate(chunks).reshape(-1, words).astype(np.uint64)

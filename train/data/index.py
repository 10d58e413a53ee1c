"""Where every sample's picture and text lie: `pack`'s index as arrays, shard by shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import UserError

_COLUMNS = [
    "uid",
    "shard",
    "offset",
    "length",
    "image_offset",
    "image_bytes",
    "text_offset",
    "text_bytes",
]


class DatasetError(UserError):
    """A dataset that cannot be trained on."""

    exit_code = 4


@dataclass(frozen=True)
class Index:
    """All samples, in the order of shards and of offsets within a shard. Arrays are [samples]."""

    fingerprint: str
    """Names the content; the order of training depends on it."""
    shards: tuple[Path, ...]
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

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, sample: int) -> str:
        """The sample's identifier in hexadecimal, as its members in the shard are called."""
        high, low = self.uid[sample]
        return f"{int(high):016x}{int(low):016x}"


def read_index(index: Path, shards: Mapping[str, Path], dataset: Path | None = None) -> Index:
    """Read `index.parquet`; `shards` maps a shard's file name to where it is.

    `dataset` is `dataset.json`, whose fingerprint names the content; without it the index's own
    bytes do. Raises `DatasetError` if a shard is missing or the index is empty.
    """
    import pyarrow.parquet as pq  # not above: the loader's workers import this module, not arrow

    table = pq.read_table(index, columns=_COLUMNS)
    if not table.num_rows:
        raise DatasetError(f"{index}: no samples; see the report for where the pairs were dropped")
    encoded = table["shard"].combine_chunks().dictionary_encode()
    names = [str(name) for name in encoded.dictionary.to_pylist()]
    missing = sorted(set(names) - set(shards))
    if missing:
        raise DatasetError(f"{index}: names the shard {missing[0]}, which is not there")
    ordered = sorted(names)
    rank = {name: position for position, name in enumerate(ordered)}
    shard = np.array([rank[name] for name in names], np.int32)[encoded.indices.to_numpy()]
    numbers = {
        name: table[name].to_numpy().astype(np.int64)
        for name in _COLUMNS
        if name not in ("uid", "shard")
    }
    order = np.lexsort((numbers["offset"], shard))
    uids: list[bytes] = table["uid"].to_pylist()
    uid = np.frombuffer(b"".join(uids), ">u8").reshape(-1, 2)
    return Index(
        fingerprint=_fingerprint(index, dataset),
        shards=tuple(Path(shards[name]) for name in ordered),
        shard=shard[order],
        uid=uid.astype(np.uint64)[order],
        **{name: values[order] for name, values in numbers.items()},
    )


def open_dataset(folder: Path) -> Index:
    """The index of a packed dataset's folder: `index.parquet`, `dataset.json`, `shards/*.tar`."""
    shards = {path.name: path for path in sorted((folder / "shards").glob("*.tar"))}
    dataset = folder / "dataset.json"
    return read_index(folder / "index.parquet", shards, dataset if dataset.exists() else None)


def _fingerprint(index: Path, dataset: Path | None) -> str:
    if dataset is not None:
        return str(json.loads(dataset.read_bytes())["fingerprint"])
    return hashlib.sha256(index.read_bytes()).hexdigest()

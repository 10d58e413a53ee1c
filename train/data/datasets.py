"""The datasets of a configuration: found, scanned where they have no index, joined to one.

What a scan found is kept in RUN/train/index/NAME, a file for every few shards, so that a scan that
was stopped goes on and a dataset that grows is scanned where it is new. A file holds as long as the
names, sizes and times of its shards do; the time is a hint only, which a copy may lack.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import files
from pipeline.config import ConfigError
from pipeline.local import die_with_parent
from pipeline.manifest import REMOVED, digest
from pipeline.stage import Attempt
from pipeline.stop import shielded
from pipeline.tar import BrokenTar
from train.data import storage
from train.data.index import (
    DatasetError,
    Index,
    Part,
    concatenated,
    description,
    numbers_of,
    parse_index,
    words_of,
)
from train.data.scan import PICTURES, SCANNED, Scan, scan
from train.data.storage import Shard
from train.settings import DatasetSettings, DataSettings

log = logging.getLogger(__name__)

Map = Callable[..., Iterable["Scan | BrokenTar"]]
"""`map`, in this process or in others."""

_FORMAT = 1
"""Of the files; another one makes them anew."""
_SHARDS_A_FILE = 64
_AT_ONCE = 256 << 20
"""Bytes of shards that are scanned sooner than other processes start."""
_SAY_EVERY_S = 15.0


@dataclass(frozen=True)
class Listing:
    """What a dataset's path stands for."""

    shards: tuple[Shard, ...]
    packed: str = ""
    """Address of the folder with `index.parquet`; empty if the shards have no index."""
    described: Mapping[str, Any] = field(default_factory=dict)
    """A packed dataset's `dataset.json`."""

    def identity(self) -> dict[str, Any]:
        """Names the content for fingerprints: JSON values."""
        if self.packed:
            return {"packed": str(self.described["fingerprint"])}
        rows = [[n, s.bytes, s.stamp] for n, s in zip(self.names(), self.shards, strict=True)]
        return {"shards": len(rows), "listing": digest(rows)}

    def names(self) -> list[str]:
        """The shards' names below the deepest folder that has all of them.

        They are the same wherever the dataset is moved to as a whole.
        """
        paths = [shard.address.split("/") for shard in self.shards]
        levels = zip(*(path[:-1] for path in paths), strict=False)
        shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
        return ["/".join(path[shared:]) for path in paths]


def listing(dataset: DatasetSettings, timeout_s: float) -> Listing:
    """Look at what is there. Raises `MissingInput` if nothing is, and `ConfigError` for a part of
    a packed dataset."""
    folder = dataset.path.rstrip("/")
    if not any(c in folder for c in "*?[{") and not folder.endswith(".tar"):
        if not storage.is_remote(folder):
            folder = str(Path(folder).expanduser())
        if storage.exists(f"{folder}/index.parquet", timeout_s=timeout_s):
            address = f"{folder}/dataset.json"
            described = description(address, storage.fetch(address, timeout_s=timeout_s))
            shards = tuple(
                Shard(f"{folder}/shards/{shard['name']}", shard["bytes"], "")
                for shard in described["pairs_by_shard"]
            )
            return Listing(shards, folder, described)
    shards = tuple(storage.find(dataset.path, timeout_s=timeout_s))
    for place in {shard.address.rpartition("/")[0] for shard in shards}:
        above, _, name = place.rpartition("/")
        if name == "shards" and storage.exists(f"{above}/index.parquet", timeout_s=timeout_s):
            raise ConfigError(
                f"{dataset.path}: tars of a packed dataset; name its folder {above}, else what is"
                f" removed from it, see {REMOVED} there, would be trained on"
            )
    return Listing(shards)


def open_datasets(attempt: Attempt, rank: int, world: int) -> Index:
    """One index of all datasets of the configuration, in their order.

    Where they must be scanned, the processes share the work: each begins at another place and scans
    what is not there yet, so none waits for another.
    """
    data: DataSettings = attempt.settings.data
    indexes = []
    for name, dataset in data.datasets.items():
        found = listing(dataset, data.read_timeout_s)
        if found.identity() != attempt.task.params["datasets"][name]:
            raise DatasetError(f"{name}: {dataset.path} has changed since the start; start again")
        if found.packed:
            index = _packed(name, found)
        else:
            index = _Scanned(attempt, name, found, rank / world).index()
        log.info("%s: %d samples in %d shards", name, len(index), len(index.shards))
        indexes.append(index)
    return replace(concatenated(indexes), read_timeout_s=data.read_timeout_s)


def _packed(name: str, found: Listing) -> Index:
    shards = {Path(shard.address).name: shard.address for shard in found.shards}
    address = f"{found.packed}/index.parquet"
    with storage.opened(address) as stream:
        index = parse_index(address, stream, shards, found.described)
    part = replace(index.parts[0], name=name)
    return replace(index, parts=(part,), removed_at=(f"{found.packed}/{REMOVED}",))


class _Scanned:
    """A dataset without an index, and the files with what its scan found."""

    def __init__(self, attempt: Attempt, name: str, found: Listing, begin: float) -> None:
        self._attempt = attempt
        self._data: DataSettings = attempt.settings.data
        self._name = name
        self._caption = self._data.datasets[name].caption
        self._found = found
        self._begin = begin
        """Where among the files to begin, 0 to 1."""
        self._folder = attempt.run.stage_folder("train") / "index" / name
        self._broken: dict[str, str] = {}

    def index(self) -> Index:
        """Scan what was not scanned yet, and read all of it."""
        shards, names = self._found.shards, self._found.names()
        starts = range(0, len(shards), _SHARDS_A_FILE)
        paths = [
            self._path(start, names[start:][:_SHARDS_A_FILE], shards[start:][:_SHARDS_A_FILE])
            for start in starts
        ]
        self._complete(paths, names)
        for stale in set(self._folder.glob("*.parquet")) - set(paths):
            stale.unlink(missing_ok=True)
        tables = [pq.read_table(path) for path in paths]
        left_out: Counter[str] = Counter()
        for table in tables:
            left_out.update(json.loads(table.schema.metadata[b"left_out"]))
        samples = sum(table.num_rows for table in tables)
        if left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
            log.warning("%s: left out of %d samples: %s",
                        self._name, samples + left_out.total(), reasons)  # fmt: skip
        if not samples:
            wanted = f"a picture ({', '.join(PICTURES)}) and a text ({self._caption})"
            raise DatasetError(
                f"{self._name}: {self._found.shards[0].address} and {len(shards) - 1} more hold "
                f"no sample with {wanted}: {dict(left_out)}; set "
                f"train.data.datasets.{self._name}.caption if the text is elsewhere"
            )
        return self._joined(tables, list(starts))

    def _path(self, start: int, names: Sequence[str], shards: Sequence[Shard]) -> Path:
        rows = [[name, s.bytes, s.stamp] for name, s in zip(names, shards, strict=True)]
        key = digest([_FORMAT, self._caption, self._data.checksums, rows])
        return self._folder / f"{start:07d}-{key[:16]}.parquet"

    def _complete(self, paths: Sequence[Path], names: Sequence[str]) -> None:
        """Make the files that are missing."""
        done = sum(path.exists() for path in paths)
        if done < len(paths):
            log.info("%s: scanning %d shards", self._name,
                     len(names) - _SHARDS_A_FILE * done)  # fmt: skip
        first = int(self._begin * len(paths))
        said = time.monotonic()
        total = sum(shard.bytes for shard in self._found.shards)
        workers = self._data.workers if done < len(paths) and total > _AT_ONCE else 0
        with _processes(workers) as each:
            for turn in range(len(paths)):
                number = (first + turn) % len(paths)
                path = paths[number]
                if not path.exists():
                    self._scan(path, number * _SHARDS_A_FILE, names, each)
                metadata = pq.read_schema(path).metadata
                self._leave_out(json.loads(metadata[b"broken"]))
                shards = min((turn + 1) * _SHARDS_A_FILE, len(names))
                self._attempt.progress(shards, len(names), "shards")
                if time.monotonic() - said > _SAY_EVERY_S:
                    log.info("%s: %d of %d shards scanned", self._name, shards, len(names))
                    said = time.monotonic()

    def _scan(self, path: Path, start: int, names: Sequence[str], each: Map) -> None:
        """Scan the shards of one file, and publish it."""
        data = self._data
        once = partial(
            _scan_or_broken,
            caption=self._caption,
            checksums=data.checksums,
            timeout_s=data.read_timeout_s,
        )
        shards = self._found.shards[start:][:_SHARDS_A_FILE]
        tables, broken = [SCANNED.empty_table()], {}
        left_out: Counter[str] = Counter()
        for found in each(once, shards, names[start:], range(len(shards))):
            self._attempt.stop.check()
            if isinstance(found, BrokenTar):
                broken[str(found).partition(": broken")[0]] = str(found)
                continue
            tables.append(found.samples)
            left_out.update(found.left_out)
        metadata = {"left_out": json.dumps(left_out), "broken": json.dumps(broken)}
        sink = pa.BufferOutputStream()
        table = pa.concat_tables(tables).replace_schema_metadata(metadata)
        pq.write_table(table, sink, compression="zstd")
        files.write_atomic(path, sink.getvalue().to_pybytes())

    def _leave_out(self, broken: dict[str, str]) -> None:
        for reason in broken.values():
            log.warning("%s; it is left out", reason)
        self._broken |= broken
        if len(self._broken) > self._data.max_broken_shards:
            reasons = "\n  ".join(self._broken.values())
            raise DatasetError(
                f"{reasons}\n  replace it, or let train.data.max_broken_shards be at least "
                f"{len(self._broken)}"
            )

    def _joined(self, tables: Sequence[pa.Table], starts: Sequence[int]) -> Index:
        numbers = [
            t["shard"].to_numpy().astype(np.int32) + s for t, s in zip(tables, starts, strict=True)
        ]
        table = pa.concat_tables(tables)
        uid = words_of(table["uid"])
        columns = numbers_of(table)
        text_check = table["text_check"].to_numpy()
        # With checksums or without, it is the same dataset: pictures count by their sizes.
        content = hashlib.sha256(self._caption.encode())
        for values in (uid, columns["image_bytes"], columns["text_bytes"], text_check):
            content.update(np.ascontiguousarray(values).data)
        fingerprint = content.hexdigest()
        part = Part(self._name, fingerprint, len(uid), self._caption,
                    "xxh3" if self._data.checksums else "none")  # fmt: skip
        return Index(
            fingerprint=fingerprint,
            shards=tuple(shard.address for shard in self._found.shards),
            shard=np.concatenate(numbers),
            uid=uid,
            image_check=table["image_check"].to_numpy(),
            text_check=text_check,
            parts=(part,),
            **columns,
        )


def _scan_or_broken(
    shard: Shard, name: str, number: int, *, caption: str, checksums: bool, timeout_s: float
) -> Scan | BrokenTar:
    try:
        return scan(shard, name, number, caption=caption, checksums=checksums, timeout_s=timeout_s)
    except BrokenTar as error:
        return error


@contextmanager
def _processes(count: int) -> Iterator[Map]:
    """`map` over as many processes, or in this one if there are none."""
    if not count:
        yield map
        return
    with shielded():
        resource_tracker.ensure_running()  # by itself it would unblock signals as it starts
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), _begin_scanning, (os.getpid(),)
    )

    def started(*work: Any) -> Iterator[Any]:
        with shielded():  # tasks are handed over, and processes started, at once
            return pool.map(*work)

    try:
        yield started
    except BrokenProcessPool:
        raise DatasetError("a process that scanned shards was killed; start again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_scanning(parent: int) -> None:
    """A process ends with the one that started it; until then, that one decides when to stop."""
    os.environ["OPENWIT_PARENT"] = str(parent)
    die_with_parent()

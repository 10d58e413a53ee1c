"""Pictures of evaluation sets.

A set is what the user names: folders or patterns of picture files, tars (WebDataset's too), parquet
files with columns of encoded pictures. Its pictures go through the same resizer as the pool's, so
that a copy in the pool differs by no more than its encoding. What is named and holds no picture is
an error: a set that is not looked for would be taken for one that is not there.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build import records
from dataset_build.download import DownloadSettings, probe
from dataset_build.screen import perceptual
from dataset_build.screen.near import MIN_QUALITY
from pipeline import files, tar
from pipeline.config import ConfigError, MissingInput
from pipeline.stage import Attempt, Run
from pipeline.stats import Stats

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jpe")
_PACKED = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_FIRST = 16  # values of a column that show whether it has pictures

Resize = Callable[[bytes], bytes]


def find(run: Run, name: str, patterns: tuple[str, ...]) -> list[str]:
    """References to a set's files. Raises `MissingInput` or `ConfigError` naming the setting."""
    found: set[str] = set()
    for pattern in patterns:
        folder = Path(pattern).expanduser()
        if folder.is_dir():
            files_there = _walk(folder)
            if packed := [path for path in files_there if path.lower().endswith(_PACKED)]:
                raise ConfigError(
                    f"screen.evaluation.{name}: {packed[0]}: unpack it; of archives, tars that are"
                    " not compressed and parquet files are read"
                )
            within = [path for path in files_there if _is_readable(path)]
            if not within:
                raise MissingInput(
                    f"screen.evaluation.{name}: {pattern}: no picture, tar or parquet"
                )
            found.update(within)
            continue
        try:
            named = run.find(pattern)
        except MissingInput as error:
            raise MissingInput(f"screen.evaluation.{name}: {error}") from None
        for reference in named:
            if not _is_readable(reference):
                raise ConfigError(
                    f"screen.evaluation.{name}: {reference} is neither a picture, a tar nor parquet"
                )
        found.update(named)
    return sorted(found)


def _walk(folder: Path) -> list[str]:
    """All files below a folder, those below links to folders too."""
    found: list[str] = []
    seen: set[str] = set()
    for at, below, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(at)) in seen:  # a link to a folder above it, or to a sibling
            below.clear()
            continue
        seen.add(real)
        found += [str(Path(at, name)) for name in names]
    return found


def is_archive(name: str) -> bool:
    """Whether a file holds pictures and is none."""
    return name.lower().endswith((".tar", ".parquet"))


def _is_readable(name: str) -> bool:
    return is_archive(name) or name.lower().endswith(_PICTURES)


def hash_set(attempt: Attempt) -> Stats:
    """Hash some files of a set: `evaluation-*.parquet`.

    Raises `ConfigError` that names a tar or parquet file without a picture that can be decoded.
    """
    name = attempt.task.params["set"]
    download: DownloadSettings = attempt.run.settings("download")
    resize = resizer(download)
    stats = Stats()
    schema = records.EVALUATION
    path = attempt.folder / f"evaluation-{attempt.task.params['part']:05d}.parquet"
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        for source in attempt.inputs():
            about: Counter[str] = Counter()
            for data in _pictures(source, name, resize):
                attempt.stop.check()
                row: dict[str, Any] = {"set": name, "sha256": hashlib.sha256(data).digest()}
                about["pictures"] += 1
                try:
                    found = perceptual.hash_of(resize(data))
                    row |= {"pdq": found.pdq, "pdq_quality": found.quality}
                    about["too_plain"] += found.quality < MIN_QUALITY
                except perceptual.Undecodable:
                    about["undecodable"] += 1
                    stats.counts["evaluation_pictures_undecodable"] += 1
                rows.append(row)
                if len(rows) == 4096:
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                    rows = []
                stats.counts["evaluation_pictures"] += 1
                attempt.progress(stats.counts["evaluation_pictures"], None, "pictures")
            if is_archive(source.name) and about["pictures"] == about["undecodable"]:
                raise ConfigError(
                    f"screen.evaluation.{name}: {source}: none of its {about['pictures']} pictures"
                    " can be decoded"
                )
            for label, number in about.items():
                stats.observe(f"evaluation_set:{name}", label, number)
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return stats


def check(sets: Iterable[str], paths: Iterable[Path]) -> None:
    """Raise `ConfigError` naming the first of `sets` of which `hash_set` decoded no picture."""
    decoded: Counter[str] = Counter()
    for path in paths:
        table = pq.read_table(path, columns=["set", "pdq"])
        for name in table["set"].unique().to_pylist():
            decoded[name] += len(table) - table["pdq"].null_count
    for name in sets:
        if not decoded[name]:
            raise ConfigError(f"screen.evaluation.{name}: none of its pictures can be decoded")


def _pictures(path: Path, name: str, resize: Resize) -> Iterator[bytes]:
    """The encoded pictures in a file of any kind."""
    if path.name.lower().endswith(".parquet"):
        return _of_parquet(path, name, resize)
    if is_archive(path.name):
        return _of_tar(path, name)
    return iter([path.read_bytes()])


def _of_tar(path: Path, name: str) -> Iterator[bytes]:
    """Its files that are called as pictures are, or begin as they do."""
    with tar.opened(path) as archive:
        others: set[str] = set()
        has_pictures = False
        for member in tar.foreign_members(archive):
            suffix = Path(member.name).suffix.lower()
            if is_archive(member.name) or suffix in _PACKED:
                raise ConfigError(
                    f"screen.evaluation.{name}: {path} has an archive in it, {member.name}; unpack"
                    " the outer one"
                )
            head = bytes(archive.read(member.offset, min(member.size, probe.MAGIC_BYTES)))
            if suffix not in _PICTURES and not probe.kind(head):
                others.add(suffix or member.name)
                continue
            if member.size > tar.MAX_MEMBER_BYTES:
                raise tar.broken(archive.name, member.header, "a file too large")
            has_pictures = True
            yield bytes(archive.read(member.offset, member.size))
        if not has_pictures:
            among = ", ".join(sorted(others)[:5]) or "nothing"
            raise ConfigError(f"screen.evaluation.{name}: {path} has no picture, only {among}")


def _of_parquet(path: Path, name: str, resize: Resize) -> Iterator[bytes]:
    """Pictures of all columns that have some: bytes, structs with `bytes` as in `datasets`, or
    lists of either."""
    with files.open_parquet(path) as parquet:
        columns = [
            column
            for first in itertools.islice(parquet.iter_batches(256), 1)
            for column in first.schema.names
            if any(map(resize, itertools.islice(_bytes_of(first[column].to_pylist()), _FIRST)))
        ]
        if not columns:
            raise ConfigError(
                f"screen.evaluation.{name}: {path} has no column of encoded pictures, "
                f"only {', '.join(parquet.schema_arrow.names)}"
            )
        for batch in parquet.iter_batches(256, columns=columns):
            for column in batch.columns:
                yield from _bytes_of(column.to_pylist())


def _bytes_of(value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        if value:
            yield value
    elif isinstance(value, dict):
        yield from _bytes_of(value.get("bytes"))
    elif isinstance(value, list):
        for one in value:
            yield from _bytes_of(one)


def resizer(settings: DownloadSettings) -> Resize:
    """What the download makes of a file, but for its limits; b"" if it cannot be decoded."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations among its dependencies are not ours to mend
        from dataset_build.download import staging
    resizer = staging.EightBitResizer(
        settings.image_size,
        settings.resize_mode,
        settings.resize_only_if_bigger,
        encode_quality=settings.encode_quality,
    )

    def resize(data: bytes) -> bytes:
        encoded, *_ = resizer(io.BytesIO(data))
        return encoded or b""

    return resize

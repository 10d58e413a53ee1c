"""Pictures of evaluation sets, and which pictures of the pool are among them.

A set is what the user names: folders or patterns of picture files, tars (WebDataset's too), parquet
files with a column of encoded pictures. Its pictures go through the same resizer as the pool's, so
that a copy in the pool differs by no more than its encoding. A file is found exactly by its
SHA-256, whatever it looks like, and nearly by its perceptual hash.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build import records
from dataset_build.download import DownloadSettings
from dataset_build.screen import perceptual
from dataset_build.screen.near import MIN_QUALITY, UNHASHED
from pipeline import files
from pipeline.config import ConfigError, MissingInput
from pipeline.manifest import Stats
from pipeline.stage import Attempt, Run

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jpe")
_ROWS_AT_ONCE = 1 << 17


def find(run: Run, name: str, patterns: tuple[str, ...]) -> list[str]:
    """References to a set's files. Raises `MissingInput` or `ConfigError` naming the setting."""
    found: set[str] = set()
    for pattern in patterns:
        folder = Path(pattern).expanduser()
        if folder.is_dir():
            within = [str(path) for path in folder.rglob("*") if _is_readable(path.name)]
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


def is_archive(name: str) -> bool:
    """Whether a file holds pictures and is none."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz", ".parquet"))


def _is_readable(name: str) -> bool:
    return is_archive(name) or name.lower().endswith(_PICTURES)


def hash_set(attempt: Attempt) -> Stats:
    """Hash some files of a set: `evaluation-*.parquet`."""
    params = attempt.task.params
    download: DownloadSettings = attempt.run.settings("download")
    resize = _resizer(download)
    stats = Stats()
    schema = records.EVALUATION
    path = attempt.folder / f"evaluation-{params['part']:05d}.parquet"
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        for data in _contents(attempt.inputs(), params["set"]):
            attempt.stop.check()
            row: dict[str, Any] = {"set": params["set"], "sha256": hashlib.sha256(data).digest()}
            try:
                found = perceptual.hash_of(resize(data))
                row |= {"pdq": found.pdq, "pdq_quality": found.quality}
            except perceptual.Undecodable:
                stats.counts["evaluation_pictures_undecodable"] += 1
            stats.counts["evaluation_pictures"] += 1
            rows.append(row)
            if len(rows) == 4096:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
            attempt.progress(stats.counts["evaluation_pictures"], None, "pictures")
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return stats


def _contents(paths: list[Path], name: str) -> Iterator[bytes]:
    """The encoded pictures in files of all kinds."""
    for path in paths:
        if path.name.lower().endswith(".parquet"):
            yield from _of_parquet(path, name)
        elif is_archive(path.name):
            with tarfile.open(path, "r") as tar:
                for member in tar:
                    if member.isfile() and member.name.lower().endswith(_PICTURES):
                        content = tar.extractfile(member)
                        assert content, member.name
                        yield content.read()
        else:
            yield path.read_bytes()


def _of_parquet(path: Path, name: str) -> Iterator[bytes]:
    """Pictures of the first column that holds bytes, or a struct with `bytes` as in `datasets`."""
    with files.open_parquet(path) as parquet:
        for field in parquet.schema_arrow:
            kind = field.type
            nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            inner = kind.field("bytes").type if nested else kind
            if pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
                break
        else:
            raise ConfigError(
                f"screen.evaluation.{name}: {path} has no column of encoded pictures, "
                f"only {', '.join(parquet.schema_arrow.names)}"
            )
        for batch in parquet.iter_batches(256, columns=[field.name]):
            for value in batch.column(0).to_pylist():
                data = value["bytes"] if nested and value else value
                if data:
                    yield data


def _resizer(settings: DownloadSettings) -> Callable[[bytes], bytes]:
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


def compare(attempt: Attempt) -> Stats:
    """Which pictures of a range of rows look like one of a set: `hits-*.parquet`.

    For each picture and set the distance of the nearest.
    """
    distance = attempt.settings.evaluation_distance
    params = attempt.task.params
    hashes_path, classes_path, *set_paths = attempt.inputs()
    table = pa.concat_tables(pq.read_table(path) for path in set_paths)
    table = table.filter(pa.array(table["pdq_quality"].fill_null(0).to_numpy() >= MIN_QUALITY))
    names = table["set"].combine_chunks().dictionary_encode()
    index = perceptual.Index(perceptual.packed(table["pdq"].to_pylist()))
    of_set = names.indices.to_numpy()
    hashes, classes = np.load(hashes_path, mmap_mode="r"), np.load(classes_path, mmap_mode="r")
    first, last = params["rows"]
    path = attempt.folder / f"hits-{params['part']:05d}.parquet"
    with pq.ParquetWriter(path, records.HITS, compression="zstd") as writer:
        for start in range(first, last, _ROWS_AT_ONCE):
            attempt.stop.check()
            stop = min(start + _ROWS_AT_ONCE, last)
            row = start + np.flatnonzero(classes[start:stop] != UNHASHED)
            query, entry, apart = index.within(_whole(hashes, row), distance)
            order = np.lexsort((apart, of_set[entry], query))
            query, entry, apart = query[order], entry[order], apart[order]
            nearest = np.ones(query.size, np.bool_)
            nearest[1:] = (query[1:] != query[:-1]) | (of_set[entry[1:]] != of_set[entry[:-1]])
            columns = [
                pa.array(row[query[nearest]], pa.uint32()),
                names.dictionary.take(pa.array(of_set[entry[nearest]])),
                pa.array(apart[nearest]),
            ]
            writer.write_table(pa.table(columns, schema=records.HITS))
            attempt.progress(stop - first, last - first, "pictures")
    return Stats()


def _whole(hashes: perceptual.U32, rows: perceptual.Rows) -> perceptual.U64:
    """Some rows of `near.collect`'s hashes as `perceptual.packed` has them."""
    words = np.ascontiguousarray(hashes[:, rows].T.astype(">u4"))
    return words.view("u8").reshape(-1, 4)

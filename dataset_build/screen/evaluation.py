"""Pictures of evaluation sets.

A set is what the user names: folders or patterns of picture files, tars (WebDataset's too), parquet
files with a column of encoded pictures. Its pictures go through the same resizer as the pool's, so
that a copy in the pool differs by no more than its encoding.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build import records
from dataset_build.download import DownloadSettings
from dataset_build.screen import perceptual
from pipeline import files, tar
from pipeline.config import ConfigError, MissingInput
from pipeline.manifest import Stats
from pipeline.stage import Attempt, Run

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jpe")


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
    return name.lower().endswith((".tar", ".parquet"))


def _is_readable(name: str) -> bool:
    return is_archive(name) or name.lower().endswith(_PICTURES)


def hash_set(attempt: Attempt) -> Stats:
    """Hash some files of a set: `evaluation-*.parquet`."""
    params = attempt.task.params
    download: DownloadSettings = attempt.run.settings("download")
    resize = resizer(download)
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
            with tar.opened(path) as archive:
                for member in tar.foreign_members(archive):
                    if member.name.lower().endswith(_PICTURES):
                        if member.size > tar.MAX_MEMBER_BYTES:
                            raise tar.broken(archive.name, member.header, "a file too large")
                        yield bytes(archive.read(member.offset, member.size))
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


def resizer(settings: DownloadSettings) -> Callable[[bytes], bytes]:
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

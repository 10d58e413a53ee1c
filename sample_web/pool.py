"""A pool of pairs in the columns LAION published, and the evaluation sets, both as parquet."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sample_web import dirt
from sample_web.pairs import Cited, address_of, home, scene_of, text_of
from sample_web.vocabulary import draw, number

if TYPE_CHECKING:
    from sample_web.stage import SampleWebSettings

_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("SAMPLE_ID", pa.int64()),
    ("URL", pa.string()),
    ("TEXT", pa.string()),
    ("HEIGHT", pa.int32()),
    ("WIDTH", pa.int32()),
    ("LICENSE", pa.string()),
    ("NSFW", pa.string()),
    ("similarity", pa.float64()),
]
SCHEMA = pa.schema(_COLUMNS)
_IMAGE: list[tuple[str, pa.DataType]] = [("image", pa.binary()), ("label", pa.int32())]
EVALUATION = pa.schema(_IMAGE)
_GROUP = 5_000  # rows of a row group


def rows(settings: SampleWebSettings) -> Iterator[tuple[Cited, tuple[int, int]]]:
    """(what is cited, its width and height) of every row of the pool."""
    for index in range(settings.pairs):
        if home(settings, index) < 0 or also_in_pool(settings, index):
            cited = Cited(address_of(settings, index).url, text_of(settings, index))
            yield cited, scene_of(settings, index).size
    for fault in dirt.faults(settings):
        if dirt.in_pool(fault):
            yield fault.cited, (0, 0)


def also_in_pool(settings: SampleWebSettings, index: int) -> bool:
    """Whether a picture that the archive cites is in the pool as well."""
    cited = home(settings, index) >= 0
    return cited and draw(settings.seed, "both", index) < settings.repeat_share / 4


def write_pool(path: Path, pairs: Iterable[tuple[Cited, tuple[int, int]]], seed: int) -> int:
    """Write pool rows as they come; their number."""
    count = 0
    stream = iter(pairs)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        while block := list(itertools.islice(stream, _GROUP)):
            table = [_row(cited, size, seed) for cited, size in block]
            writer.write_table(pa.Table.from_pylist(table, SCHEMA))
            count += len(block)
    return count


def write_evaluation(
    path: Path,
    pictures: Iterable[tuple[bytes, int]],
    classes: Sequence[str],
    templates: Sequence[str],
) -> int:
    """Write an evaluation set of (picture file, label); the number of pictures."""
    lists = {b"classes": json.dumps(list(classes)), b"templates": json.dumps(list(templates))}
    schema = EVALUATION.with_metadata(lists)
    images, labels = zip(*pictures, strict=True)
    table = pa.table({"image": list(images), "label": list(labels)}, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=500, compression="none")
    return int(table.num_rows)


def _row(cited: Cited, size: tuple[int, int], seed: int) -> dict[str, Any]:
    return {
        "SAMPLE_ID": number(seed, "sample", cited.url, cited.text) >> 1,
        "URL": cited.url,
        "TEXT": cited.text,
        "HEIGHT": size[1],
        "WIDTH": size[0],
        "LICENSE": "?",
        "NSFW": "UNLIKELY",
        "similarity": 0.28 + 0.15 * draw(seed, "similarity", cited.url),
    }

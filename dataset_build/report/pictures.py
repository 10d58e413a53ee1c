"""A sample of the packed pictures: evenly spaced in uid order, small enough to live in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import files

COUNT = 48
MAX_BYTES = 1_500_000
"""Of all embedded pictures together, as base64."""
_TRIES = ((224, 78), (176, 70), (128, 60), (80, 45))  # longest side in pixels, JPEG quality
_MAX_CAPTION = 600
_COLUMNS = [
    *("uid", "shard", "width", "height", "query_ids", "selected_by"),
    *("image_offset", "image_bytes", "text_offset", "text_bytes"),
]


@dataclass(frozen=True)
class Picture:
    """One packed sample; `data` is a `data:` address, empty if the picture does not decode."""

    uid: str
    shard: str
    caption: str
    width: int
    height: int
    query_ids: tuple[int, ...]
    selected_by: tuple[int, ...]
    data: str


def sample(
    index: Path,
    shards: Mapping[str, Path],
    count: int = COUNT,
    gone: Collection[str] = (),
) -> list[Picture]:
    """Up to `count` samples of the index, evenly spaced over its rows (uid order is random order).

    `shards` maps the names that the index uses to files; a sample whose shard is not there is
    left out, and so is one whose uid is in `gone`. Only the row groups and the bytes that hold a
    chosen sample are read.
    """
    rows = [
        row
        for row in _rows(index, count)
        if row["shard"] in shards and row["uid"].hex() not in gone
    ]
    originals = [
        _slice(shards[row["shard"]], row["image_offset"], row["image_bytes"]) for row in rows
    ]
    thumbnails: list[str] = []
    for side, quality in _TRIES:
        thumbnails = [_data_address(original, side, quality) for original in originals]
        if sum(map(len, thumbnails)) <= MAX_BYTES:
            break
    return [
        Picture(
            uid=row["uid"].hex(),
            shard=row["shard"],
            caption=_caption(shards[row["shard"]], row),
            width=row["width"],
            height=row["height"],
            query_ids=tuple(row["query_ids"]),
            selected_by=tuple(row["selected_by"]),
            data=data,
        )
        for row, data in zip(rows, thumbnails, strict=True)
    ]


def _rows(index: Path, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with files.open_parquet(index) as parquet:
        total = parquet.metadata.num_rows
        chosen = sorted({position * total // count for position in range(count)} if total else ())
        first = 0
        for group in range(parquet.num_row_groups):
            last = first + parquet.metadata.row_group(group).num_rows
            inside = [row - first for row in chosen if first <= row < last]
            if inside:
                rows += parquet.read_row_group(group, columns=_COLUMNS).take(inside).to_pylist()
            first = last
    return rows


def _slice(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


def _caption(shard: Path, row: Mapping[str, Any]) -> str:
    text = _slice(shard, row["text_offset"], row["text_bytes"]).decode("utf-8", "replace").strip()
    return text if len(text) <= _MAX_CAPTION else text[:_MAX_CAPTION] + "…"


def _data_address(original: bytes, side: int, quality: int) -> str:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(original), formats=("JPEG",)) as picture:
            picture.draft("RGB", (side, side))
            small = picture.convert("RGB")
        small.thumbnail((side, side))
        target = io.BytesIO()
        small.save(target, "JPEG", quality=quality, optimize=True)
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(target.getvalue()).decode()

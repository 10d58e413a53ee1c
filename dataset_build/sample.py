"""One packed sample against its row of the index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import simplejpeg
import xxhash

from pipeline.tar import Tar

KINDS = (("image", "jpg"), ("text", "txt"), ("json", "json"))
"""The files of a sample: as the index calls them, and their extensions."""
_MAX_PIXELS = 100_000_000


def faults(source: Tar, row: Mapping[str, Any], decodes: bool) -> Iterator[str]:
    """What is wrong with a sample, found by the places that the index gives."""
    data = {}
    for kind, _ in KINDS:
        offset, size = row[f"{kind}_offset"], row[f"{kind}_bytes"]
        if offset + size > source.bytes:
            yield f"its {kind} lies beyond the end of the shard"
            return
        data[kind] = source.read(offset, size)
    if hashlib.sha256(data["image"]).digest() != row["sha256"]:
        yield "its picture is not the one that was packed"
    elif decodes and (what := _undecodable(data["image"], row["width"], row["height"])):
        yield what
    text_is_whole = xxhash.xxh3_64_intdigest(data["text"]) == row["caption_hash"]
    if not text_is_whole:
        yield "its text is not the one that was packed"
    if xxhash.xxh3_64_intdigest(data["json"]) != row["json_hash"]:
        yield "its json is not the one that was packed"
        return
    said = json.loads(bytes(data["json"]))
    indexed = {n: row[n].hex() for n in ("uid", "sha256", "sent_sha256", "duplicate_group")}
    indexed |= {n: row[n] for n in ("width", "height", "query_ids", "selected_by")}
    for name in indexed:
        if said.get(name) != indexed[name]:
            yield f"its {name} is another in the json than in the index"
    if text_is_whole and said.get("text", "").encode() != data["text"]:
        yield "its text is another in the json"


def _undecodable(picture: memoryview, width: int, height: int) -> str:
    try:
        rows, columns, *_ = simplejpeg.decode_jpeg_header(picture)
        if (columns, rows) != (width, height) or rows * columns > _MAX_PIXELS:
            return f"its picture is {columns} x {rows} pixels, the index has {width} x {height}"
        # All channels are read; that only one is made saves a third of the time.
        grey: np.ndarray = simplejpeg.decode_jpeg(picture, "GRAY", fastdct=True)
        assert grey.shape[:2] == (height, width)
    except ValueError as error:
        return f"its picture cannot be decoded ({error})"
    return ""

"""What each stored picture looks like: its perceptual hash and the values of the score functions.

A row of `looked-*.parquet` for every pair of a `fetched-*.parquet` that has a picture. A picture
that several pairs of the file share is decoded once; of one that was removed there is nothing to
see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build import records, removed
from dataset_build.screen import perceptual, scores, staged
from pipeline import files
from pipeline.manifest import Damaged
from pipeline.stage import Attempt
from pipeline.stats import Stats

_COLUMNS = ["uid", "text", "staged", "staged_offset", "staged_bytes", *staged.COLUMNS]
_REMOVED = {"pdq": bytes(32), "pdq_weak": bytes(32), "pdq_quality": 0}
_AT_ONCE = 64  # pictures handed to a score function; as RGB of 256 x 340 pixels 17 MB


def look(attempt: Attempt) -> Stats:
    """Look at the pictures of one `fetched-*.parquet`."""
    path, *tars = attempt.inputs()
    functions = scores.load(attempt.task.params["scores"])
    schema = records.looked(functions)
    stats = Stats()
    known: dict[bytes, perceptual.Hash] = {}
    with (
        staged.Pictures(tars) as pictures,
        files.open_parquet(path) as fetched,
        pq.ParquetWriter(
            attempt.folder / path.name.replace("fetched-", "looked-"), schema, compression="zstd"
        ) as writer,
    ):
        total = fetched.metadata.num_rows
        done = 0
        for batch in fetched.iter_batches(1 << 14, columns=_COLUMNS):
            rows: list[dict[str, Any]] = batch.filter(staged.numbered(batch)).to_pylist()
            seen = {
                row["uid"]: {"uid": row["uid"], **_REMOVED}
                for row in rows
                if row["status"] == removed.STATUS
            }
            for own in _groups([row for row in rows if row["uid"] not in seen]):
                attempt.stop.check()
                data = [pictures.read(row) for row in own]
                new = [
                    {"uid": row["uid"], **_hashed(known, row, content)}
                    for row, content in zip(own, data, strict=True)
                ]
                if functions:
                    texts = [row["text"] for row in own]
                    scored = scores.score(functions, _decoded(own, data), texts)
                    for name, values in scored.items():
                        for row, value in zip(new, values.tolist(), strict=True):
                            row[name] = value
                seen.update((row["uid"], row) for row in new)
                stats.counts["pictures_looked_at"] += len(own)
                attempt.progress(done + len(seen), total, "pictures")
            found = [seen[row["uid"]] for row in rows]
            writer.write_table(pa.Table.from_pylist(found, schema=schema))
            done += len(batch)
    stats.counts["pictures_decoded"] = len(known)
    return stats


def _groups(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), _AT_ONCE):
        yield rows[start : start + _AT_ONCE]


def _hashed(
    known: dict[bytes, perceptual.Hash], row: dict[str, Any], data: bytes
) -> dict[str, Any]:
    digest = row["staged_sha256"]
    if digest not in known:
        try:
            known[digest] = perceptual.hash_of(data)
        except perceptual.Undecodable:
            raise Damaged(f"the stored picture of {row['uid'].hex()} is none") from None
    found = known[digest]
    return {"pdq": found.pdq, "pdq_weak": found.weak, "pdq_quality": found.quality}


def _decoded(rows: list[dict[str, Any]], data: list[bytes]) -> list[scores.Picture]:
    """RGB of each; equal pictures are one array."""
    made: dict[bytes, scores.Picture] = {}
    for row, content in zip(rows, data, strict=True):
        if row["staged_sha256"] not in made:
            colours: Any = cv2.imdecode(np.frombuffer(content, "u1"), cv2.IMREAD_COLOR)
            rgb: Any = cv2.cvtColor(colours, cv2.COLOR_BGR2RGB)
            rgb.flags.writeable = False  # of another pair and the next function too
            made[row["staged_sha256"]] = rgb
    return [made[row["staged_sha256"]] for row in rows]

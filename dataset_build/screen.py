"""Which pictures are kept: one pair for each picture, none for a site's placeholder.

Two addresses often serve the same file. Identity is the SHA-256 of the bytes that the server sent,
and the pair with the smallest uid keeps the picture, so the choice depends neither on the order of
the downloads nor on how they were cut into tasks. Several captions of one picture are thus reduced
to one; `dedup` and `balance` have counted them all by then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from dataset_build import records
from pipeline.config import Settings
from pipeline.manifest import Stats
from pipeline.stage import Attempt, Run, Stage, Task

_ROWS_AT_ONCE = 32_000_000  # of 24 bytes, three times over while they are sorted: 2.3 GB

Ranks = npt.NDArray[np.int64]
Halves = npt.NDArray[np.uint64]


class ScreenSettings(Settings):
    """Which pictures are kept."""

    drop_duplicate_pictures: bool = True
    """Keep one pair of those whose pictures are the same file."""
    drop_placeholders: bool = True
    """Drop a picture that too many pairs share: it says "not available", whatever the text says."""
    placeholder_pairs: int = Field(100, gt=1)
    """A file that more pairs than this share is a placeholder."""


def plan(run: Run) -> list[Task]:
    """One task: what is a duplicate shows only over all pictures."""
    return [Task("screen", 0, tuple(run.find("download:fetched-*.parquet")))]


def work(attempt: Attempt) -> Stats:
    """Decide for every fetched pair; one `screened-*.parquet` per `fetched-*.parquet`."""
    paths = attempt.inputs()
    settings: ScreenSettings = attempt.settings
    verdicts = _verdicts(paths, settings, attempt)
    stats = Stats()
    kept_by_file = []
    last = b""
    start = 0
    for path in paths:
        attempt.stop.check()
        table = pq.read_table(path, columns=["uid", "status", "staged"])
        uids: list[Any] = table["uid"].to_pylist()
        assert all(a < b for a, b in zip([last, *uids], uids, strict=False)), f"{path}: unsorted"
        last = uids[-1] if uids else last
        verdict = verdicts[start : start + len(table)]
        start += len(table)
        reasons = np.array(_REASONS, dtype=object)[verdict]
        kept = verdict == _KEEP
        screened = pa.table(
            [table["uid"], pa.array(kept), pa.array(reasons, pa.string()), table["staged"]],
            schema=records.SCREENED,
        )
        # Pairs without a picture ended in `download`; they have no row here.
        screened = screened.filter(pa.array(verdict != _NO_PICTURE))
        name = path.name.replace("fetched-", "screened-")
        pq.write_table(screened, attempt.folder / name, compression="zstd", row_group_size=1 << 16)
        kept_by_file.append({"file": name, "kept": int(kept.sum())})
        stats.rows_in += len(screened)
        stats.rows_out += int(kept.sum())
        for number in (_DUPLICATE, _PLACEHOLDER):
            if rows := int((verdict == number).sum()):
                stats.drop(_REASONS[number], rows)
        attempt.progress(len(kept_by_file), len(paths), "files")
    (attempt.folder / "survivors.json").write_text(json.dumps(kept_by_file, indent=1))
    return stats


_REASONS = ("", "no_picture", "duplicate_picture", "placeholder")
_KEEP, _NO_PICTURE, _DUPLICATE, _PLACEHOLDER = range(4)


def _verdicts(
    paths: list[Path], settings: ScreenSettings, attempt: Attempt
) -> npt.NDArray[np.uint8]:
    """One verdict per row over all files, uint8 [rows]. Files, and rows in them, ascend by uid."""
    total = sum(pq.read_metadata(path).num_rows for path in paths)
    verdicts = np.full(total, _NO_PICTURE, dtype=np.uint8)
    passes = -(-total // _ROWS_AT_ONCE)
    for number in range(passes):
        high, low, ranks = _digests(paths, number, passes, attempt)
        verdicts[ranks] = _KEEP
        order = np.lexsort((low, high))  # stable: equal digests stay in the order of uids
        high, low, ranks = high[order], low[order], ranks[order]
        if not len(ranks):
            continue
        changes = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        heads = np.flatnonzero(np.concatenate([[True], changes]))
        copies = np.diff(np.append(heads, len(ranks)))
        if settings.drop_duplicate_pictures:
            repeated = np.ones(len(ranks), dtype=bool)
            repeated[heads] = False
            verdicts[ranks[repeated]] = _DUPLICATE
        if settings.drop_placeholders:
            many = np.repeat(copies > settings.placeholder_pairs, copies)
            verdicts[ranks[many]] = _PLACEHOLDER
    return verdicts


def _digests(
    paths: list[Path], number: int, passes: int, attempt: Attempt
) -> tuple[Halves, Halves, Ranks]:
    """The first 128 bits of the digests that belong to this pass, in halves, and their rows.

    Among 10^10 pictures two different ones share 128 bits with a probability of 10^-19.
    """
    halves = [np.empty((0, 2), ">u8")]
    ranks = [np.empty(0, np.int64)]
    start = 0
    for path in paths:
        attempt.stop.check()
        table = pq.read_table(path, columns=["status", "sha256"])
        ok = pc.equal(table["status"], pa.scalar("ok")).to_numpy()
        digests: list[Any] = table["sha256"].to_pylist()
        raw = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 4)
        mine = ok & (raw[:, 3] % passes == number)
        halves.append(raw[mine, :2])
        ranks.append(start + np.flatnonzero(mine))
        start += len(table)
    both = np.concatenate(halves).astype(np.uint64)
    return both[:, 0], both[:, 1], np.concatenate(ranks)


STAGE = Stage("screen", ("download",), plan, work, unit="pairs")

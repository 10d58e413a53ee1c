"""Which pictures are kept: one pair for each picture, none for a site's placeholder, `cap` a query.

Two addresses often serve the same file. Identity is the SHA-256 of the bytes that the server sent,
and the pairs with the smallest uids keep the picture, so the choice depends neither on the order of
the downloads nor on how they were cut into tasks. Where `balance.spare` selected more than the cap,
each query then keeps the first of what is left to it, by the same priorities, up to the cap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from dataset_build import dedup, domains, records, selection, uid_range
from dataset_build.balance import BalanceSettings
from dataset_build.hashing import U64, halves
from dataset_build.recap import Survivors, recap
from dataset_build.thresholds import Thresholds, priority
from pipeline.config import Settings
from pipeline.manifest import Stats
from pipeline.stage import Attempt, Run, Stage, Task

ROWS_AT_ONCE = 32_000_000  # of 24 bytes, three times over while they are sorted: 2.3 GB

Ranks = npt.NDArray[np.int64]
Verdicts = npt.NDArray[np.uint8]


class ScreenSettings(Settings):
    """Which pictures are kept."""

    pairs_per_picture: int | None = Field(1, ge=1)
    """Pairs that may have the same file as their picture; null for any number."""
    drop_placeholders: bool = True
    """Drop a picture that too many pairs share: it says "not available", whatever the text says."""
    placeholder_pairs: int = Field(100, gt=1)
    """A file that more pairs than this share is a placeholder."""


def plan(run: Run) -> list[Task]:
    """One task: what is a duplicate shows only over all pictures."""
    fetched = run.find("download:fetched-*.parquet")
    reads = (_COUNTS, *fetched, *run.find("balance:selected-*.parquet"))
    return [Task("screen", 0, reads, {"files": len(fetched)})]


def work(attempt: Attempt) -> Stats:
    """Decide for every fetched pair; one `screened-*.parquet` per `fetched-*.parquet`."""
    settings: ScreenSettings = attempt.settings
    balance: BalanceSettings = attempt.run.settings("balance")
    counts_path, *paths = attempt.inputs()
    files = attempt.task.params["files"]
    fetched, selected = paths[:files], paths[files:]
    queries = np.load(counts_path, mmap_mode="r").size
    verdicts = _verdicts(fetched, settings, attempt)
    downloaded, survived = np.zeros(queries, np.uint64), np.zeros(queries, np.uint64)
    for part in _parts(attempt, fetched, selected, verdicts):
        row, query = selection.matches(part.selected_by)
        downloaded += selection.count(query[part.verdict[row] != _NO_PICTURE], queries)
        survived += selection.count(query[part.verdict[row] == _KEEP], queries)
    np.save(attempt.folder / "downloaded.npy", downloaded)
    thresholds = None
    if balance.spare and balance.mode != "metaclip":

        def survivors() -> Iterator[Survivors]:
            for part in _parts(attempt, fetched, selected, verdicts):
                yield part.survivors(balance)

        thresholds = recap(survivors, survived, balance.final, balance.seed)
    return _write(attempt, _parts(attempt, fetched, selected, verdicts), thresholds)


class _Part:
    """The pairs of one `fetched-*.parquet`, with the verdicts so far and who selected them."""

    def __init__(self, path: Path, table: pa.Table, verdict: Verdicts, selected: pa.Table) -> None:
        assert table["uid"].equals(selected["uid"]), f"{path}: not the selected pairs"
        self.path, self.uid, self.url, self.verdict = path, table["uid"], table["url"], verdict
        self.text = table["text"]
        self.selected_by = selected["selected_by"].combine_chunks()

    def survivors(self, balance: BalanceSettings) -> Survivors:
        """The selections of the pairs that are kept."""
        row, query = selection.matches(self.selected_by)
        at = np.flatnonzero(self.verdict[row] == _KEEP)
        row, query = row[at], query[at]
        high, low = halves(self.uid)
        domain = None
        if balance.final.per_domain is not None:
            domain = domains.hashed(domains.of_urls(self.url))[row]
        return Survivors(row, query, high[row], low[row], domain)


def _parts(
    attempt: Attempt, fetched: list[Path], selected: list[Path], verdicts: Verdicts
) -> Iterator[_Part]:
    """All files in the order of uids; each pair is one row of `verdicts`."""
    start = 0
    for number, path in enumerate(fetched):
        attempt.stop.check()
        table = pq.read_table(path, columns=["uid", "url", "text"])
        first, last = uid_range.of_file(path.name)
        near = [selected[group] for group in dedup.within(attempt.run, first, last)]
        own = uid_range.read(near, first, last, ["uid", "selected_by"], attempt.stop.check)
        yield _Part(path, table, verdicts[start : start + len(table)], own)
        start += len(table)
        attempt.progress(number + 1, len(fetched), "files")


def _write(attempt: Attempt, parts: Iterator[_Part], thresholds: Thresholds | None) -> Stats:
    """The verdicts, file by file, the cap applied to what is left."""
    balance: BalanceSettings = attempt.run.settings("balance")
    stats = Stats()
    kept_by_file = []
    for part in parts:
        verdict, selected_by = part.verdict.copy(), part.selected_by
        if thresholds is not None:
            left = part.survivors(balance)
            h = priority(balance.seed)(left.high, left.low, left.query)
            within = thresholds.admit(left.high, left.low, left.query, h, left.domain)
            selected_by = selection.lists(left.row[within], left.query[within], len(verdict))
            chosen = pc.list_value_length(selected_by).to_numpy(zero_copy_only=False) > 0
            verdict[(verdict == _KEEP) & ~chosen] = _OVER_CAP
        kept = verdict == _KEEP
        reasons = pa.array(np.array(_REASONS, dtype=object)[verdict], pa.string())
        uid, text = part.uid.combine_chunks(), part.text.combine_chunks()
        captions = pa.ListArray.from_arrays(
            np.append(0, kept.cumsum()).astype(np.int32), text.filter(pa.array(kept))
        )
        columns = [uid, pa.array(kept), reasons, selected_by, captions, uid]
        screened = pa.table(columns, schema=records.SCREENED)
        # Pairs without a picture ended in `download`; they have no row here.
        screened = screened.filter(pa.array(verdict != _NO_PICTURE))
        name = part.path.name.replace("fetched-", "screened-")
        pq.write_table(screened, attempt.folder / name, compression="zstd", row_group_size=1 << 16)
        kept_by_file.append({"file": name, "kept": int(kept.sum())})
        stats.rows_in += len(screened)
        stats.rows_out += int(kept.sum())
        for number in (_DUPLICATE, _PLACEHOLDER, _OVER_CAP):
            if rows := int((verdict == number).sum()):
                stats.drop(_REASONS[number], rows)
    (attempt.folder / "survivors.json").write_text(json.dumps(kept_by_file, indent=1))
    return stats


_COUNTS = "balance:counts.npy"
_REASONS = ("", "no_picture", "duplicate_picture", "placeholder", "over_cap")
_KEEP, _NO_PICTURE, _DUPLICATE, _PLACEHOLDER, _OVER_CAP = range(5)


def _verdicts(paths: list[Path], settings: ScreenSettings, attempt: Attempt) -> Verdicts:
    """One verdict per row over all files, uint8 [rows]. Files, and rows in them, ascend by uid."""
    total = sum(pq.read_metadata(path).num_rows for path in paths)
    verdicts = np.full(total, _NO_PICTURE, dtype=np.uint8)
    passes = -(-total // ROWS_AT_ONCE)
    for number in range(passes):
        high, low, ranks = digests(paths, number, passes, attempt)
        verdicts[ranks] = _KEEP
        order = np.lexsort((low, high))  # stable: equal digests stay in the order of uids
        high, low, ranks = high[order], low[order], ranks[order]
        if not len(ranks):
            continue
        changes = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        heads = np.flatnonzero(np.concatenate([[True], changes]))
        copies = np.diff(np.append(heads, len(ranks)))
        if settings.pairs_per_picture is not None:
            place = np.arange(len(ranks)) - np.repeat(heads, copies)
            verdicts[ranks[place >= settings.pairs_per_picture]] = _DUPLICATE
        if settings.drop_placeholders:
            many = np.repeat(copies > settings.placeholder_pairs, copies)
            verdicts[ranks[many]] = _PLACEHOLDER
    return verdicts


def digests(
    paths: list[Path], number: int, passes: int, attempt: Attempt
) -> tuple[U64, U64, Ranks]:
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


STAGE = Stage(
    "screen", ("balance", "download"), plan, work, unit="pairs", also=("balance",), version=3
)

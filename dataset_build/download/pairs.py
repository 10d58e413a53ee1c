"""What a task is asked for: the selected pairs of its range, and the bytes they are known to be."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataset_build import dedup, records, uid_range
from dataset_build.download import expected
from dataset_build.download.earlier import Earlier
from pipeline.stage import Attempt


def selected(attempt: Attempt, earlier: Earlier, first: bytes, last: bytes) -> list[dict[str, Any]]:
    """The selected pairs with their records, sorted by uid.

    A record is read from `dedup` only if no earlier download has it from the very same file.
    """
    task, check = attempt.task, attempt.stop.check
    paths = dict(zip(task.reads, attempt.inputs(), strict=True))
    chosen = list(paths.values())[: task.params["groups"]]
    rows = uid_range.read(chosen, first, last, ("uid", "snapshot"), check)
    groups = dedup.group_of(attempt.run, rows["uid"]).tolist()
    new: dict[str, list[bytes]] = defaultdict(list)
    records_of: dict[bytes, dict[str, Any]] = {}
    identities = {name: attempt.run.identity(name) for name in paths}
    for row, group in zip(rows.to_pylist(), groups, strict=True):
        holder = f"dedup:texts-{row['snapshot']}-{group:05d}.parquet"
        known = earlier.by_uid.get(row["uid"])
        if known is not None and known["texts"] == identities[holder]:
            records_of[row["uid"]] = known
        else:
            new[holder].append(row["uid"])
    for holder, uids in new.items():
        among = pa.array(uids, records.UID)
        names = records.TEXTS.names
        table = uid_range.read([paths[holder]], uids[0], uids[-1], names, check, among)
        for row in table.to_pylist():
            records_of[row["uid"]] = {**row, "texts": identities[holder]}
    return [records_of[uid] for uid in rows["uid"].to_pylist()]


def expected_digests(attempt: Attempt, first: bytes, last: bytes) -> dict[bytes, set[bytes]]:
    """Of each address that `download.expected` lists: SHA-256s that its file may have."""
    paths = [Path(attempt.run.path(name)) for name in expected(attempt.run)]
    digests: dict[bytes, set[bytes]] = defaultdict(set)
    for path in paths:
        column = records.sent_digest(path)
        table = uid_range.read([path], first, last, ("uid", column), attempt.stop.check)
        for uid, digest in zip(table["uid"].to_pylist(), table[column].to_pylist(), strict=True):
            if any(digest):  # else there was no file either when it was published
                digests[uid[:8]].add(digest)
    return digests

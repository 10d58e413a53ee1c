"""What `dedup` and `balance` publish, made by hand and cut as the settings of the run say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build import dedup, records
from dataset_build.balance import BalanceSettings
from dataset_build.dedup import DedupSettings
from dataset_build.download import DownloadSettings
from dataset_build.hashing import identify
from dataset_build.lists import ListsSettings
from dataset_build.match import MatchSettings
from dataset_build.pack import PackSettings
from dataset_build.screen import ScreenSettings
from pipeline.config import Settings
from pipeline.manifest import digest
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats


class Config(Settings):
    match: MatchSettings = MatchSettings(buckets=4)
    dedup: DedupSettings = DedupSettings(buckets_per_task=2)
    balance: BalanceSettings = BalanceSettings()
    lists: ListsSettings = ListsSettings()
    download: DownloadSettings = DownloadSettings()
    screen: ScreenSettings = ScreenSettings()
    pack: PackSettings = PackSettings()


class Pair(NamedTuple):
    url: str
    text: str = "x"
    snapshot: str = "A"

    @property
    def uid(self) -> bytes:
        return identify([self.url], [self.text])[0]


def write_groups(
    run: Run, folder: Path, name: str, rows: Iterable[dict[str, Any]], schema: pa.Schema
) -> None:
    """`NAME-GGGGG.parquet` for every group of buckets, sorted by uid."""
    buckets: int = run.settings("match").buckets
    rows = sorted(rows, key=lambda row: bytes(row["uid"]))
    for number, group in enumerate(dedup.groups(run)):
        own = [r for r in rows if int.from_bytes(r["uid"], "big") * buckets >> 128 in range(*group)]
        table = pa.Table.from_pylist(own, schema=schema)
        pq.write_table(table, folder / f"{name}-{number:05d}.parquet", row_group_size=3)


def dedup_of(pairs: Sequence[Pair], site: str = "page.example") -> Stage:
    """A stage `dedup` with the texts of these pairs, found on `site`: a task for each snapshot."""

    def plan(run: Run) -> list[Task]:
        names = sorted({pair.snapshot for pair in pairs})
        own = {name: sorted(pair for pair in pairs if pair.snapshot == name) for name in names}
        return [
            Task("dedup", index, params={"snapshot": name, "edition": digest([site, own[name]])})
            for index, name in enumerate(names)
        ]

    def work(attempt: Attempt) -> Stats:
        name = attempt.task.params["snapshot"]
        rows = [
            {
                "uid": pair.uid,
                "url": pair.url,
                "text": pair.text,
                "page_url": f"http://{site}/{name}",
                "source": "alt",
                "snapshot": name,
                "file": f"file of {name}",
            }
            for pair in pairs
            if pair.snapshot == name
        ]
        write_groups(attempt.run, attempt.folder, f"texts-{name}", rows, records.TEXTS)
        return Stats()

    return Stage("dedup", (), plan, work)


def balance_of(selected: Sequence[Pair]) -> Stage:
    """A stage `balance` that selected these pairs."""

    def plan(run: Run) -> list[Task]:
        return [Task("balance", 0, params={"edition": digest(sorted(selected))})]

    def work(attempt: Attempt) -> Stats:
        rows = [
            {"uid": pair.uid, "snapshot": pair.snapshot, "query_ids": [0], "selected_by": [0]}
            for pair in selected
        ]
        write_groups(attempt.run, attempt.folder, "selected", rows, records.SELECTED)
        return Stats()

    return Stage("balance", (), plan, work)


def queries_of(count: int = 1) -> Stage:
    """A stage `queries` with so many of them."""

    def work(attempt: Attempt) -> Stats:
        rows = [{"query_id": number, "text": f"query {number}"} for number in range(count)]
        table = pa.Table.from_pylist(rows, schema=records.QUERIES)
        pq.write_table(table, attempt.folder / "queries.parquet")
        return Stats()

    return Stage("queries", (), lambda run: [Task("queries", 0)], work)

"""A build of made-up pictures, of any size: balance and download by hand, then the real stages."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dataset_build import dedup, pack, records, screen, uid_range
from dataset_build.hashing import identify
from dataset_build.screen import ScreenSettings
from pipeline import runner, tar
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats
from tests.dataset_build.hand_made import Config, queries_of
from tests.dataset_build.inline import InlineExecutor


@cache
def picture(number: int) -> bytes:
    """A small JPEG that no other number has: what makes it so comes after its end."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 251, 80, 10)).save(stream, "JPEG", quality=30)
    return stream.getvalue() + hashlib.sha256(str(number).encode()).digest()


@dataclass(frozen=True)
class Web:
    """`size` pairs, each of its own picture but for those that `copies` maps to another's file."""

    size: int
    parts: int = 3
    domains: int = 50

    def url(self, number: int) -> str:
        return f"http://d{number % self.domains}.example/{number}.jpg"

    def file(self, number: int) -> int:
        """Which picture an address serves: every hundredth shows the one before it."""
        return number - (number % 100 == 99)

    def text(self, number: int) -> str:
        return f"the caption of <{number}>"

    def uid(self, number: int) -> bytes:
        return identify([self.url(number)], [self.text(number)])[0]

    @cached_property
    def uids(self) -> dict[bytes, int]:
        """The numbers of all uids."""
        return {self.uid(number): number for number in range(self.size)}

    def sent(self, number: int) -> bytes:
        return hashlib.sha256(b"sent" + picture(self.file(number))).digest()

    def write(self, run: Run, folder: Path, part: int) -> None:
        """What a download of one range of uids leaves."""
        first, last = uid_range.bounds(part, self.parts)
        uids = self.uids
        rows = []
        name = f"staged-{part:05d}-{part:016x}.tar"
        with (folder / name).open("wb") as stream:
            for uid in sorted(uid for uid in uids if first <= uid <= last):
                number = uids[uid]
                data, key = picture(self.file(number)), uid[:8].hex()
                offset = tar.write_member(stream, f"{key}.jpg", data)
                tar.write_member(stream, f"{key}.txt", self.text(number).encode())
                tar.write_member(
                    stream, f"{key}.json", b'{"url": "%s"}' % self.url(number).encode()
                )
                rows.append(
                    {
                        "uid": uid,
                        "url": self.url(number),
                        "text": self.text(number),
                        "page_url": f"http://pages.example/{number}",
                        "source": "alt",
                        "snapshot": "A",
                        "file": "a.wat",
                        "texts": "t",
                        "status": "ok",
                        "error": "",
                        "http_status": 200,
                        "final_url": f"http://cdn.example/{number}",
                        "fetched": 1,
                        "bytes": len(data),
                        "format": "jpeg",
                        "sha256": self.sent(number),
                        "width": 8,
                        "height": 8,
                        "original_width": 8,
                        "original_height": 8,
                        "blurred": 0,
                        "staged": name,
                        "staged_offset": offset,
                        "staged_bytes": len(data),
                        "staged_sha256": hashlib.sha256(data).digest(),
                    }
                )
            tar.finish(stream)
        table = pa.Table.from_pylist(rows, schema=records.FETCHED)
        name = f"fetched-{part:05d}-of-{self.parts:05d}.parquet"
        pq.write_table(table, folder / name)

    def stages(self) -> Sequence[Stage]:
        """Balance and download by hand, screen and pack as they are."""

        def balance(attempt: Attempt) -> Stats:
            uids, buckets = sorted(self.uids), attempt.run.settings("match").buckets
            same = {"snapshot": "A", "query_ids": [0], "selected_by": [0], "occurrences": 1}
            for number, group in enumerate(dedup.groups(attempt.run)):
                own = [
                    u for u in uids if int.from_bytes(u, "big") * buckets >> 128 in range(*group)
                ]
                rows = [{"uid": uid, **same, "probability": 1.0} for uid in own]
                table = pa.Table.from_pylist(rows, schema=records.SELECTED)
                path = attempt.folder / f"selected-{number:05d}.parquet"
                pq.write_table(table, path, row_group_size=1 << 14)
            np.save(attempt.folder / "counts.npy", np.full(1, self.size, np.uint64))
            return Stats()

        def download(attempt: Attempt) -> Stats:
            self.write(attempt.run, attempt.folder, attempt.task.index)
            return Stats()

        def plan(run: Run) -> list[Task]:
            return [Task("download", n, params={"part": n}) for n in range(self.parts)]

        return (
            queries_of(),
            Stage("balance", (), lambda run: [Task("balance", 0)], balance),
            Stage("download", (), plan, download),
            screen.STAGE,
            pack.STAGE,
        )

    def build(self, run: Run) -> InlineExecutor:
        """As the command does, with what removals need before and after."""
        from dataset_build import purge

        executor = InlineExecutor()
        requests = purge.settle(run, self.stages())
        executor.advance(run, self.stages())
        purge.finish(Run(run.folder, run.config), requests)
        return executor


def run_in(folder: Path, pairs_per_shard: int = 40) -> Run:
    """A run without anything."""
    config = Config(
        pack=pack.PackSettings(pairs_per_shard=pairs_per_shard),
        screen=ScreenSettings(pairs_per_picture=2, drop_placeholders=False),
    )
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, config)
    runner.describe(run, Web(1).stages())
    return run

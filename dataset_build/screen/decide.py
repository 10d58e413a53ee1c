"""The verdict on every pair with a picture, and the cap once more.

A row here is the number that `staged` gives a picture. It is dropped for the first reason that
holds: first what is wrong with the picture itself, then what another pair has. Where
`balance.spare` selected more than the cap, each query then keeps the first of what is left to it,
by the same priorities, up to the cap.

A pair that keeps a picture takes over captions of those that yield to it, but not their queries:
what a query selected, and what counts towards its cap, is a caption that it occurs in.
"""

from __future__ import annotations

import fnmatch
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build import dedup, domains, records, selection, uid_range
from dataset_build.balance import BalanceSettings
from dataset_build.hashing import halves
from dataset_build.lists import Lists
from dataset_build.neighbours import changes
from dataset_build.recap import Survivors, recap
from dataset_build.screen import ScreenSettings, near, staged
from dataset_build.screen.alike import Alike
from dataset_build.screen.captions import Moved
from dataset_build.screen.duplicates import U32, Files, place_in_group
from dataset_build.screen.judge import Judge
from dataset_build.screen.verdicts import Verdicts
from dataset_build.thresholds import Thresholds, priority
from pipeline.stage import Attempt
from pipeline.stats import Stats


def decide(attempt: Attempt) -> Stats:
    """One `screened-*.parquet` per `fetched-*.parquet`, `downloaded.npy`, `survivors.json`."""
    with tempfile.TemporaryDirectory(prefix=".decide-", dir=attempt.folder) as folder:
        return _Decision(attempt, Path(folder)).write()


class _Part:
    """The pictures of one `fetched-*.parquet`, with the verdicts so far and who selected them."""

    def __init__(self, path: Path, table: pa.Table, start: int, selected: pa.Table) -> None:
        assert table["uid"].equals(selected["uid"]), f"{path}: not the selected pairs"
        numbered = staged.numbered(table)
        self.path = path
        self.table, selected = table.filter(numbered), selected.filter(numbered)
        self.uid = self.table["uid"].combine_chunks()
        self.selected_by = selected["selected_by"].combine_chunks()
        self.rows = slice(start, start + len(self.table))

    def survivors(self, kept: npt.NDArray[np.bool_], balance: BalanceSettings) -> Survivors:
        """The selections of the pairs that are kept."""
        row, query = selection.matches(self.selected_by)
        at = np.flatnonzero(kept[self.rows][row])
        row, query = row[at], query[at]
        high, low = halves(self.uid)
        domain = None
        if balance.final.per_domain is not None:
            domain = domains.hashed(domains.of_urls(self.table["url"]))[row]
        return Survivors(row, query, high[row], low[row], domain)


class _Decision:
    def __init__(self, attempt: Attempt, folder: Path) -> None:
        self.attempt = attempt
        self.settings: ScreenSettings = attempt.settings
        self.balance: BalanceSettings = attempt.run.settings("balance")
        self.fetched = self._inputs("download:fetched-*")
        self.selected = self._inputs("balance:selected-*")
        self.folder = folder
        self.stats = Stats()
        self.rows = sum(_pictures(path) for path in self.fetched)
        self.verdicts = Verdicts(self.rows, tuple(self.settings.scores))

    def _inputs(self, pattern: str) -> list[Path]:
        references = fnmatch.filter(self.attempt.task.reads, pattern)
        return [self.attempt.run.path(reference) for reference in references]

    def _parts(self, *columns: str) -> Iterator[_Part]:
        """All files in the order of uids."""
        start = 0
        for number, path in enumerate(self.fetched):
            self.attempt.stop.check()
            table = pq.read_table(path, columns=["uid", "url", *staged.COLUMNS, *columns])
            first, last = uid_range.of_file(path.name)
            about = [self.selected[group] for group in dedup.within(self.attempt.run, first, last)]
            own = uid_range.read(
                about, first, last, ["uid", "selected_by"], self.attempt.stop.check
            )
            part = _Part(path, table, start, own)
            yield part
            start = part.rows.stop
            self.attempt.progress(number + 1, len(self.fetched), "files")

    def write(self) -> Stats:
        path = self.folder / "uids.npy"
        uids = np.lib.format.open_memmap(path, "w+", np.dtype(">u8"), (self.rows, 2))
        judge = Judge(
            self.settings,
            Lists.of(self.attempt),
            looked=self._inputs("screen:looked-*"),
            evaluation=self._inputs("screen:evaluation-*"),
            hits=self._inputs("screen:hits-*"),
            stats=self.stats,
        )
        distance = self.settings.listed_distance
        alike = Alike(self.attempt.run.folder, distance, self._inputs("screen:looked-*"))
        for part in self._parts("sha256", "final_url"):
            uids[part.rows] = np.stack(halves(part.uid), axis=1)
            name = part.path.name.removeprefix("fetched-")
            alike.drop(name, part.table["uid"], part.rows, self.verdicts)
            judge.judge(name, part.table, part.rows, self.verdicts)
        leader = self._leaders(uids)
        moved, thresholds = self._survivors(leader)
        return self._write(leader, uids, moved, thresholds)

    def _leaders(self, uids: Any) -> U32:
        """The row that keeps each row's picture, itself where it is kept; drops the others."""
        settings = self.settings
        alive = self.verdicts.kept
        files = Files(self.rows)
        most = settings.placeholder_pairs if settings.drop_placeholders else None
        # Captions of an address lie side by side; they have its file, however many they are.
        first_of_address = changes(uids[:, 0])
        files.read(self.fetched, alive, first_of_address, most, self.attempt.stop.check)
        self.verdicts.drop(files.placeholder, "placeholder")
        alive = self.verdicts.kept
        limit = settings.pairs_per_picture
        if limit is not None:
            self.verdicts.drop(alive & (files.place >= limit), "duplicate_picture")
        edges = self._inputs("screen:edges-*")
        if not edges:
            return files.leader
        (classes,) = (np.load(path) for path in self._inputs("screen:classes.npy"))
        assert classes.size == self.rows, f"{classes.size} of {self.rows} pictures were compared"
        leader = near.leaders(classes, near.edges_of(edges), alive)
        # Of files without a telling hash, those that are equal are still the same picture.
        leader = np.where(classes == near.UNHASHED, files.leader, leader)
        if limit is not None:
            self.verdicts.drop(alive & (place_in_group(leader) >= limit), "near_duplicate")
        return leader

    def _survivors(self, leader: U32) -> tuple[Moved, Thresholds | None]:
        """Count what is downloaded and what is left of it, move captions, and apply the cap."""
        queries = np.load(self._inputs("balance:counts.npy")[0], mmap_mode="r").size
        kept = self.verdicts.kept
        yields = self.verdicts.among("duplicate_picture", "near_duplicate")
        moved = Moved(self.folder, self.rows)
        downloaded, survived = np.zeros(queries, np.uint64), np.zeros(queries, np.uint64)
        for part in self._parts("text"):
            row, query = selection.matches(part.selected_by)
            downloaded += selection.count(query, queries)
            survived += selection.count(query[kept[part.rows][row]], queries)
            at = np.flatnonzero(yields[part.rows])
            texts = part.table["text"].combine_chunks().take(pa.array(at))
            moved.add(leader[part.rows][at], texts)
        moved.finish()
        np.save(self.attempt.folder / "downloaded.npy", downloaded)
        balance = self.balance
        if not balance.spare or balance.mode == "metaclip":
            return moved, None

        def survivors() -> Iterator[Survivors]:
            for part in self._parts():
                yield part.survivors(kept, balance)

        return moved, recap(survivors, survived, balance.final, balance.seed)

    def _write(self, leader: U32, uids: Any, moved: Moved, thresholds: Thresholds | None) -> Stats:
        """The verdicts, file by file, the cap applied to what is left."""
        kept_by_file = []
        most = self.settings.captions_per_picture
        survives = self.verdicts.kept
        for part in self._parts("text"):
            selected_by = part.selected_by
            if thresholds is not None:
                left = part.survivors(survives, self.balance)
                h = priority(self.balance.seed)(left.high, left.low, left.query)
                within = thresholds.admit(left.high, left.low, left.query, h, left.domain)
                selected_by = selection.lists(left.row[within], left.query[within], len(part.uid))
                chosen = pc.list_value_length(selected_by).to_numpy(zero_copy_only=False) > 0
                self.verdicts.drop(~chosen, "over_cap", part.rows)
            reasons = self.verdicts.names(part.rows)
            keep = reasons == ""
            captions = moved.merged(part.rows.start, part.table["text"], keep, most)
            group = pa.py_buffer(uids[leader[part.rows]].tobytes())
            columns = [
                part.uid,
                pa.array(keep),
                pa.array(reasons, pa.string()),
                selected_by,
                captions,
                pa.FixedSizeBinaryArray.from_buffers(records.UID, len(keep), [None, group]),
            ]
            name = part.path.name.replace("fetched-", "screened-")
            table = pa.table(columns, schema=records.SCREENED)
            path = self.attempt.folder / name
            pq.write_table(table, path, compression="zstd", row_group_size=1 << 16)
            kept_by_file.append({"file": name, "kept": int(keep.sum())})
            self.stats.rows_in += len(table)
            self.stats.rows_out += int(keep.sum())
            self.stats.counts["captions_merged"] += len(captions.values) - int(keep.sum())
            for reason, rows in zip(*np.unique(reasons[~keep], return_counts=True), strict=True):
                self.stats.drop(str(reason), int(rows))
        text = json.dumps(kept_by_file, indent=1)
        (self.attempt.folder / "survivors.json").write_text(text)
        return self.stats


def _pictures(path: Path) -> int:
    """How many pictures of a file have a number."""
    found: int = pc.sum(staged.numbered(pq.read_table(path, columns=staged.COLUMNS))).as_py() or 0
    return found

"""What speaks against a picture whatever other pairs have: lists, evaluation sets, scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build import removed
from dataset_build.lists import Lists, ListsSettings
from dataset_build.screen import ScreenSettings
from dataset_build.screen.compare import LIST
from dataset_build.screen.scores import column
from dataset_build.screen.verdicts import Bool, Verdicts
from pipeline.manifest import Damaged
from pipeline.stats import Stats

LISTS = tuple(ListsSettings.model_fields)


class Judge:
    """Judges the pictures of one `fetched-*.parquet` after the other, in their order."""

    def __init__(
        self,
        settings: ScreenSettings,
        lists: Lists,
        looked: Sequence[Path],
        evaluation: Sequence[Path],
        hits: Sequence[Path],
        stats: Stats,
    ) -> None:
        self._scores, self._lists = settings.scores, lists
        self._looked = {path.name.removeprefix("looked-"): path for path in looked}
        self._files, self._near = _exact(evaluation), _near(hits)
        self._stats = stats

    def judge(self, name: str, table: pa.Table, rows: slice, verdicts: Verdicts) -> None:
        """Judge the pictures of file `fetched-NAME`, whose numbers are `rows`.

        `table` has `uid, url, final_url, sha256, status`. Raises `Damaged` if other pictures of
        the file were looked at.
        """
        if self._looked:
            self._check(self._looked[name], table["uid"])
        there = pc.not_equal(table["status"], removed.STATUS).to_numpy()
        verdicts.drop(~there, removed.STATUS, rows)
        self._by_lists(table, there, rows, verdicts)
        if self._files:
            self._by_evaluation(table["sha256"].to_pylist(), there, rows, verdicts)
        if self._scores:
            self._by_scores(self._looked[name], there, rows, verdicts)

    def _check(self, looked: Path, uids: pa.ChunkedArray) -> None:
        seen = pq.read_table(looked, columns=["uid"])["uid"]
        if not seen.equals(uids):
            raise Damaged(f"{looked}: {len(seen)} pictures, not the {len(uids)} of its download")

    def _by_lists(self, table: pa.Table, there: Bool, rows: slice, verdicts: Verdicts) -> None:
        lists = self._lists
        if not lists and not any(name.startswith(LIST) for name in self._near):
            return
        addresses = lists.codes_of_addresses(table["url"])
        moved = pc.not_equal(table["final_url"], table["url"]).fill_null(False)
        for row in np.flatnonzero(moved.to_numpy()) if lists else ():
            if reason := lists.reason_of_address(table["final_url"][int(row)].as_py()):
                code = lists.reasons.index(reason)
                addresses[row] = min(addresses[row] or code, code)  # the first reason
        kinds = {
            "address": addresses,
            "file": lists.codes_of_digests(table["sha256"]),
            "uid": lists.codes_of_uids(table["uid"]),
        }
        for reason in LISTS:
            code = lists.reasons.index(reason) if reason in lists.reasons else -1
            which = {kind: codes == code for kind, codes in kinds.items()}
            which["picture"] = self._distance(LIST + reason, rows) < FAR
            for kind, mask in which.items():
                listed = mask & there
                self._stats.observe(f"list:{reason}", kind, int(listed.sum()))
                verdicts.drop(listed, reason, rows)

    def _distance(self, name: str, rows: slice) -> npt.NDArray[np.uint8]:
        """How near each row is to a set's nearest picture, or `FAR`."""
        distance = np.full(rows.stop - rows.start, FAR, np.uint8)
        row, apart = self._near.get(name, _NO_HITS)
        first, last = np.searchsorted(row, [rows.start, rows.stop])
        # A set of several files has a hit for each that is near.
        np.minimum.at(distance, row[first:last] - rows.start, apart[first:last])
        return distance

    def _by_evaluation(
        self, digests: list[bytes], there: Bool, rows: slice, verdicts: Verdicts
    ) -> None:
        for evaluation, known in self._files.items():
            exact = there & np.array([digest in known for digest in digests], np.bool_)
            distance = np.where(there, self._distance(evaluation, rows), FAR)
            histogram = f"evaluation:{evaluation}"
            self._stats.observe(histogram, "exact", int(exact.sum()))
            for least in range(0, 32, 8):
                within = ~exact & (distance >= least) & (distance < least + 8)
                self._stats.observe(histogram, f"{least}+", int(within.sum()))
            verdicts.drop(exact | (distance < FAR), "evaluation", rows)

    def _by_scores(self, looked: Path, there: Bool, rows: slice, verdicts: Verdicts) -> None:
        table = pq.read_table(looked, columns=[column(name) for name in self._scores])
        for score, limits in self._scores.items():
            values = table[column(score)].to_numpy()
            self._observe(f"score:{score}", values[there])
            within = np.ones(values.size, np.bool_)
            # A score that is not a number is within no limit.
            if limits.at_least is not None:
                within &= values >= limits.at_least
            if limits.at_most is not None:
                within &= values <= limits.at_most
            verdicts.drop(~within, f"score:{score}", rows)

    def _observe(self, histogram: str, values: npt.NDArray[np.float32]) -> None:
        """Bins of one significant digit: 0.07, 0.08 … 0.1, 0.2 …"""
        rounded = [f"{value:.1g}" for value in values.tolist()]
        for label, rows in zip(*np.unique(rounded, return_counts=True), strict=True):
            plain = np.format_float_positional(float(label), trim="-")
            self._stats.observe(histogram, plain, int(rows))


FAR = 255
_NO_HITS = np.zeros(0, np.int64), np.zeros(0, np.uint8)


def _exact(paths: Sequence[Path]) -> dict[str, set[bytes]]:
    """The SHA-256 of the files of each evaluation set."""
    found: dict[str, set[bytes]] = {}
    for path in paths:
        table = pq.read_table(path, columns=["set", "sha256"])
        for name in table["set"].unique().to_pylist():
            own = table.filter(pc.equal(table["set"], name))
            found.setdefault(name, set()).update(own["sha256"].to_pylist())
    return found


def _near(paths: Sequence[Path]) -> dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
    """For each evaluation set the rows of pictures near one of it, ascending, and how near."""
    found = {}
    if paths:
        table = pa.concat_tables(pq.read_table(path) for path in paths).sort_by("row")
        for name in table["set"].unique().to_pylist():
            own = table.filter(pc.equal(table["set"], name))
            found[name] = own["row"].to_numpy().astype(np.int64), own["distance"].to_numpy()
    return found

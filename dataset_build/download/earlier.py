"""What earlier downloads of a run have fetched, so that nothing is asked for twice.

A picture is known by its address, the first half of a uid. Outcomes are taken over as they are,
failures too; the tars that hold the pictures become part of the new task's output under a second
name (a hard link), so nothing is copied, and the old task's output can go.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dataset_build import uid_range
from dataset_build.download import DownloadSettings
from dataset_build.records import FETCHED
from pipeline.manifest import Manifest, digest, everything
from pipeline.stage import Attempt

_OUTPUT = re.compile(r"(?:fetched|unused)-\d+-of-\d+\.parquet")
MARK = b"openwit.download"
_NO_OTHER_PICTURES = frozenset(
    {
        *("pairs_per_task", "expected", "ask_again_before", "timeout_s", "connect_timeout_s"),
        *("slow_bytes_per_s", "slow_s", "retries", "max_redirects"),
    }
)


def metadata(
    settings: DownloadSettings, version: int, others: Sequence[str] = ()
) -> dict[bytes, bytes]:
    """What marks outcomes: those of other settings, that make other pictures, are not taken. More
    patience makes no other pictures; to have it for what has failed, see `ask_again_before`.

    `others` identifies what the settings name: files, functions.
    """
    identity = settings.identity()
    for name in _NO_OTHER_PICTURES:
        del identity[name]
    return {MARK: digest([version, identity, *others]).encode()}


class Earlier:
    """Outcomes of a range of uids: by uid, and the best of each address; and where the tars are."""

    def __init__(
        self, attempt: Attempt, first: bytes, last: bytes, marks: dict[bytes, bytes]
    ) -> None:
        self.by_uid: dict[bytes, dict[str, Any]] = {}
        self.by_address: dict[bytes, dict[str, Any]] = {}
        self.tars: dict[str, Path] = {}
        self._folder = attempt.folder
        settings: DownloadSettings = attempt.settings
        stage_folder = attempt.run.stage_folder(attempt.task.stage)
        for manifest in everything(stage_folder, _elsewhere(attempt, first, last)):
            store = stage_folder / "store" / manifest.store
            paths = [store / name for name in _overlapping(manifest, first, last)]
            rows = _rows(paths, first, last, marks, attempt.stop.check)
            if rows:
                tars = (o.name for o in manifest.outputs if o.name.endswith(".tar"))
                self.tars.update({name: store / name for name in tars})
            for row in rows:
                moment = row["fetched"]  # what was removed has none
                if moment and settings.asks_again(row["status"], moment.timestamp()):
                    continue
                # Several may know a pair or an address: a picture is better than none.
                for known, key in ((self.by_uid, row["uid"]), (self.by_address, row["uid"][:8])):
                    if key not in known or (row["status"] == "ok") > (known[key]["status"] == "ok"):
                        known[key] = row

    def forget(self, uid: bytes) -> None:
        """Let nothing be known of a pair, nor of its address."""
        self.by_uid.pop(uid, None)
        self.by_address.pop(uid[:8], None)

    def keep(self, tar: str) -> None:
        """Make a tar an output of this task too."""
        target = self._folder / tar
        if not target.exists():
            os.link(self.tars[tar], target)


def _elsewhere(attempt: Attempt, first: bytes, last: bytes) -> Iterator[str]:
    """Fingerprints of tasks, as planned now, for uids that none of the range is among."""
    for planned in attempt.run.plan(attempt.task.stage):
        params = planned.task.params
        low, high = uid_range.bounds(params["part"], params["parts"])
        if low > last or high < first:
            yield planned.fingerprint


def _overlapping(manifest: Manifest, first: bytes, last: bytes) -> list[str]:
    names = []
    for output in manifest.outputs:
        if _OUTPUT.fullmatch(output.name):
            low, high = uid_range.of_file(output.name)
            if low <= last and high >= first:
                names.append(output.name)
    return names


def _rows(
    paths: list[Path],
    first: bytes,
    last: bytes,
    marks: dict[bytes, bytes],
    check: Callable[[], None],
) -> list[dict[str, Any]]:
    same = [
        path for path in paths if (pq.read_schema(path).metadata or {}).items() >= marks.items()
    ]
    if not same:
        return []
    rows: list[dict[str, Any]] = uid_range.read(same, first, last, FETCHED.names, check).to_pylist()
    return rows

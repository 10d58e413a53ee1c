"""Pictures that `download` staged: which pairs have one, and its bytes.

`screen` numbers pictures, in the order of uids over all files. A picture that was removed from the
run keeps its number, so what was found before its removal still says of all others what it said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from dataset_build import removed
from pipeline.manifest import Damaged
from pipeline.stage import Run


def tars(run: Run) -> dict[str, list[str]]:
    """The staged tars that hold the pictures of each `fetched-*.parquet`, as references."""
    found = {}
    for manifest in run.manifests("download"):
        names = [f"download:{output.name}" for output in manifest.outputs]
        own = [name for name in names if name.endswith(".tar")]
        found.update({name: own for name in names if "fetched-" in name})
    return found


COLUMNS = ["status", "staged_sha256"]
"""What `numbered` goes by."""
_NONE = pa.scalar(bytes(32), pa.binary(32))


def numbered(fetched: pa.Table | pa.RecordBatch) -> Any:
    """Which rows of `records.FETCHED` have a picture, or had one that was removed."""
    status, staged = fetched["status"], fetched["staged_sha256"]
    had = pc.and_kleene(pc.equal(status, removed.STATUS), pc.not_equal(staged, _NONE))
    return pc.or_kleene(pc.equal(status, "ok"), had)


class Pictures:
    """Reads pictures out of some staged tars."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._streams: dict[str, BinaryIO] = {path.name: path.open("rb") for path in paths}

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._streams.values():
            stream.close()

    def read(self, outcome: dict[str, Any]) -> bytes:
        """A picture's bytes. Raises `Damaged` if they are not what was stored."""
        stream = self._streams[outcome["staged"]]
        stream.seek(outcome["staged_offset"])
        data = stream.read(outcome["staged_bytes"])
        if hashlib.sha256(data).digest() != outcome["staged_sha256"]:
            raise Damaged(f"{stream.name}: the picture of {outcome['uid'].hex()} has changed")
        return data

"""Pictures that `download` staged, read from where their outcomes say that they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

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

"""The record of a training run: one JSON line for every few steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from pipeline import files


class Metrics:
    """Appends to `metrics.jsonl`; opened at a step, it first forgets what came after that step.

    A run that goes on from a checkpoint repeats the steps since; each is recorded once.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._step = step
        self._stream: IO[str] | None = None

    def __enter__(self) -> Metrics:
        kept = "".join(_until(self._path, self._step)) if self._step else ""
        files.write_atomic(self._path, kept)
        self._stream = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._stream is not None
        self._stream.close()

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; it has a `step`, the number of steps done."""
        assert self._stream is not None
        short = {k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in row.items()}
        self._stream.write(json.dumps(short) + "\n")
        self._stream.flush()


def _until(path: Path, step: int) -> list[str]:
    """The lines of steps up to `step`; the file ends at the first line that is torn."""
    lines: list[str] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return lines
    for line in text.splitlines(keepends=True):
        try:
            if int(json.loads(line)["step"]) > step or not line.endswith("\n"):
                break
        except (ValueError, KeyError, TypeError):
            break
        lines.append(line)
    return lines

"""Captions of pairs that yielded their picture to another, brought to that other pair.

They are met in the order of uids and wanted in that of the pairs that keep a picture, anywhere
among all files: so they are sorted out into a file for each range of rows, on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_MOST_FILES = 256  # open at one time; of 460 million pairs with 60 million captions, 25 MB each
_SCHEMA = pa.schema([("leader", pa.uint32()), ("text", pa.string())])


class Moved:
    """Captions by the row of the pair that takes them over."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._ranges = max(1, min(_MOST_FILES, rows >> 12))
        self._width = max(1, -(-rows // self._ranges))
        self._paths = [folder / f"captions-{number}.arrow" for number in range(self._ranges)]
        self._open = ExitStack()
        self._writers = [
            self._open.enter_context(pa.ipc.new_stream(str(path), _SCHEMA)) for path in self._paths
        ]
        self._takes = np.zeros(rows, np.bool_)
        self._held: tuple[int, dict[int, list[str]]] = (-1, {})

    def add(self, leader: npt.NDArray[np.uint32], texts: pa.Array) -> None:
        """Move texts to rows; the texts of a row stay in the order in which they are added."""
        order = np.argsort(leader, kind="stable")
        leader, texts = leader[order], texts.take(pa.array(order))
        self._takes[leader] = True
        numbers = leader // self._width
        for number in np.unique(numbers).tolist():
            start, stop = np.searchsorted(numbers, [number, number + 1]).tolist()
            part = [pa.array(leader[start:stop]), texts.slice(start, stop - start)]
            self._writers[number].write_table(pa.table(part, schema=_SCHEMA))

    def finish(self) -> None:
        """All are added."""
        self._open.close()

    def merged(
        self, start: int, own: pa.ChunkedArray, kept: npt.NDArray[np.bool_], most: int
    ) -> pa.Array:
        """For rows from `start` on, each call's after those before: `list<string>`, a row's own
        caption and different ones moved to it, `most` in all; none where it is not kept."""
        number = kept.astype(np.int64)
        more: list[str] = []
        for at in np.flatnonzero(kept & self._takes[start : start + kept.size]).tolist():
            text = own[at].as_py()
            found = list(dict.fromkeys((text, *self._moved_to(start + at))))[1:most]
            number[at] += len(found)
            more += found
        row = np.repeat(np.arange(kept.size), number)
        offsets = np.concatenate([[0], number.cumsum()]).astype(np.int32)
        first = np.zeros(row.size, np.bool_)
        first[offsets[:-1][kept]] = True
        row[~first] = kept.size + np.arange(len(more))
        texts = pa.concat_arrays([*own.chunks, pa.array(more, pa.string())])
        return pa.ListArray.from_arrays(pa.array(offsets), texts.take(pa.array(row)))

    def _moved_to(self, row: int) -> Sequence[str]:
        number = row // self._width
        if self._held[0] != number:
            found: dict[int, list[str]] = {}
            with pa.OSFile(str(self._paths[number])) as stream, pa.ipc.open_stream(stream) as parts:
                for batch in parts:
                    leaders, texts = batch["leader"].to_pylist(), batch["text"].to_pylist()
                    for leader, text in zip(leaders, texts, strict=True):
                        found.setdefault(leader, []).append(text)
            self._held = number, found
        return self._held[1].get(row, ())

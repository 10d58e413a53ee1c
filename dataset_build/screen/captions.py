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
        self._held: tuple[int, dict[int, list[str]]] = (-1, {})

    def add(self, leader: npt.NDArray[np.uint32], texts: pa.Array) -> None:
        """Move texts to rows; the texts of a row stay in the order in which they are added."""
        order = np.argsort(leader, kind="stable")
        leader, texts = leader[order], texts.take(pa.array(order))
        numbers = leader // self._width
        for number in np.unique(numbers).tolist():
            start, stop = np.searchsorted(numbers, [number, number + 1]).tolist()
            part = [pa.array(leader[start:stop]), texts.slice(start, stop - start)]
            self._writers[number].write_table(pa.table(part, schema=_SCHEMA))

    def finish(self) -> None:
        """All are added."""
        self._open.close()

    def merged(self, row: int, own: str, most: int) -> Sequence[str]:
        """A row's own caption and the other different ones moved to it; rows ascend."""
        number = row // self._width
        if self._held[0] != number:
            found: dict[int, list[str]] = {}
            with pa.OSFile(str(self._paths[number])) as stream, pa.ipc.open_stream(stream) as parts:
                for batch in parts:
                    for leader, text in zip(
                        batch["leader"].to_pylist(), batch["text"].to_pylist(), strict=True
                    ):
                        found.setdefault(leader, []).append(text)
            self._held = number, found
        moved = self._held[1].get(row, ())
        return list(dict.fromkeys((own, *moved)))[:most]

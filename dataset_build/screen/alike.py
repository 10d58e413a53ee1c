"""What looks like a picture that somebody asked to have removed.

Requests are named by no plan, as in `download`, so they make no decision anew that stands: a copy
from elsewhere goes when the next one is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build import removed
from dataset_build.screen import perceptual
from dataset_build.screen.verdicts import Verdicts


class Alike:
    """Drops pictures of one `looked-*.parquet` after the other, up to `distance` bits away."""

    def __init__(self, run_folder: Path, distance: int, looked: Sequence[Path]) -> None:
        hashes = removed.looks(run_folder)
        self._index = perceptual.Index(hashes.astype(">u8").view("u8"))
        self._distance = distance
        self._looked = {path.name.removeprefix("looked-"): path for path in looked if len(hashes)}

    def drop(self, name: str, uids: pa.ChunkedArray, rows: slice, verdicts: Verdicts) -> None:
        """Judge the pictures of file `fetched-NAME`, whose numbers are `rows`."""
        if name not in self._looked:
            return
        table = pq.read_table(self._looked[name], columns=["uid", "pdq"])
        near, *_ = self._index.within(perceptual.packed(table["pdq"].to_pylist()), self._distance)
        alike = table["uid"].take(pa.array(np.unique(near))).combine_chunks()
        verdicts.drop(pc.is_in(uids, value_set=alike).to_numpy(), removed.STATUS, rows)

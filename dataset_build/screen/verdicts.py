"""Verdicts on pictures, a byte each: kept, or the first reason for which one was dropped."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dataset_build.screen import REASONS

Bool = npt.NDArray[np.bool_]


class Verdicts:
    """One verdict for every row; all are kept at first."""

    def __init__(self, rows: int, scores: tuple[str, ...]) -> None:
        self._names = ["", *(name for name in REASONS if name != "score:NAME")]
        self._names += [f"score:{name}" for name in scores]
        assert len(self._names) <= 256, f"{len(scores)} scores"
        self._verdict = np.zeros(rows, np.uint8)

    @property
    def kept(self) -> Bool:
        """Which rows are kept so far."""
        kept: Bool = self._verdict == 0
        return kept

    def drop(self, which: Bool, reason: str, rows: slice = slice(None)) -> int:
        """Drop `which` of `rows`, but for those that another reason has dropped; how many."""
        own = self._verdict[rows]
        fresh = which & (own == 0)
        own[fresh] = self._names.index(reason)
        return int(fresh.sum())

    def among(self, *reasons: str) -> Bool:
        """Which rows are dropped for one of some reasons."""
        return np.isin(self._verdict, [self._names.index(reason) for reason in reasons])

    def names(self, rows: slice) -> npt.NDArray[np.object_]:
        """The reason of each row, "" where it is kept."""
        return np.array(self._names, dtype=object)[self._verdict[rows]]

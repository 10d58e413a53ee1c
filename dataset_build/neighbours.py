"""Equal neighbours in sorted arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def changes(*columns: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where a row differs from the one before; the first always does."""
    differs = np.ones(columns[0].size, np.bool_)
    differs[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return differs


def place_in_run(*columns: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """0, 1, 2 … within each run of equal rows."""
    start = np.flatnonzero(changes(*columns))
    rows = columns[0].size
    return np.arange(rows) - np.repeat(start, np.diff(np.append(start, rows)))

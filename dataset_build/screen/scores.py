"""Scores of the user's choice, by plain functions, see `dataset_build.functions`.

A function takes a list of pictures, uint8 [height, width, 3] in RGB, and a list of their captions,
and returns a float32 array with a value for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dataset_build import functions
from pipeline.config import ConfigError

Picture = npt.NDArray[np.uint8]
Score = Callable[[Sequence[Picture], Sequence[str]], npt.NDArray[np.float32]]


def column(name: str) -> str:
    """The column of `looked-*.parquet` that holds a score."""
    return f"score_{name}"


def setting(name: str) -> str:
    """The setting that names the function of a score."""
    return f"screen.scores.{name}.function"


def load(chosen: Mapping[str, Sequence[str]]) -> dict[str, Score]:
    """The functions by the name of their column; `chosen`: name -> (function, its identity).

    Raises `ConfigError` if the source is not what the task was planned with.
    """
    return {
        column(name): functions.load(setting(name), function, planned)
        for name, (function, planned) in chosen.items()
    }


def score(
    loaded: Mapping[str, Score], pictures: Sequence[Picture], texts: Sequence[str]
) -> dict[str, npt.NDArray[np.float32]]:
    """What each function says of some pictures, which none may change. Raises `ConfigError` naming
    the score if it is not a value each."""
    found = {}
    for name, function in loaded.items():
        with functions.called(setting(name.removeprefix(column("")))):
            values = np.asarray(function(pictures, texts))
        if values.shape != (len(pictures),) or values.dtype.kind not in "fiub":
            raise ConfigError(
                f"screen.scores.{name.removeprefix(column(''))}: its function returned "
                f"{values.dtype} {list(values.shape)} for {len(pictures)} pictures; "
                "a number for each is wanted"
            )
        found[name] = values.astype(np.float32)
    return found

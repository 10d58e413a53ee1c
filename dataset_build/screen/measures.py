"""Scores that need no model's weights, for `screen.scores`; also an example of how to write one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from dataset_build.screen.scores import Picture

Scores = npt.NDArray[np.float32]


def sharpness(pictures: Sequence[Picture], texts: Sequence[str]) -> Scores:
    """Variance of the Laplacian of the grey picture: some 10 where it is blurred, 1,000 where sharp
    (Pech-Pacheco et al. 2000)."""
    greys = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in pictures]
    return np.array([cv2.Laplacian(grey, cv2.CV_64F).var() for grey in greys], np.float32)


def entropy(pictures: Sequence[Picture], texts: Sequence[str]) -> Scores:
    """Bits of information in a pixel's grey, 0 to 8: below 2 are plain areas and line drawings."""
    values = []
    for picture in pictures:
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        share = np.bincount(grey.ravel(), minlength=256) / grey.size
        share = share[share > 0]
        values.append(-(share * np.log2(share)).sum())
    return np.array(values, np.float32)


def faces(pictures: Sequence[Picture], texts: Sequence[str]) -> Scores:
    """Largest share of the picture's area that a frontal face takes, 0 where none is found.

    By OpenCV's cascade (Viola, Jones 2001): quick, and blind to faces in profile or in the dark.
    """
    values = []
    for picture in pictures:
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        boxes = _cascade().detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5)
        largest = max((int(width) * int(height) for _, _, width, height in boxes), default=0)
        values.append(largest / grey.size)
    return np.array(values, np.float32)


@functools.cache
def _cascade() -> Any:
    file = Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"
    cascade = cv2.CascadeClassifier(str(file))
    assert not cascade.empty(), file
    return cascade

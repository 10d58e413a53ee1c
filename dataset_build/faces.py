"""Frontal faces in pictures, by the cascade that comes with OpenCV (Viola, Jones 2001).

Quick, without weights of a model to be had from elsewhere, and blind to faces in profile or in the
dark: an example for `download.blur`; where it matters, name a detector of today there.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt


def boxes(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Of a picture, uint8 [height, width, 3] in RGB, the boxes of its faces: [n, 4], left, top,
    right and bottom as shares of its width and height."""
    height, width = picture.shape[:2]
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    found = _cascade().detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5)
    corners = [[x, y, x + w, y + h] for x, y, w, h in found]
    return np.array(corners, np.float64).reshape(-1, 4) / [width, height, width, height]


@functools.cache
def _cascade() -> Any:
    file = Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"
    cascade = cv2.CascadeClassifier(str(file))
    assert not cascade.empty(), file
    return cascade

"""Parts of pictures made unrecognisable before they are stored, where a function finds them.

Soft-edged, as for the ImageNet with blurred faces (Yang et al. 2022, §4). In whole numbers, so that
every machine stores the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from dataset_build import functions
from pipeline.config import ConfigError

Find = Callable[[npt.NDArray[np.uint8]], Any]
"""A picture, uint8 [height, width, 3] in RGB -> boxes [n, 4]: left, top, right and bottom as shares
of its width and height."""

_MARGIN = 0.1  # of the longer side of a box, all around it


def found(find: Find, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """What `find` finds in a picture, grey [height, width] or BGR [height, width, 3].

    Raises `ConfigError` if that is no boxes, or if `find` fails.
    """
    grey = picture.ndim == 2
    rgb: Any = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB if grey else cv2.COLOR_BGR2RGB)
    with functions.called("download.blur"):
        boxes = np.atleast_1d(np.asarray(find(rgb), np.float64))
    left_top, right_bottom = boxes[..., :2], boxes[..., 2:]
    if boxes.size and not (
        boxes.shape[1:] == (4,)
        and (left_top >= 0).all()
        and (left_top <= right_bottom).all()
        and (right_bottom <= 1).all()
    ):
        raise ConfigError(
            f"download.blur: its function returned {boxes.tolist()!r:.100}, no boxes of left, top,"
            " right and bottom as shares of width and height"
        )
    return boxes.reshape(-1, 4)


def blurred(picture: npt.NDArray[np.uint8], boxes: npt.NDArray[np.float64]) -> Any:
    """A copy of a picture, [height, width] or [height, width, 3], without what is in the boxes."""
    if not len(boxes):
        return picture
    height, width = picture.shape[:2]
    corners = boxes * [width, height, width, height]
    sides = (corners[:, 2:] - corners[:, :2]).max(1, keepdims=True)
    corners += sides * _MARGIN * np.array([-1, -1, 1, 1])
    mask = np.zeros((height, width), np.uint8)
    for left, top, right, bottom in np.rint(corners).astype(int).clip(0):
        mask[top:bottom, left:right] = 255
    sigma = max(1.0, float(sides.max()) * _MARGIN)
    weight = cv2.GaussianBlur(mask, (0, 0), sigma).astype(np.uint16)
    weight = np.maximum(weight, mask)  # soft outwards only: within the boxes nothing shows through
    if picture.ndim == 3:
        weight = weight[..., np.newaxis]
    smooth = cv2.GaussianBlur(picture, (0, 0), 2 * sigma).astype(np.uint16)
    return ((picture * (255 - weight) + smooth * weight + 127) // 255).astype(np.uint8)

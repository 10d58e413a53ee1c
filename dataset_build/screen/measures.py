"""Scores that need no model's weights, for `screen.scores`; also an example of how to write one."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from dataset_build.faces import boxes as find_faces
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

    See `dataset_build.faces` for which are.
    """
    corners = (find_faces(picture) for picture in pictures)
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in corners)
    return np.array([area.max(initial=0) for area in areas], np.float32)

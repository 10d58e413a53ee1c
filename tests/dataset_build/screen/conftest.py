from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.dataset_build.screen.pool import Picture, Pool


@pytest.fixture
def pool(tmp_path: Path, publish_files: Any, run_stage: Any) -> Pool:
    return Pool(tmp_path, publish_files, run_stage)


@pytest.fixture(scope="session")
def photos(real_data: Path) -> list[Picture]:
    """200 real photos, of a class each."""
    found: list[Picture] = []
    with tarfile.open(real_data / "photos" / "photos-200.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg") and (content := tar.extractfile(member)):
                pixels: Any = cv2.imdecode(np.frombuffer(content.read(), "u1"), cv2.IMREAD_COLOR)
                found.append(pixels)
    return found

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest

from tests.dataset_build.download.conftest import picture

SIZES = ((64, 48), (300, 200), (200, 300), (640, 512), (1500, 100))


@pytest.mark.filterwarnings("ignore:value is deprecated:DeprecationWarning")
@pytest.mark.parametrize("only_if_bigger", [True, False])
@pytest.mark.parametrize(
    "mode", ["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]
)
def test_pictures_are_the_very_bytes_of_img2dataset(
    staging: Any, mode: str, only_if_bigger: bool
) -> None:
    options = {"encode_quality": 90, "min_image_size": 16, "max_aspect_ratio": 10.0}
    ours = staging.EightBitResizer(256, mode, only_if_bigger, **options)
    theirs = staging.Resizer(256, mode, only_if_bigger, **options)
    for seed, (width, height) in enumerate(SIZES):
        data = picture(seed, width, height)
        expected = theirs(io.BytesIO(data))
        assert ours(io.BytesIO(data)) == expected
        assert (expected[0] is None) == (width == 1500)


def test_a_download_does_without_torch_and_leaves_it_to_others() -> None:
    program = """
import sys
from dataset_build.download.pictures import absent
with absent("torch"):
    from dataset_build.download import staging
assert "torch" not in sys.modules
import torch
with absent("torch"):
    assert sys.modules["torch"] is torch
assert sys.modules["torch"] is torch
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)

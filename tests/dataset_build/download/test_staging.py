from __future__ import annotations

import io
import logging
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.config import ConfigError
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


@pytest.mark.parametrize("order", ["MM", "II"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_stored_as_its_tag_says_to_show_it(
    staging: Any, orientation: int, order: str
) -> None:
    ramps = np.zeros((60, 90, 3), np.uint8)
    ramps[..., 0], ramps[..., 1] = np.arange(0, 180, 2), np.arange(0, 240, 4)[:, None]
    plain = Image.fromarray(ramps)
    exif = Image.Exif()
    exif.endian = ">" if order == "MM" else "<"
    exif[0x10F], exif[0x112] = "Maker", orientation
    sent = io.BytesIO()
    plain.save(sent, "JPEG", quality=95, exif=exif)
    assert order.encode() + (b"\0*" if order == "MM" else b"*\0") in sent.getvalue()
    assert staging.is_turned(sent.getvalue()) == (2 <= orientation <= 8)
    ours = staging.EightBitResizer(48, "keep_ratio", False, encode_quality=95)
    stored, width, height, *original, error = ours(io.BytesIO(sent.getvalue()))
    upright = ImageOps.exif_transpose(Image.open(sent)).convert("RGB")
    assert error is None and (width > height) == (upright.width > upright.height)
    assert tuple(original) == upright.size
    shown = np.asarray(Image.open(io.BytesIO(stored)), np.int16)
    expected = np.asarray(upright.resize((width, height), Image.Resampling.BOX), np.int16)
    assert np.abs(shown - expected).mean() < 4
    assert not staging.is_turned(stored)


def test_a_broken_tag_turns_nothing(staging: Any) -> None:
    data = picture(1, 90, 60)
    for exif in (b"", b"MM", b"MM\0*\0\0\0\xff", b"II*\0\x08\0\0\0\xff\xff", b"nothing at all"):
        body = b"Exif\0\0" + exif
        segment = b"\xff\xe1" + (2 + len(body)).to_bytes(2, "big") + body
        assert not staging.is_turned(data[:2] + segment + data[2:])
    assert not staging.is_turned(data[:2])


def test_decoders_write_nowhere_and_the_log_loses_nothing(
    staging: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = picture(0, 300, 200)
    broken = whole[: len(whole) // 2] + b"\xff\xd9"
    staging.cv2.imdecode(np.frombuffer(broken, np.uint8), -1)
    assert "Corrupt JPEG data" in capfd.readouterr().err
    root = logging.getLogger()
    lines = [f"line {number}" for number in range(2000)]
    thread = threading.Thread(target=lambda: [root.warning(line) for line in lines])
    with open(2, "w", closefd=False) as stream:
        root.addHandler(handler := logging.StreamHandler(stream))
        try:
            thread.start()
            resizer, times = staging.EightBitResizer(256, "keep_ratio", True), 0
            while thread.is_alive() or times < 10:
                assert resizer(io.BytesIO(broken))[-1] is None
                times += 1
            thread.join()
        finally:
            root.removeHandler(handler)
    assert capfd.readouterr().err.split("\n")[:-1] == lines


def test_what_a_function_logs_is_not_lost(staging: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor does it wait for ever if it logs in a thread of its own."""
    root = logging.getLogger()

    def find(picture: Any) -> Any:
        thread = threading.Thread(target=lambda: root.warning("found by a thread"), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        return picture.nothing

    with open(2, "w", closefd=False) as stream:
        root.addHandler(handler := logging.StreamHandler(stream))
        try:
            resizer = staging.EightBitResizer(64, "keep_ratio", True, find=find)
            with pytest.raises(ConfigError, match="its function failed: AttributeError"):
                resizer(io.BytesIO(picture(0, 300, 200)))
        finally:
            root.removeHandler(handler)
    said = capfd.readouterr().err
    assert "found by a thread" in said
    assert "return picture.nothing" in said, "where it failed"


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

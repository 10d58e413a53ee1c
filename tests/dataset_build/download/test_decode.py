from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.dataset_build.download.bombs import BOMBS
from tests.dataset_build.download.conftest import chunk, png

ROOT = Path(__file__).parents[3]


def saved(pixels: npt.NDArray[Any], form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def resizer(kind: Any, side: int = 32) -> Any:
    return kind(side, "keep_ratio", True, encode_quality=95)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_ordinary_pictures_come_out_as_img2dataset_makes_them(
    form: str, mode: str, staging: Any
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels if mode == "RGBA" else pixels[..., :3]).convert(mode)
    stream = io.BytesIO()
    picture.save(stream, form, lossless=True)
    ours = resizer(staging.EightBitResizer)(io.BytesIO(stream.getvalue()))
    theirs = resizer(staging.Resizer)(io.BytesIO(stream.getvalue()))
    assert ours == theirs
    assert ours[5] is None


def test_every_transparency_of_every_colour_is_rounded_right(staging: Any) -> None:
    from dataset_build.download import decode

    colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    bgra = np.dstack([colour, colour, colour, alpha])
    exact = np.rint(alpha / 255 * colour + 255 - alpha).clip(0, 255)
    assert (decode._on_white(bgra)[..., 1] == exact).all()


def test_sixteen_bits_keep_their_upper_half(staging: Any) -> None:
    from dataset_build.download import decode

    rows = b"".join(b"\0" + bytes([row, 200] * 64) for row in range(64))
    found = decode.pixels(png(64, 64, rows, bits=16))
    assert found.dtype == np.uint8
    assert (found == np.arange(64)[:, None]).all()


def test_what_no_pixel_depends_on_reaches_no_decoder(staging: Any) -> None:
    from dataset_build.download import decode

    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    plain = saved(pixels, "PNG")
    extra = chunk(b"iCCP", b"profile") + chunk(b"tEXt", b"k\0GPS") + chunk(b"eXIf", b"MM GPS")
    assert decode.png_essence(plain[:33] + extra + plain[33:]) == plain
    first = saved(pixels, "GIF")
    frames = [Image.fromarray(np.roll(pixels, shift, 0)) for shift in (0, 5, 9)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=10)
    cut = decode.gif_essence(stream.getvalue())
    assert len(cut) < len(stream.getvalue()) / 2
    assert Image.open(io.BytesIO(cut)).n_frames == 1  # type: ignore[attr-defined]
    assert (decode.pixels(stream.getvalue()) == decode.pixels(first)).all()


@given(st.sampled_from(["PNG", "GIF"]), st.data())
def test_damaged_files_end_in_pixels_or_a_refusal(form: str, data: st.DataObject) -> None:
    from dataset_build.download import decode
    from dataset_build.download.probe import NotPicture

    damaged = bytearray(saved(np.arange(900, dtype=np.uint8).reshape(30, 30), form))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    essence = decode.png_essence if form == "PNG" else decode.gif_essence
    try:
        assert len(essence(bytes(damaged))) <= len(damaged)
    except NotPicture as refused:
        assert refused.reason in ("undecodable", "truncated")


@pytest.fixture(scope="module")
def defused() -> dict[str, dict[str, Any]]:
    """What became of each bomb, in processes of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.dataset_build.download.bombs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rows = (line.split("\t") for line in done.stdout.splitlines())
    return {json.loads(name): json.loads(found or "{}") for name, _, found in rows}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_defused(name: str, defused: dict[str, dict[str, Any]]) -> None:
    found = defused[name]
    assert found, "its process was lost"
    assert found["reason"] == BOMBS[name][1]
    assert found["mib"] <= 2560
    assert found["cpu_s"] <= 10

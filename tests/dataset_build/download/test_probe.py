from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset_build.download.probe import NotPicture, kind, probe

FORMS = [
    ("jpeg", {}),
    ("jpeg", {"progressive": True}),
    ("png", {}),
    ("webp", {}),
    ("webp", {"lossless": True}),
    ("gif", {}),
]


def encoded(form: str, width: int, height: int, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize(("form", "options"), FORMS)
@pytest.mark.parametrize("size", [(1, 1), (17, 300), (640, 3)])
def test_kind_and_size(form: str, options: dict[str, object], size: tuple[int, int]) -> None:
    found = probe(encoded(form, *size, **options))
    assert (found.kind, found.width, found.height) == (form, *size)


def test_sixteen_bits_and_transparency_are_seen() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(stream, "png")
    assert probe(stream.getvalue()).bits == 16
    found = probe(encoded("webp", 33, 44, "RGBA"))  # the extended container
    assert (found.width, found.height) == (33, 44)


@pytest.mark.parametrize(("form", "options"), FORMS[:5])
def test_every_truncation_is_told(form: str, options: dict[str, object]) -> None:
    whole = encoded(form, 40, 30, **options)
    for length in range(12, len(whole) - 1, 7):
        with pytest.raises(NotPicture) as refused:
            probe(whole[:length])
        assert refused.value.reason == "truncated"


def test_the_thumbnail_of_a_truncated_photo_does_not_make_it_whole() -> None:
    whole = encoded("jpeg", 40, 30)
    thumbnail = encoded("jpeg", 8, 8)
    exif = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    photo = whole[:2] + exif + whole[2:]
    assert probe(photo).width == 40
    with pytest.raises(NotPicture, match="end-of-image"):
        probe(photo[:-200])


@pytest.mark.parametrize(
    "head",
    [b"", b"BM", b"II*\0", b"<svg", b"\0\0\0\x0cjP  ", b"%PDF", b"\x1f\x8b", b"P6\n", b"v/1\x01"],
)
def test_no_other_format_passes(head: bytes) -> None:
    assert kind(head + bytes(20)) == ""


@given(st.sampled_from(FORMS), st.data())
def test_damaged_bytes_end_in_an_answer_or_a_refusal(
    form: tuple[str, dict[str, object]], data: st.DataObject
) -> None:
    damaged = bytearray(encoded(form[0], 30, 20, **form[1]))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    try:
        found = probe(bytes(damaged))
    except NotPicture as refused:
        assert refused.reason in ("not_an_image", "truncated", "undecodable")
    else:
        assert found.width
        assert found.height

"""Small files that unfold to a lot, in every format that may reach a decoder.

Run as a program it puts each through probe and resizer in a process of its own, as a task does, and
prints what came of it, the process's peak memory and the processor time.
"""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import sys
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from dataset_build.download import DownloadSettings, guard, pictures, probe
from dataset_build.download.outcome import _DECODER as DECODER
from tests.dataset_build.download.conftest import chunk

SIDE = 5000  # squared: the most pixels that are decoded


def zeros(megabytes: int) -> bytes:
    """A zlib stream of so many MiB, its end missing; nobody gets there."""
    squeeze = zlib.compressobj(9)
    first, again = (
        squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    return first + again * (megabytes - 1)


def png(
    side: int, bits: int, colour: int, extra: bytes = b"", data: bytes = b"", interlaced: int = 0
) -> bytes:
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    size = side * (1 + side * bits * channels // 8)
    if interlaced:  # Adam7: pixels of each pass from x, y in steps of dx, dy
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4)]
        passes += [(1, 0, 2, 2), (0, 1, 1, 2)]
        size = sum(
            -(-(side - y) // dy) * (1 + -(-(side - x) // dx) * bits * channels // 8)
            for x, y, dx, dy in passes
        )
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, interlaced))
    data = data or zlib.compress(bytes(size), 1)
    start = b"\x89PNG\r\n\x1a\n" + head + extra
    return start + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def flat(form: str, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (SIDE, SIDE)).save(stream, form, **options)
    return stream.getvalue()


def noisy(form: str, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def jpeg_of_scans(count: int, progressive: bool = True) -> bytes:
    whole = flat("JPEG", progressive=progressive)
    scan, end = whole.rfind(b"\xff\xda"), whole.rfind(b"\xff\xd9")
    return whole[:end] + whole[scan:end] * count + whole[end:]


def riff(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def animated_webp(frames: int) -> bytes:
    size = (SIDE - 1).to_bytes(3, "little") * 2
    picture = flat("WEBP", method=0)[12:]  # the one chunk of a still picture
    frame = riff(b"ANMF", bytes(6) + size + (10).to_bytes(3, "little") + b"\0" + picture)
    head = riff(b"VP8X", b"\x02\0\0\0" + size) + riff(b"ANIM", bytes(6))
    return riff(b"RIFF", b"WEBP" + head + frame * frames)


def gif_of_frames(frames: int) -> bytes:
    whole = flat("GIF", "P")
    start = 13 + (3 << (whole[10] & 7) + 1)
    return whole[:start] + whole[start:-1] * frames + b";"


def gif_beyond_its_canvas() -> bytes:
    """A frame of 65,535 squared on a canvas of 64."""
    whole = flat("GIF", "P")
    start = 13 + (3 << (whole[10] & 7) + 1)
    frame = whole.index(b"\x2c", start)
    wide = whole[: frame + 5] + b"\xff" * 4 + whole[frame + 9 :]
    return wide[:6] + struct.pack("<HH", 64, 64) + wide[10:]


def animated_png(frames: int) -> bytes:
    control = struct.pack(">IIIIIHHBB", 0, SIDE, SIDE, 0, 0, 1, 10, 0, 0)
    extra = chunk(b"acTL", struct.pack(">II", frames, 0)) + chunk(b"fcTL", control)
    return png(SIDE, 8, 6, extra)


PALETTE = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256))

# How to make it, and what becomes of it.
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "jpeg": (lambda: flat("JPEG", subsampling=0), "ok"),
    "jpeg in CMYK": (lambda: flat("JPEG", "CMYK"), "ok"),
    "jpeg, progressive, noise": (lambda: noisy("JPEG", progressive=True, quality=50), "ok"),
    "jpeg of 38 scans": (lambda: jpeg_of_scans(28), "ok"),
    "jpeg of 30,000 scans": (lambda: jpeg_of_scans(30_000), "too_many_pixels"),
    "jpeg, sequential, of 100 scans": (lambda: jpeg_of_scans(99, progressive=False), "ok"),
    "png of 8-bit RGBA": (lambda: png(SIDE, 8, 6), "ok"),
    "png of 16-bit RGBA": (lambda: png(SIDE, 16, 6), "ok"),
    "png of 16-bit RGBA, interlaced": (lambda: png(SIDE, 16, 6, interlaced=1), "ok"),
    "png of 16-bit grey and alpha": (lambda: png(SIDE, 16, 4), "ok"),
    "png with a palette of alpha": (lambda: png(SIDE, 8, 3, PALETTE), "ok"),
    "png of 30,000 squared": (lambda: png(30_000, 1, 0), "too_many_pixels"),
    "png with texts": (lambda: png(64, 8, 2, chunk(b"zTXt", b"k\0\0" + zeros(7)) * 900), "ok"),
    "png with UTF-8 texts": (
        lambda: png(64, 8, 2, chunk(b"iTXt", b"k\0\1\0\0\0" + zeros(7)) * 900),
        "ok",
    ),
    "png with a profile": (lambda: png(64, 8, 2, chunk(b"iCCP", b"k\0\0" + zeros(9000))), "ok"),
    "png with data beyond its pixels": (lambda: png(64, 8, 2, data=zeros(19_000)), "undecodable"),
    "png of 1,500,000 chunks": (lambda: png(64, 8, 2, chunk(b"tEXt", b"") * 1_500_000), "ok"),
    "png, animated": (lambda: animated_png(500), "ok"),
    "webp, lossy": (lambda: flat("WEBP", method=0), "ok"),
    "webp, lossless, alpha": (lambda: flat("WEBP", "RGBA", lossless=True, method=0), "ok"),
    "webp, lossy, alpha": (lambda: flat("WEBP", "RGBA", method=0), "ok"),
    "webp, animated": (lambda: animated_webp(200), "ok"),
    "gif": (lambda: flat("GIF", "P"), "ok"),
    "gif of 200 frames": (lambda: gif_of_frames(200), "ok"),
    "gif beyond its canvas": (gif_beyond_its_canvas, "undecodable"),
}


def outcome(data: bytes, settings: DownloadSettings, resizer: Callable[..., object]) -> str:
    """The name under which a task would count the file."""
    try:
        reason, _ = pictures._size_reason(settings, probe.probe(data))
    except probe.NotPicture as refused:
        return refused.reason
    if reason != "ok":
        return reason
    result = resizer(io.BytesIO(data))
    assert isinstance(result, tuple)
    return "ok" if result[5] is None else DECODER.get(result[5], "undecodable")


def defuse(data: bytes, settings: DownloadSettings, resizer: Callable[..., object]) -> str:
    """In a child: its JSON, or "" if it was lost."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        before = resource.getrusage(resource.RUSAGE_SELF)
        reason = outcome(data, settings, resizer)
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = [after.ru_utime + after.ru_stime, -before.ru_utime - before.ru_stime]
        found = {"reason": reason, "mib": after.ru_maxrss >> 10, "cpu_s": round(sum(used), 2)}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    return text if status == 0 else ""


def main(names: list[str]) -> None:
    settings = DownloadSettings(formats=("jpeg", "png", "webp", "gif"))
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(settings.max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dataset_build.download import staging
    resizer = staging.EightBitResizer(
        settings.image_size,
        settings.resize_mode,
        settings.resize_only_if_bigger,
        min_image_size=settings.min_side,
        max_image_area=settings.max_pixels,
        max_aspect_ratio=settings.max_aspect_ratio,
    )
    for name in names or BOMBS:
        # Made in a child as well: what making it takes is not to count.
        reading, writing = os.pipe()
        if (maker := os.fork()) == 0:
            os.close(reading)
            with os.fdopen(writing, "wb") as sink:
                sink.write(BOMBS[name][0]())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as source:
            data = source.read()
        os.waitpid(maker, 0)
        with guard.limited((2 << 30) + (512 << 20), 1 << 30):
            print(
                json.dumps(name), len(data), defuse(data, settings, resizer), sep="\t", flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1:])

"""img2dataset's Downloader and Resizer, with our transport and writer: no way to lose a sample.

Import this only where work is done: img2dataset takes seconds to import.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from types import FunctionType, SimpleNamespace
from typing import Any

import cv2
import img2dataset.downloader
import img2dataset.resizer
import numpy as np
import numpy.typing as npt
from img2dataset.resizer import Resizer

from dataset_build.download import blur, decode, guard, probe

_PICTURE_CPU_S = 60  # far above what any picture within the limits takes
_NOWHERE = os.open(os.devnull, os.O_WRONLY)

Fetch = Callable[[tuple[int, str]], tuple[int, io.BytesIO | None, str | None]]
"""(row, address) -> (row, the file, None) or (row, None, why not)."""


End = Callable[[int, "bytes | None", "dict[str, Any]"], None]
"""(row, the picture as it is to be stored or None, img2dataset's account of it)."""


class File(io.BytesIO):
    """What a server sent, for one row."""

    def __init__(self, content: bytes, row: int) -> None:
        super().__init__(content)
        self.row = row


class Writer:
    """What img2dataset calls a writer: passes every row on to `end`, which must not raise.

    img2dataset prints an error of its writer and carries on, so a full disk would lose samples that
    it reports as successes. And its own writer holds the newest ones back, for webdataset's
    `TarWriter` writes blocks of 10 KiB: they would be lost with the process.
    """

    def __init__(self, end: End) -> None:
        self._end = end

    def write(self, img_str: bytes | None, key: str, caption: object, meta: dict[str, Any]) -> None:
        """One row has a picture, or none and `meta["error_message"]` says why."""
        self._end(meta["row"], img_str, meta)

    def close(self) -> None:
        """Nothing is held back."""


class GuardedDownloader(img2dataset.downloader.Downloader):  # type: ignore[misc]
    """img2dataset's Downloader with `fetch` in the place of its transport.

    Its shard function looks its transport up as a global of its module; that name is exchanged
    while a shard is being made.
    """

    def __init__(self, fetch: Fetch, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._fetch = fetch

    def download_shard(self, row: tuple[int, str]) -> None:
        """Make one shard of (number, feather file); raises whatever goes wrong."""
        module = img2dataset.downloader
        own = module.download_image_with_retry
        module.download_image_with_retry = lambda pair, **options: self._fetch(pair)
        try:
            # It prints every error. On a full disk that fails too, which ends its loop, and its
            # threads then wait for ever.
            with redirect_stdout(None), redirect_stderr(None):
                super().download_shard(row)
        finally:
            module.download_image_with_retry = own


def is_turned(data: bytes) -> bool:
    """Whether a JPEG's EXIF tag says to show it turned or mirrored (Exif 2.32, 4.6.5: 274)."""
    at = 2
    try:
        while data[at] == 0xFF and 0xE0 <= data[at + 1] <= 0xEF:  # the segments of applications
            (size,) = struct.unpack_from(">H", data, at + 2)
            if data[at + 1] == 0xE1 and data.startswith(b"Exif\0\0", at + 4):
                return _orientation(data[at + 10 : at + 2 + size]) in range(2, 9)
            at += 2 + size
    except (struct.error, IndexError):
        pass
    return False


def _orientation(exif: bytes) -> int:
    """The tag's value in the first directory of TIFF data, 0 if it is not there."""
    order = ">" if exif.startswith(b"MM") else "<"
    (directory,) = struct.unpack_from(order + "I", exif, 4)
    (entries,) = struct.unpack_from(order + "H", exif, directory)
    for place in range(directory + 2, directory + 2 + 12 * entries, 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", exif, place)
        if tag == 0x112:
            return int(value)
    return 0


def _decoded(data: npt.NDArray[np.uint8], flags: int) -> Any:
    """A picture as it is to be shown, in 8 bits; None if it cannot be decoded.

    A JPEG can be neither deep nor transparent, but it may be turned: img2dataset would store it as
    it lies, and leave the tag away.
    """
    content = data.tobytes()
    if probe.kind(content) != "jpeg":
        return decode.pixels(content)
    return cv2.imdecode(data, cv2.IMREAD_COLOR if is_turned(content) else flags)


@contextmanager
def _hushed() -> Iterator[None]:
    """Let decoders write nowhere: their warnings, on file descriptor 2, name no picture.

    So does our log, which waits meanwhile: img2dataset would lose what other threads write. So
    nothing but a decoder may run within.
    """
    handlers = logging.getLogger().handlers[:]
    for handler in handlers:
        handler.acquire()
    own = os.dup(2)
    try:
        os.dup2(_NOWHERE, 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        for handler in handlers:
            handler.release()


# img2dataset makes its transforms anew for each picture, and to check their arguments takes longer
# than to decode some. This is its code, with transforms that are kept and our decoder.
_albumentations = img2dataset.resizer.A
_TRANSFORMS = SimpleNamespace(
    **{
        name: functools.cache(getattr(_albumentations, name))
        for name in ("SmallestMaxSize", "LongestMaxSize", "CenterCrop")
    },
    PadIfNeeded=_albumentations.PadIfNeeded,
)


class EightBitResizer(Resizer):  # type: ignore[misc]
    """img2dataset's Resizer for pictures from anywhere: see `decode`.

    What `find` finds in a picture is blurred; `boxes` is what it has found in the last one.
    """

    def __init__(self, *arguments: Any, find: blur.Find | None = None, **options: Any) -> None:
        super().__init__(*arguments, blurrer=self._blurred, **options)
        self._find = find
        self.boxes: npt.NDArray[np.float64] = np.zeros((0, 4))
        self._failure: BaseException | None = None
        names = {
            **vars(img2dataset.resizer),
            "A": _TRANSFORMS,
            "cv2": SimpleNamespace(**{**vars(cv2), "imdecode": self._decode}),
            "SuppressStdoutStderr": nullcontext,
        }
        call = Resizer.__call__
        self._resized = FunctionType(call.__code__, names, argdefs=call.__defaults__)

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: object = None) -> Any:
        """As img2dataset's: (bytes, width, height, original width, original height, error).

        Raises what `find` does, for it is no picture's fault.
        """
        self.boxes = np.zeros((0, 4))
        with guard.cpu_limited(_PICTURE_CPU_S):
            result = self._resized(self, img_stream, () if self._find else None)
        if self._failure is not None:
            raise self._failure
        return result

    def _blurred(self, img: npt.NDArray[np.uint8], bbox_list: object) -> Any:
        return blur.blurred(img, self.boxes)

    def _decode(self, data: npt.NDArray[np.uint8], flags: int) -> Any:
        with _hushed():
            picture = _decoded(data, flags)
        if self._find and picture is not None:
            try:
                self.boxes = blur.found(self._find, picture)
            except BaseException as failure:  # the Resizer would take it for the picture's
                self._failure = failure
                raise
        return picture

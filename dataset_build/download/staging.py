"""img2dataset's Downloader, Resizer and writer, with our transport and no way to lose a sample.

Import this only where work is done: img2dataset takes seconds to import.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import cv2
import img2dataset.downloader
import numpy as np
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter
from webdataset import TarWriter

Fetch = Callable[[tuple[int, str]], tuple[int, io.BytesIO | None, str | None]]
"""(row, address) -> (row, the file, None) or (row, None, why not)."""


@dataclass(frozen=True)
class Sample:
    """What is staged of an address: the hash of it in hexadecimal, and one of its texts."""

    key: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A stored picture: sides in pixels before and after resizing; SHA-256 of its stored bytes."""

    width: int
    height: int
    original_width: int
    original_height: int
    stored_bytes: int
    digest: bytes


@dataclass
class Ledger:
    """What the writer did, row by row of img2dataset's input; a row is one address."""

    samples: Sequence[Sample]
    stored: dict[int, Picture] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    written: Callable[[int], None] = lambda rows: None
    """Called with the number of rows done so far."""


class FailStopWriter(WebDatasetSampleWriter):  # type: ignore[misc]
    """Stages the picture of each address; stops for good at the first error.

    img2dataset prints an error of its writer and carries on, so a full disk would lose samples
    that it reports as successes.
    """

    def __init__(self, ledger: Ledger, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tarwriter = TarWriter(self.tar_fd, mtime=0)
        self._ledger = ledger
        self._error: Exception | None = None

    def write(self, img_str: bytes | None, key: str, caption: object, meta: dict[str, Any]) -> None:
        """Write the sample of one row, or note why there is none."""
        if self._error is not None:
            raise self._error
        row = meta["row"]
        try:
            if img_str is None:
                self._ledger.failed[row] = meta["error_message"]
            else:
                sample = self._ledger.samples[row]
                super().write(img_str, sample.key, sample.text, {**meta, "key": sample.key})
                self._ledger.stored[row] = Picture(
                    meta["width"],
                    meta["height"],
                    meta["original_width"],
                    meta["original_height"],
                    len(img_str),
                    hashlib.sha256(img_str).digest(),
                )
        except Exception as error:
            self._error = error
            raise
        self._ledger.written(len(self._ledger.stored) + len(self._ledger.failed))

    def close(self) -> None:
        """Finish the tar; raises the first error there was."""
        try:
            super().close()
        except Exception as error:
            self._error = self._error or error
        self.tar_fd.close()
        if self._error is not None:
            raise self._error


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


class EightBitResizer(Resizer):  # type: ignore[misc]
    """img2dataset's Resizer, which would cut 16-bit PNGs off at 255 instead of scaling them."""

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: object = None) -> Any:
        """As img2dataset's: (bytes, width, height, original width, original height, error)."""
        head = img_stream.getbuffer()[:25]
        if bytes(head[:4]) == b"\x89PNG" and head[24] == 16:
            head.release()
            deep = cv2.imdecode(np.frombuffer(img_stream.getvalue(), "u1"), cv2.IMREAD_UNCHANGED)
            if deep is not None and deep.dtype == np.uint16:
                flat = np.right_shift(deep, 8).astype(np.uint8)
                img_stream = io.BytesIO(cv2.imencode(".png", flat)[1].tobytes())
        return super().__call__(img_stream, blurring_bbox_list)

"""Tars as others write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from tests.train.conftest import picture

Tars = Callable[..., Path]


@pytest.fixture
def tars(tmp_path: Path) -> Tars:
    """Writes shards of the given sizes with webdataset's TarWriter; returns their folder."""

    def write(*sizes: int, name: str = "tars", first: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        sample = first
        for number, size in enumerate(sizes):
            with webdataset.TarWriter(str(folder / f"{number:05d}.tar")) as tar:
                for _ in range(size):
                    image, text = picture(sample)
                    tar.write(
                        {
                            "__key__": f"{sample:09d}",
                            "jpg": image,
                            "txt": text,
                            "json": json.dumps({"caption": f"{text} of {sample}"}).encode(),
                        }
                    )
                    sample += 1
        return folder

    return write

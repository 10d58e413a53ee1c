"""Titles of page view lines, as Wikimedia writes them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dataset_build.queries.page_views import count_views, decode_title


@pytest.mark.parametrize(
    ("raw", "title"),
    [
        (b"Golden_Gate_Bridge", "Golden Gate Bridge"),
        ("Beyoncé".encode(), "Beyoncé"),
        (b"Beyonc%C3%A9", "Beyoncé"),
        (b"Star_Wars:_Episode_IV", "Star Wars: Episode IV"),
        (b"Special:Search", None),
        (b"User_talk:Dog", None),
        (b"file:x.jpg", None),
        (b"Main_Page", None),
        (b"-", None),
        (b"\xff\xfe", None),
        (b"_", None),
    ],
)
def test_title(raw: bytes, title: str | None) -> None:
    assert decode_title(raw) == title


def test_a_file_cut_off_counts_what_came_before(tmp_path: Path) -> None:
    lines = b"".join(b"en Title_%d %d 0\n" % (i, i + 1) for i in range(5000))
    path = tmp_path / "pageviews-20240101-000000.gz"
    path.write_bytes(gzip.compress(lines)[:-2000])
    stats = count_views([path], tmp_path, "x", wiki="en", progress=lambda done, total: None)
    table = pq.read_table(tmp_path / "counts-views-x.parquet")
    titles = dict(zip(table["title"].to_pylist(), table["views"].to_pylist(), strict=True))
    assert stats.counts["truncated_files"] == 1
    assert 1000 < len(titles) < 5000
    assert titles["Title 7"] == 8

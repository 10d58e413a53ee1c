"""Titles of page view lines, as Wikimedia writes them."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dataset_build.queries import page_views
from dataset_build.queries.page_views import count_views, decode_title
from pipeline.stats import Stats


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


def _counted(paths: list[Path], folder: Path) -> tuple[list[tuple[str, int]], Stats]:
    stats = count_views(paths, folder, "x", wiki="en", progress=lambda done, total: None)
    table = pq.read_table(folder / "counts-views-x.parquet")
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True)), stats


def test_many_blocks_and_ranges_give_what_a_dictionary_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_views, "_READ", 500)
    monkeypatch.setattr(page_views, "_BLOCK", 3000)
    monkeypatch.setattr(page_views, "_STEP", 4)
    monkeypatch.setattr(page_views, "_GROUP", 16)
    monkeypatch.setattr(page_views, "_RANGE", 64)
    rng = random.Random(7)
    pool = ["A_", "B", "Caf%C3%A9", "Caf\u00e9", "Talk:A", "a:b", "-", "Main_Page", "_C_", "D__E"]
    pool += ["404.php", "x%", "\x1fF", "G\u00a0H"]
    pool += [f"Title_{number}" for number in range(700)]
    expected: Counter[str] = Counter()
    no_title = 0
    paths = []
    for hour in range(3):
        lines = []
        for _ in range(4000):
            site, raw = rng.choice(["en", "en.m", "de", "en.b"]), rng.choice(pool)
            views = rng.randrange(1, 1000)
            lines.append(f"{site} {raw} {views} 0")
            if site in {"en", "en.m"}:
                title = decode_title(raw.encode())
                no_title += title is None
                if title is not None:
                    expected[title] += views
        paths.append(tmp_path / f"pageviews-20240101-{hour:02}0000.gz")
        paths[-1].write_bytes(gzip.compress("\n".join(lines).encode()))
    rows, stats = _counted(paths, tmp_path)
    assert rows == sorted(expected.items())
    assert stats.counts["no_title_lines"] == no_title > 0
    assert stats.counts["view_lines"] > 5000
    assert [path.name for path in tmp_path.iterdir() if path not in paths] == [
        "counts-views-x.parquet"
    ]


def test_lines_that_are_none_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "pageviews-20240101-000000.gz"
    bad = b"nonsense\n\nen Dog x 0\nen Dog\nen.m Dog -5 0\nde Dog x 0\nen \xff\xfe 3 0\nen  4 0\n"
    path.write_bytes(gzip.compress(bad + b"en Dog 2\nen.m Dog 3 9"))
    rows, stats = _counted([path], tmp_path)
    assert rows == [("Dog", 5)]
    assert stats.counts["malformed_lines"] == 4
    assert stats.counts["no_title_lines"] == 2
    assert stats.counts["view_lines"] == 4


def test_a_line_without_an_end_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_READ", 64), ("_BLOCK", 1024)):
        monkeypatch.setattr(f"dataset_build.queries.page_views.{name}", value)
    line = b"en Dog 3 0\n"
    content = line * 500 + b"en " + b"x" * 100_000 + b" 1 0\n" + line * 500 + b"y" * 5000
    (tmp_path / "views.gz").write_bytes(gzip.compress(content))
    stats = Stats()
    blocks = list(page_views._blocks(tmp_path / "views.gz", stats))
    assert max(map(len, blocks)) <= 1024 + 64
    assert b"".join(blocks).count(line) == 1000
    assert stats.counts["malformed_lines"] == 2

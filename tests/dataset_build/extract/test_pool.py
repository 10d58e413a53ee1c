"""Parquet pools: columns under their usual names, rows accounted for, damage contained."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import UserError

from .conftest import Extract

URLS = ["http://a.example/1.jpg", "http://a.example/2.jpg", None, "/relative.jpg"]
TEXTS = ["a brown dog", None, "a black cat", "a green bird"]


@pytest.mark.parametrize(
    ("url", "text"),
    [("url", "text"), ("URL", "TEXT"), ("url", "caption"), ("image_url", "alt_text")],
)
def test_columns_are_found(tmp_path: Path, extract: Extract, url: str, text: str) -> None:
    table = pa.table({"similarity": [0.1] * 4, text: TEXTS, url: URLS})
    pq.write_table(table, tmp_path / "part.parquet")
    rows, stats = extract(parquet=[f"{tmp_path}/*.parquet"], snapshot="laion")
    assert [(row["url"], row["text"]) for row in rows] == [(URLS[0], TEXTS[0])]
    assert (rows[0]["source"], rows[0]["snapshot"], rows[0]["file"]) == (
        "laion", "laion", "part.parquet",
    )  # fmt: skip
    assert stats.rows_in == 4
    assert stats.dropped == {"no_text": 1, "bad_url": 2}


def test_columns_are_given(tmp_path: Path, extract: Extract) -> None:
    table = pa.table({"url": ["x"], "u": ["http://a.example/u.jpg"], "t": ["one two"]})
    pq.write_table(table, tmp_path / "part.parquet")
    rows, _ = extract(
        parquet=[f"{tmp_path}/part.parquet"], url_column="u", text_column="t", snapshot=""
    )
    assert (rows[0]["url"], rows[0]["source"]) == ("http://a.example/u.jpg", "pool")
    with pytest.raises(UserError, match=r"no 'tt'; it has url, u, t: set extract\.text_column"):
        extract(parquet=[f"{tmp_path}/part.parquet"], text_column="tt")


def test_a_damaged_row_group_loses_itself_only(tmp_path: Path, extract: Extract) -> None:
    path = tmp_path / "part.parquet"
    count = 300
    urls = [f"http://a.example/{i}.jpg" for i in range(count)]
    texts = [f"dog of number {i}" for i in range(count)]
    table = pa.table({"url": urls, "text": texts})
    pq.write_table(table, path, row_group_size=100, compression="zstd", use_dictionary=False)
    with pq.ParquetFile(path) as parquet:
        offset = parquet.metadata.row_group(1).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = b"\xa5" * 200
    path.write_bytes(data)
    rows, stats = extract(parquet=[str(path)])
    assert [row["url"] for row in rows] == urls[:100] + urls[200:]
    assert stats.rows_in == count
    assert stats.dropped == {"broken_row_group": 100}


def test_bytes_that_are_no_utf8_cost_themselves_only(tmp_path: Path, extract: Extract) -> None:
    texts = pa.array([b"a brown dog", b"a \xff black cat"], pa.binary())
    broken = pa.StringArray.from_buffers(2, texts.buffers()[1], texts.buffers()[2])
    pq.write_table(pa.table({"url": URLS[:2], "text": broken}), tmp_path / "x.parquet")
    rows, _ = extract(parquet=[f"{tmp_path}/x.parquet"])
    assert [row["text"] for row in rows] == ["a brown dog", "a \ufffd black cat"]


def test_no_parquet_is_named(tmp_path: Path, extract: Extract) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"x\.parquet: not a readable parquet file"):
        extract(parquet=[f"{tmp_path}/x.parquet"])

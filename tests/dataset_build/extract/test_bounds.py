"""What one record that is made to be costly may cost: work and memory, counted."""

from __future__ import annotations

import errno
import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastwarc.warc import WarcRecordType

from dataset_build.extract import ExtractSettings, pieces, pool
from dataset_build.extract.archive import records
from dataset_build.extract.candidates import Candidates
from dataset_build.extract.columns import Columns
from dataset_build.extract.urls import MAX_LENGTH
from pipeline.stats import Stats

from .conftest import Extract, members, metadata, page, record

LONG = "http://www.a.example/" + "x/" * (MAX_LENGTH // 2)
PICTURE = "http://a.example/1.jpg"


def test_a_page_s_address_is_none_if_it_is_too_long(tmp_path: Path, extract: Extract) -> None:
    html = f"<img src=x.jpg alt='some words'><img src={PICTURE} alt='other words'>".encode()
    (tmp_path / "x.warc.gz").write_bytes(b"".join(members(page(LONG, html))))
    images = [{"url": "x.jpg", "alt": "some words"}, {"url": PICTURE, "alt": "other words"}]
    (tmp_path / "x.wat.gz").write_bytes(b"".join(members(metadata(LONG, images))))
    table = pa.table(
        {
            "url": [PICTURE] * 3,
            "text": ["other words"] * 3,
            "page_url": [LONG, LONG * 99, "http://p/"],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    rows, stats = extract(
        **{kind: [f"{tmp_path}/x.{kind}*"] for kind in ("wat", "warc")},
        pool=[f"{tmp_path}/x.parquet"],
    )
    assert [row["url"] for row in rows] == [PICTURE] * 5
    assert sorted(row["page_url"] for row in rows) == [""] * 4 + ["http://p/"]
    assert stats.dropped == {"bad_url": 2}
    assert stats.counts["pages"] == 2


class Inflating:
    """A gzip member that counts the bytes which go in and out."""

    total = 0

    def __init__(self, wbits: int) -> None:
        self._member = MEMBER(wbits=wbits)

    def decompress(self, data: bytes, most: int = 0) -> bytes:
        Inflating.total += len(data)
        text = self._member.decompress(data, most)
        Inflating.total += len(text) - len(self._member.unconsumed_tail)
        return text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._member, name)


MEMBER = zlib.decompressobj
BEGIN = b"\x1f\x8b\x08" + bytes(7)


def stored(data: bytes, length: int = 0) -> bytes:
    """A block of deflate, not compressed; it may take in what follows."""
    length = length or len(data)
    return b"\0" + struct.pack("<HH", length, length ^ 0xFFFF) + data


SAYS_WARC = BEGIN + stored(b"WARC/1.0\r\n")
WITHIN_EACH_OTHER = {
    "foreign": BEGIN + stored(b"", len(BEGIN)),
    "like records": SAYS_WARC + stored(b"", len(SAYS_WARC)),
    "names without end": BEGIN[:3],
}


@pytest.mark.parametrize("unit", WITHIN_EACH_OTHER.values(), ids=WITHIN_EACH_OTHER.keys())
def test_members_within_each_other_take_no_square_of_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: bytes
) -> None:
    monkeypatch.setattr(zlib, "decompressobj", Inflating)
    monkeypatch.setattr(pieces, "MAX_RECORD_BYTES", 1 << 18)
    good = gzip.compress(record("metadata", "http://a.example/", b"{}"))
    path = tmp_path / "x.wat.gz"
    work = []
    for many in (20_000, 80_000):
        path.write_bytes(good + unit * (many // len(unit)) + good * 9)
        Inflating.total, stats = 0, Stats()
        found = sum(1 for _ in records(path, WarcRecordType.metadata, stats))
        assert found >= 9  # what looks like the last member may take in the first that is one
        assert stats.counts["lost_bytes"] >= many - len(unit)
        work.append(Inflating.total)
    assert work[1] < 6 * work[0]


class Reads(io.BytesIO):
    """A file that counts the bytes which are read of it."""

    total = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.total += len(data)
        return data


def test_the_next_member_is_looked_for_near_by_first() -> None:
    raw, many, position = Reads(BEGIN * 3000 + bytes(1 << 20)), 0, -1
    while (position := pieces.Members(raw).find(position + 1)) >= 0:
        many += 1
    assert many == 3000
    assert raw.total < 5000 * many


def extracted(path: Path, target: Path) -> Candidates:
    with Candidates(target, ExtractSettings(), "s") as out:
        pool.extract(path, out, lambda share: None, source="s", columns=Columns())
    return out


ALL = pa.default_memory_pool()
COUNTING = pa.proxy_memory_pool(ALL)  # what it counts may live longer than a test


@pytest.mark.parametrize("column", ["url", "text", "page_url"])
def test_a_long_text_that_many_rows_have_is_held_once(tmp_path: Path, column: str) -> None:
    count, words = 1000, "long words " * 30_000
    table = {"url": [PICTURE], "text": ["a brown dog"], "page_url": ["http://p/"]}
    table[column] = [words]
    one = pa.array([0] * count, pa.int32())
    columns = {name: pa.DictionaryArray.from_arrays(one, text) for name, text in table.items()}
    kept = pa.table({name: column.cast(pa.string()) for name, column in columns.items()})
    pq.write_table(kept, tmp_path / "x.parquet", compression="zstd")
    del kept
    pa.set_memory_pool(COUNTING)
    try:
        out = extracted(tmp_path / "x.parquet", tmp_path / "out.parquet")
    finally:
        pa.set_memory_pool(ALL)
    assert COUNTING.max_memory() < 100e6 < count * len(words)
    assert out.stats.rows_in == count
    assert out.stats.dropped == ({"long_url": count} if column == "url" else {})
    assert out.stats.counts["texts_cut"] == (count if column == "text" else 0)


def test_long_texts_are_read_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_BATCH_BYTES", 100_000)
    texts = [f"dog {number} " * 1000 for number in range(100)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"url": [PICTURE] * 100, "text": texts}), path, use_dictionary=False)
    with pq.ParquetFile(path) as parquet:
        sizes = [batch.nbytes for batch in pool._batches(path, parquet, 0, ["url", "text"])]
    assert max(sizes) < 120_000 < sum(sizes)
    assert extracted(path, tmp_path / "out.parquet").stats.rows_out == 100


def test_a_text_is_cut_between_letters(tmp_path: Path) -> None:
    """Where bytes are cut off it is at no letter's cost, nor at that of other rows."""
    kinds = (pa.string(), pa.binary(), pa.large_string(), pa.string_view(), pa.binary_view())
    for kind in kinds:
        texts = pa.array(["犬" * 50_000, "a brown dog", "x" + "é" * 50_000]).cast(kind)
        table = pa.table({"url": [PICTURE] * 3, "text": texts, "page_url": ["http://p/"] * 3})
        pq.write_table(table, tmp_path / "x.parquet")
        out = extracted(tmp_path / "x.parquet", tmp_path / "out.parquet")
        found = pq.read_table(tmp_path / "out.parquet")["text"].to_pylist()
        assert found == ["犬" * 512, "a brown dog"]
        assert out.stats.dropped == {"too_few_words": 1}
        assert out.stats.counts["texts_not_utf8"] == 0


def test_a_row_group_that_breaks_in_its_middle_counts_each_row_once(tmp_path: Path) -> None:
    count = 10_000
    texts = [f"dog of number {number}" for number in range(count)]
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"url": [PICTURE] * count, "text": texts}), path,
        use_dictionary=False, data_page_size=1000, write_batch_size=50, compression="zstd",
    )  # fmt: skip
    with pq.ParquetFile(path) as parquet:
        about = parquet.metadata.row_group(0).column(1)
        end = about.data_page_offset + about.total_compressed_size
    data = bytearray(path.read_bytes())
    data[end - 500 : end - 100] = b"\xa5" * 400
    path.write_bytes(data)
    out = extracted(path, tmp_path / "out.parquet")
    kept = pq.read_table(tmp_path / "out.parquet")["text"].to_pylist()
    assert 0 < len(kept) < count
    assert kept == texts[: len(kept)]
    assert out.stats.rows_in == count
    assert out.stats.dropped == {"broken_row_group": count - len(kept)}


def test_what_a_disk_fails_at_is_no_fault_of_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"url": [PICTURE] * 9, "text": ["a brown dog"] * 9}), path)

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def failing(*args: object) -> Iterator[pa.RecordBatch]:
        yield pa.record_batch({"url": [PICTURE], "text": ["a brown dog"]})
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as full:
        full.setattr("dataset_build.extract.candidates._ROW_GROUP", 2)
        full.setattr(pq.ParquetWriter, "write_table", fail)
        with pytest.raises(OSError, match="No space left"):
            extracted(path, tmp_path / "out.parquet")
    monkeypatch.setattr(pool, "_batches", failing)
    with pytest.raises(OSError, match="Input/output error"):
        extracted(path, tmp_path / "out.parquet")

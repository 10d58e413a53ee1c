"""Damaged archives: what is whole comes out, and what is lost is counted."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest
from fastwarc.warc import WarcRecordType

from dataset_build.extract.archive import records
from pipeline.config import UserError
from pipeline.manifest import Stats

from .conftest import members, record

COUNT = 8


def bodies() -> list[bytes]:
    noise = random.Random(5)
    return [b"%d:" % i + noise.randbytes(400 + 9000 * (i % 3)) for i in range(COUNT)]


def read(path: Path) -> tuple[list[bytes], Stats]:
    stats = Stats()
    found = [body for _, _, body in records(path, WarcRecordType.metadata, stats)]
    return found, stats


def whole() -> list[bytes]:
    return [record("metadata", f"http://a.example/{i}", body) for i, body in enumerate(bodies())]


@pytest.mark.parametrize("compressed", [True, False])
def test_a_whole_file(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "x.wat"
    path.write_bytes(b"".join(members(*whole()) if compressed else whole()))
    found, stats = read(path)
    assert found == bodies()
    assert +stats.counts == {"archive_records": COUNT}


@pytest.mark.parametrize("where", ["magic", "header", "body", "checksum"])
@pytest.mark.parametrize("broken", [0, 3, COUNT - 1])
def test_a_broken_member_loses_itself_only(tmp_path: Path, where: str, broken: int) -> None:
    parts = members(*whole())
    data = bytearray(parts[broken])
    position = {"magic": 1, "header": 12, "body": len(data) // 2, "checksum": -6}[where]
    data[position] ^= 0x55
    path = tmp_path / "x.wat.gz"
    path.write_bytes(b"".join([*parts[:broken], bytes(data), *parts[broken + 1 :]]))
    found, stats = read(path)
    expected = bodies()
    del expected[broken]
    assert found == expected
    assert stats.counts["broken_members"] or stats.counts["truncated_files"]
    assert stats.counts["broken_members"] <= 1


@pytest.mark.parametrize("broken", [0, 3])
def test_a_length_beyond_the_file_loses_itself_only(tmp_path: Path, broken: int) -> None:
    parts = whole()
    length = b"Content-Length: %d" % len(bodies()[broken])
    parts[broken] = parts[broken].replace(length, b"Content-Length: 9999999")
    path = tmp_path / "x.wat.gz"
    path.write_bytes(b"".join(members(*parts)))
    found, stats = read(path)
    assert found == [body for i, body in enumerate(bodies()) if i != broken]
    assert +stats.counts == {"archive_records": COUNT - 1, "broken_members": 1}


def test_garbage_and_a_cut_between_members(tmp_path: Path) -> None:
    parts = members(*whole())
    path = tmp_path / "x.wat.gz"
    path.write_bytes(
        b"".join([*parts[:2], b"\x1f\x8bgarbage" * 9, *parts[2:4], parts[4][:150], *parts[5:]])
    )
    found, stats = read(path)
    assert found == [body for i, body in enumerate(bodies()) if i != 4]
    assert stats.counts["broken_members"] == 2


@pytest.mark.parametrize("compressed", [True, False])
def test_every_cut_is_labelled(tmp_path: Path, compressed: bool) -> None:
    """Wherever a file is cut, all records before the cut are found, and the cut is noticed."""
    parts = (members(*whole()) if compressed else whole())[:3]
    data = b"".join(parts)
    ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    path = tmp_path / "x"
    for cut in [*range(ends[0] + 1, len(data), 601), *range(ends[1] - 9, ends[1] + 25)]:
        path.write_bytes(data[:cut])
        found, stats = read(path)
        if compressed:
            before = sum(end <= cut for end in ends)
            assert found[:before] == bodies()[:before], cut
            assert len(found) <= before + (cut > ends[before] - 10), cut
        at_an_end = cut in ends or (not compressed and data[:cut].endswith(b"\r\n\r\n"))
        assert stats.counts["truncated_files"] == (not at_an_end), cut


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.wat.gz"
    path.write_bytes(gzip.compress(b"hello, no archive this" * 100))
    with pytest.raises(UserError, match=r"x\.wat\.gz: not a WARC or WAT archive"):
        read(path)


def test_an_empty_file_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x.wat.gz"
    path.write_bytes(b"")
    found, stats = read(path)
    assert found == []
    assert stats.counts["truncated_files"] == 1

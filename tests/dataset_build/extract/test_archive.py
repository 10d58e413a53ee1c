"""Damaged archives: what is whole comes out, and what is lost is counted."""

from __future__ import annotations

import gzip
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from fastwarc.warc import WarcRecordType

from dataset_build.extract.archive import losses, records
from pipeline.config import BadInput, UserError
from pipeline.executor import NEVER_RETRIED
from pipeline.stats import Stats
from tests import damage_archive

from .conftest import Extract, members, metadata, page, record

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
    counted = {"archive_records": COUNT - 1, "broken_members": 1, "lost_bytes": len(data)}
    assert +stats.counts == counted


@pytest.mark.parametrize("broken", [0, 3])
def test_a_length_beyond_the_file_loses_itself_only(tmp_path: Path, broken: int) -> None:
    parts = whole()
    length = b"Content-Length: %d" % len(bodies()[broken])
    parts[broken] = parts[broken].replace(length, b"Content-Length: 9999999")
    path = tmp_path / "x.wat.gz"
    path.write_bytes(b"".join(members(*parts)))
    found, stats = read(path)
    assert found == [body for i, body in enumerate(bodies()) if i != broken]
    assert stats.counts["broken_members"] == 1
    assert stats.counts["truncated_files"] == 0
    assert stats.counts["lost_bytes"] == len(members(parts[broken])[0])


def test_garbage_and_a_cut_between_members(tmp_path: Path) -> None:
    parts = members(*whole())
    path = tmp_path / "x.wat.gz"
    path.write_bytes(
        b"".join([*parts[:2], b"\x1f\x8bgarbage" * 9, *parts[2:4], parts[4][:150], *parts[5:]])
    )
    found, stats = read(path)
    assert found == [body for i, body in enumerate(bodies()) if i != 4]
    assert stats.counts["broken_members"] == 2
    assert stats.counts["lost_bytes"] == len(b"\x1f\x8bgarbage" * 9) + 150


@pytest.mark.parametrize("compressed", [True, False])
def test_damaged_neighbours_count_each(tmp_path: Path, compressed: bool) -> None:
    parts = whole()
    for broken in (3, 4, COUNT - 1):
        parts[broken] = parts[broken].replace(b"Content-Length: ", b"Content-Length: 1")
    parts = members(*parts) if compressed else parts
    path = tmp_path / "x"
    path.write_bytes(b"".join(parts))
    found, stats = read(path)
    assert found == [body for i, body in enumerate(bodies()) if i not in (3, 4, COUNT - 1)]
    # The last record of a plain file may as well be one that is cut off.
    assert stats.counts["broken_members"] == 2 + compressed
    assert stats.counts["truncated_files"] == 1 - compressed
    assert stats.counts["lost_bytes"] == sum(len(parts[i]) for i in (3, 4, COUNT - 1))


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("end", [b"", b"\r", b"\n", b"\r\n"])
def test_a_length_that_lies_a_little_gives_no_wrong_body(
    tmp_path: Path, compressed: bool, end: bytes
) -> None:
    texts = [body + end for body in bodies()]
    path = tmp_path / "x"
    for lie in (-50, -3, -1, 1, 2, 3, 4, 5, 50):
        for liar in (0, 3, COUNT - 1):
            parts = [record("metadata", f"http://a.example/{i}", t) for i, t in enumerate(texts)]
            told = b"Content-Length: %d" % (len(texts[liar]) + lie)
            parts[liar] = re.sub(rb"Content-Length: \d+", told, parts[liar])
            path.write_bytes(b"".join(members(*parts) if compressed else parts))
            found, stats = read(path)
            if [body.rstrip() for body in found] == [text.rstrip() for text in texts]:
                # Line breaks at the end may as well be some more between two records.
                assert -len(end) <= lie < 0, (lie, liar)
            else:
                assert found == texts[:liar] + texts[liar + 1 :], (lie, liar)
                assert stats.counts["broken_members"] + stats.counts["truncated_files"] == 1


def test_a_page_that_ends_in_line_breaks_is_whole(tmp_path: Path) -> None:
    """As if its length were too large, but it is not; nor do blank lines between records harm."""
    texts = [b"page%d\r\n" % i + b"\r\n" * i for i in range(5)]
    parts = [record("metadata", "http://a.example/", text) + b"\r\n" for text in texts]
    for number, data in enumerate((parts, members(*parts))):
        path = tmp_path / str(number)
        path.write_bytes(b"".join(data))
        found, stats = read(path)
        assert found == texts
        assert +stats.counts == {"archive_records": 5}


@pytest.mark.parametrize("at", [-7, -2, 1 << 20])
def test_a_large_body_with_a_wrong_checksum_is_not_handed_out(tmp_path: Path, at: int) -> None:
    """FastWARC cannot have seen the checksum when it has read the first bytes of the body."""
    large = random.Random(1).randbytes(3 << 20)
    texts = [b"before", large, b"after"]
    parts = members(*(record("metadata", "http://a.example/", text) for text in texts))
    damaged = bytearray(parts[1])
    damaged[at] ^= 0x10
    path = tmp_path / "x.wat.gz"
    path.write_bytes(b"".join([parts[0], damaged, parts[2]]))
    found, stats = read(path)
    assert found == [b"before", b"after"]
    assert stats.counts["broken_members"] == 1
    assert stats.counts["lost_bytes"] == len(damaged)


def test_a_record_of_another_kind_swallows_none(tmp_path: Path) -> None:
    parts = whole()
    parts[2] = record("request", "http://a.example/", b"GET /").replace(b"gth: 5", b"gth: 99999999")
    path = tmp_path / "x.wat.gz"
    path.write_bytes(b"".join(members(*parts)))
    found, stats = read(path)
    assert found == [body for i, body in enumerate(bodies()) if i != 2]
    assert stats.counts["broken_members"] == 1


def test_the_first_bytes_tell_what_a_file_is(tmp_path: Path) -> None:
    """A plain file that is called .gz is read on like a plain one, and the other way round."""
    parts = whole()
    parts[3] = parts[3].replace(b"WARC/1.0", b"WORC/1.0")
    path = tmp_path / "x.wat.gz"
    path.write_bytes(b"".join(parts))
    found, stats = read(path)
    assert found == [body for i, body in enumerate(bodies()) if i != 3]
    assert stats.counts["broken_members"] == 1
    assert stats.counts["lost_bytes"] == len(parts[3])


@pytest.mark.parametrize("quoted", [b"WARC/1.0\r\n", record("metadata", "http://b.example", b"no")])
def test_a_page_that_quotes_a_record_gives_none(tmp_path: Path, quoted: bytes) -> None:
    parts = whole()
    body = b"As the standard has it: " + quoted + b"and so on"
    parts[3] = record("metadata", "http://a.example/3", body).replace(b"WARC", b"WORC", 1)
    path = tmp_path / "x.wat"
    path.write_bytes(b"".join(parts))
    found, stats = read(path)
    assert found == [body for i, body in enumerate(bodies()) if i != 3]
    assert stats.counts["lost_bytes"] == len(parts[3])


def test_a_first_page_that_quotes_records_is_no_whole_file(tmp_path: Path) -> None:
    """It would be one that is compressed as one, of which nothing after damage can be read."""
    parts = whole()
    parts[0] = record("metadata", "http://a.example/", b"".join(parts[:3]))
    data = members(*parts)
    data[3] = data[3][:-8] + bytes(8)
    path = tmp_path / "x.wat.gz"
    path.write_bytes(b"".join(data))
    found, stats = read(path)
    assert found[1:] == [body for i, body in enumerate(bodies()) if i not in (0, 3)]
    assert stats.counts["lost_bytes"] == len(data[3])


@pytest.mark.parametrize("damage", ["none", "cut", "checksum"])
def test_a_file_compressed_as_one_is_read_up_to_the_damage(tmp_path: Path, damage: str) -> None:
    data = bytearray(gzip.compress(b"".join(whole())))
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "checksum":
        data[-6] ^= 1
    path = tmp_path / "x.wat.gz"
    path.write_bytes(data)
    found, stats = read(path)
    assert found == bodies()[: len(found)]
    assert 0 < len(found) < COUNT if damage == "cut" else len(found) == COUNT
    noticed = {"cut": {"truncated_files"}, "checksum": {"broken_members"}, "none": set()}[damage]
    assert set(+stats.counts) - {"archive_records", "lost_bytes"} == noticed


def test_seeded_damage(tmp_path: Path) -> None:
    """A small part of `python -m tests.damage_archive`."""
    draw = random.Random(7)
    pages = [b"<p>%d " % i + draw.randbytes(99).hex().encode() * (1 + 40 * i) for i in range(3)]
    for archive in (
        *(damage_archive.crawl(pages, compressed) for compressed in (True, False)),
        *(damage_archive.metadata(pages, compressed) for compressed in (True, False)),
    ):
        tally = damage_archive.sweep(archive, 97 if archive.is_compressed else 997)
        assert len(damage_archive.kinds(tally)) > 15
        assert damage_archive.faults(tally) == []


@pytest.mark.parametrize("kind", ["wat", "warc"])
def test_max_lost_decides_when_a_file_fails(
    tmp_path: Path, extract: Extract, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    image = {"url": "/x.jpg", "alt": "some words"}
    one = (
        metadata("http://a.example/", [image])
        if kind == "wat"
        else page("http://a.example/", b'<img src="/x.jpg" alt="some words">')
    )
    parts = members(*[one] * 10)
    for broken in (3, 7):
        parts[broken] = parts[broken][:-8] + bytes(8)
    path = tmp_path / f"x.{kind}.gz"
    path.write_bytes(b"".join(parts))
    with pytest.raises(UserError, match=rf"x\.{kind}\.gz: 2 damaged records; .*20\.0%.*max_lost"):
        extract(**{kind: [str(path)]})
    rows, stats = extract(**{kind: [str(path)]}, max_lost=0.21)
    assert len(rows) == 8
    assert stats.counts["lost_bytes"] == 2 * len(parts[0])
    assert f"{path}: 2 damaged records; {2 * len(parts[0]):,} of" in caplog.text


def test_one_record_costs_no_file_unless_none_may_be_lost(
    tmp_path: Path, extract: Extract, caplog: pytest.LogCaptureFixture
) -> None:
    parts = members(*[metadata("http://a.example/", [{"url": "/x", "alt": "some words"}])] * 3)
    path = tmp_path / "x.wat.gz"
    path.write_bytes(b"".join(parts)[:-9])
    rows, stats = extract(wat=[str(path)])
    assert len(rows) == 2
    assert stats.counts["truncated_files"] == 1
    assert f"{path}: cut off at its end; {len(parts[0]) - 9} of" in caplog.text
    with pytest.raises(UserError, match="cut off"):
        extract(wat=[str(path)], max_lost=0)


def test_more_than_a_page_s_bytes_are_not_one_record() -> None:
    """Any file bears one damaged record, but not that as much is lost as a large one."""
    page_bytes = 1 << 20
    for damage in ("broken_members", "truncated_files"):
        counts = Counter({damage: 1, "lost_bytes": page_bytes})
        assert losses("x.wat.gz", page_bytes, counts, 0.05)
        counts["lost_bytes"] += 1
        assert losses("x.wat.gz", 100 * page_bytes, counts, 0.05)
        with pytest.raises(BadInput, match=r"x\.wat\.gz: .* 100\.0%: extract\.max_lost is 5\.0%"):
            losses("x.wat.gz", page_bytes + 1, counts, 0.05)


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
    with pytest.raises(BadInput, match=r"x\.wat\.gz: not a WARC or WAT archive") as error:
        read(path)
    assert error.value.exit_code in NEVER_RETRIED


def test_an_empty_file_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x.wat.gz"
    path.write_bytes(b"")
    found, stats = read(path)
    assert found == []
    assert stats.counts["truncated_files"] == 1

"""Tars of ours: no byte without a meaning, no file of a kind that a dataset has not."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import tar
from pipeline.tar import BrokenTar, Member

SAMPLES = re.compile(r"[0-9a-f]{4}\.(jpg|txt)")


def written(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    for name, data in files.items():
        offset = tar.write_member(stream, name, data)
        assert stream.getvalue()[offset:][: len(data)] == data
    tar.finish(stream)
    return stream.getvalue()


def by_tarfile(add: Callable[[tarfile.TarFile], None], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:", format=kind) as archive:
        add(archive)
    return stream.getvalue()


def entry(name: str, data: bytes = b"", **fields: Any) -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        for field, value in fields.items():
            setattr(member, field, value)
        archive.addfile(member, io.BytesIO(data))

    return add


def source(data: bytes) -> tar.Tar:
    return tar.Tar("x.tar", len(data), lambda offset, size: memoryview(data)[offset:][:size])


def read(data: bytes, **rules: Any) -> list[Member]:
    return list(tar.members(source(data), **rules))


def foreign(data: bytes) -> list[Member]:
    return list(tar.foreign_members(source(data)))


WHOLE = {"00aa.jpg": b"x" * 700, "00aa.txt": b"a text", "00ab.jpg": b"", "00ab.txt": b"y" * 512}


@given(st.dictionaries(st.from_regex(r"\A[a-z0-9]{1,90}\.(jpg|txt)\Z"), st.binary(max_size=1500)))
def test_what_is_written_is_read_and_is_what_tarfile_writes(files: dict[str, bytes]) -> None:
    data = written(files)
    found = read(data, canonical=True)
    assert {m.name: data[m.offset :][: m.size] for m in found} == files
    assert found == foreign(data)

    def add(archive: tarfile.TarFile) -> None:
        for name, content in files.items():
            entry(name, content)(archive)

    # tarfile fills up to a record of 20 blocks, a canonical tar ends with its two.
    theirs = by_tarfile(add)
    assert theirs.startswith(data) and not theirs[len(data) :].strip(b"\0")
    assert read(theirs) == found
    if len(theirs) > len(data):
        with pytest.raises(BrokenTar, match="bytes after the last file"):
            read(theirs, canonical=True)


def test_every_flipped_bit_outside_of_the_files_is_noticed() -> None:
    data = written(WHOLE)
    inside = {at for m in read(data) for at in range(m.offset, m.offset + m.size)}
    for at in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            if at in inside:
                assert read(bytes(broken), canonical=True) == read(data)
            else:
                with pytest.raises(BrokenTar, match=r"x\.tar: broken at byte \d+: "):
                    read(bytes(broken), canonical=True)


def test_every_length_but_the_whole_is_noticed() -> None:
    data = written(WHOLE)
    for size in range(0, len(data), 7):
        with pytest.raises(BrokenTar):
            read(data[:size])
    for more in (1, 512, 1024):
        with pytest.raises(BrokenTar):
            read(data + bytes(more), canonical=True)
    with pytest.raises(BrokenTar, match="data after its end"):
        read(data + b"x" + bytes(511))


def header(name: bytes = b"00aa.jpg", **fields: bytes) -> bytes:
    """A header with some of its fields as given, and the checksum that belongs to it."""
    places = {
        "mode": 100, "size": 124, "mtime": 136, "kind": 156, "link": 157, "magic": 257,
        "owner": 265, "prefix": 345,
    }  # fmt: skip
    block = bytearray(written({"00aa.jpg": b""})[:512])
    block[: len(name)] = name
    for field, value in fields.items():
        block[places[field] : places[field] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)

OURS_REFUSES: dict[str, bytes] = {
    "a folder": header(kind=b"5"),
    "a symbolic link": header(kind=b"2", link=b"/etc/passwd"),
    "a hard link": header(kind=b"1", link=b"00aa.jpg"),
    "a device": header(kind=b"3"),
    "an old regular file": header(kind=b"\0"),
    "a sparse file of GNU's": header(kind=b"S"),
    "a long name of GNU's": header(kind=b"L"),
    "an extended header": header(kind=b"x"),
    "a file that names a link": header(link=b"elsewhere"),
    "GNU's magic": header(magic=b"ustar  \0"),
    "no magic": header(magic=bytes(8)),
    "a prefix": header(prefix=b"folder"),
    "a way up": header(b"../00aa.jpg"),
    "an absolute name": header(b"/00aa.jpg"),
    "a folder in the name": header(b"a/00aa.jpg"),
    "a hidden name": header(b".00aa.jpg"),
    "a command": header(b"pipe:id"),
    "no name": header(bytes(8)),
    "another letter": header("00å.jpg".encode()),
    "something behind the name": header(b"00aa.jpg\0x"),
    "a negative size": header(size=b"-0000000001\0"),
    "a size with an underscore": header(size=b"0000000_001\0"),
    "a size in base 256": header(size=b"\x80" + bytes(11)),
    "a size below zero in base 256": header(size=b"\xff" * 12),
    "no size": header(size=b" " * 12),
    "a size that is decimal": header(size=b"00000000008\0"),
    "a size beyond the end": header(size=b"00000010000\0"),
    "8 GiB less one": header(size=b"77777777777\0"),
}  # fmt: skip


@pytest.mark.parametrize("what", OURS_REFUSES)
def test_a_tar_of_ours_has_plain_regular_files_only(what: str) -> None:
    with pytest.raises(BrokenTar, match=r"broken at byte 0: "):
        read(OURS_REFUSES[what] + END)


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": b"0000755\0"},
        {"mtime": b"00000000001\0"},
        {"owner": b"root"},
        {"size": b" " * 10 + b"0\0"},
    ],
)
def test_a_canonical_tar_is_of_nobody_and_of_no_time(fields: dict[str, bytes]) -> None:
    data = header(**fields) + END
    assert len(read(data)) == 1
    with pytest.raises(BrokenTar, match="not the one that was written"):
        read(data, canonical=True)


def test_names_sizes_and_repeats_are_held_to_the_rules() -> None:
    data = written(WHOLE)
    assert len(read(data, names=SAMPLES, max_bytes=700)) == 4
    with pytest.raises(BrokenTar, match="700 bytes; 699 are allowed"):
        read(data, max_bytes=699)
    with pytest.raises(BrokenTar, match=r"'zz\.jpg' is no name"):
        read(written({"zz.jpg": b""}), names=SAMPLES)
    twice = header() + header() + END
    with pytest.raises(BrokenTar, match=r"byte 512: '00aa\.jpg' is no name"):
        read(twice)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return header(kind=kind, size=b"%011o\0" % len(records)) + records.ljust(
        -(-len(records) // 512) * 512, b"\0"
    )


FOREIGN_REFUSES: dict[str, bytes] = {
    "a sparse file of GNU's": header(kind=b"S"),
    "a sparse file, first form": pax(b"30 GNU.sparse.size=1073741824\n") + header(),
    "a sparse file, last form": pax(b"22 GNU.sparse.major=1\n") + header(),
    "a multi-volume file": header(kind=b"M"),
    "a link with bytes": header(kind=b"2", size=b"00000000001\0"),
    "one size for all": pax(b"9 size=1\n", b"g") + header(),
    "a size that is no number": pax("11 size=²\n".encode()) + header(),
    "a size that is too large a number": pax(b"39 size=" + b"9" * 30 + b"\n") + header(),
    "a record longer than its header": pax(b"99 path=x\n") + header(),
    "an extended header of nothing": pax(b"11 path=xyz\n"),
    "a name of 2 MiB": header(kind=b"L", size=b"00010000000\0") + bytes(2 << 20),
    "gzip": b"\x1f\x8b" + bytes(1022),
    "xz": b"\xfd7zXZ" + bytes(1019),
    "a pickle": b"\x80\x04\x95" + bytes(1021),
}


@pytest.mark.parametrize("what", FOREIGN_REFUSES)
def test_what_no_dataset_has_is_refused_in_a_foreign_tar(what: str) -> None:
    with pytest.raises(BrokenTar, match=r"broken at byte \d+: "):
        foreign(FOREIGN_REFUSES[what] + END)


def test_a_zeroed_page_is_no_end() -> None:
    data = bytearray(written({f"{n:04x}.txt": b"x" * 600 for n in range(9)}))
    data[3 * 1536 : 3 * 1536 + 1024] = bytes(1024)  # a header and half a file
    for reader in (foreign, read):
        with pytest.raises(BrokenTar, match="data after its end"):
            reader(bytes(data))
    with pytest.raises(BrokenTar, match="bytes after its end"):
        foreign(bytes(17 << 20))


def test_long_names_of_gnu_with_long_links() -> None:
    def add(archive: tarfile.TarFile) -> None:
        entry("n" * 120 + ".lnk", type=tarfile.SYMTYPE, linkname="l" * 120)(archive)
        entry("m" * 120 + ".txt", b"text")(archive)

    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = by_tarfile(add, kind)
        assert [(m.name, data[m.offset :][: m.size]) for m in foreign(data)] == [
            ("m" * 120 + ".txt", b"text")
        ]


@pytest.mark.parametrize("ahead", [1, 512, 700, 1 << 20])
def test_a_file_is_read_some_bytes_ahead(tmp_path: Path, ahead: int) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(written(WHOLE))
    with tar.opened(path, ahead) as archive:
        found = {m.name: bytes(archive.read(m.offset, m.size)) for m in tar.members(archive)}
    assert found == WHOLE
    with (
        pytest.raises(BrokenTar, match="shorter than its folder says"),
        tar.opened(path, ahead, size=path.stat().st_size + 512) as archive,
    ):
        list(tar.members(archive))

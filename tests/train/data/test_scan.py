"""The samples of tars without an index: WebDataset's own grouping, and no guess at a broken one."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import xxhash
from webdataset.tariterators import group_by_keys, tar_file_iterator

from pipeline.tar import BrokenTar
from tests.train.conftest import picture
from tests.train.data.conftest import Tars
from train.data.scan import Scan, scan
from train.data.storage import Shard

JPEG = picture(0)[0]


def _shard(path: Path) -> Shard:
    return Shard(str(path), path.stat().st_size, "")


def _scan(path: Path, *, caption: str = "txt", checksums: bool = False) -> Scan:
    return scan(_shard(path), path.name, 7, caption=caption, checksums=checksums, timeout_s=9)


def _tar(
    path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT, **more: Any
) -> Path:
    with tarfile.open(path, "w:", format=kind, **more) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _contents(path: Path, found: Scan) -> dict[str, tuple[bytes, bytes]]:
    data = path.read_bytes()
    return {
        row["key"]: (
            data[row["image_offset"] :][: row["image_bytes"]],
            data[row["text_offset"] :][: row["text_bytes"]],
        )
        for row in found.samples.to_pylist()
    }


def _as_webdataset_reads(path: Path) -> dict[str, tuple[bytes, bytes]]:
    with path.open("rb") as stream:
        members = [{**member, "__url__": ""} for member in tar_file_iterator(stream)]
    read = group_by_keys(members)
    return {sample["__key__"]: (sample["jpg"], sample["txt"]) for sample in read if "jpg" in sample}


def test_it_finds_what_webdataset_reads(tars: Tars) -> None:
    path = tars(40) / "00000.tar"
    found = _scan(path)
    assert not found.left_out
    assert _contents(path, found) == _as_webdataset_reads(path)
    rows = found.samples.to_pylist()
    assert rows[0]["offset"] == 0
    # Samples lie side by side, and the end is marked.
    assert all(a["offset"] + a["length"] == b["offset"] for a, b in pairwise(rows))
    assert not any(path.read_bytes()[rows[-1]["offset"] + rows[-1]["length"] :])


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_formats_folders_and_long_names(tmp_path: Path, kind: int) -> None:
    long = f"{'folder/' * 9}{'long' * 20}"  # 143 characters: two fields of ustar, one record of pax
    members = [("images/", b"")]
    for key in ("images/a", "images/b.c", "a", long):
        members += [(f"{key}.jpg", JPEG + key.encode()), (f"{key}.txt", key.encode())]
    members.insert(3, ("__meta__/jpg.txt", b"x"))
    members.insert(4, ("README", b"no extension"))
    path = _tar(tmp_path / "x.tar", members, kind)
    expected = {
        key: (JPEG + key.encode(), key.encode()) for key in ("images/a", "a", long)
    }  # of b.c the extension is c.jpg, as for webdataset
    found = _scan(path)
    assert _contents(path, found) == expected
    assert dict(found.left_out) == {"no_picture": 1}
    assert _as_webdataset_reads(path) == expected


def test_a_pax_header_of_all_files_and_sizes_beyond_octal(tmp_path: Path) -> None:
    members = [("a.jpg", JPEG), ("a.txt", "ä".encode())]
    path = _tar(tmp_path / "x.tar", members, tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 999})
    assert _contents(path, _scan(path)) == {"a": (JPEG, "ä".encode())}
    data = bytearray(_tar(tmp_path / "y.tar", members).read_bytes())
    # The size as GNU tar writes large ones: a marked, binary number.
    data[124:136] = b"\x80" + len(JPEG).to_bytes(11, "big")
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "y.tar").write_bytes(data)
    assert _contents(tmp_path / "y.tar", _scan(tmp_path / "y.tar")) == {"a": (JPEG, "ä".encode())}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"a text"}, "no_picture"),
        ({"jpg": b"", "txt": b"a text"}, "no_picture"),
        ({"jpg": JPEG}, "no_text"),
        ({"jpg": JPEG, "txt": b" \n"}, "no_text"),
        ({"jpg": JPEG, "txt": b"\xff"}, "text_not_utf8"),
        ({"jpg": JPEG, "txt": b"a", "JPG": JPEG}, "repeated_member"),
    ],
)
def test_what_is_left_out_is_counted(
    tmp_path: Path, members: Mapping[str, bytes], reason: str
) -> None:
    whole = [("z.jpg", JPEG), ("z.txt", b"whole")]
    path = _tar(tmp_path / "x.tar", [*((f"a.{k}", v) for k, v in members.items()), *whole])
    found = _scan(path)
    assert dict(found.left_out) == {reason: 1}
    assert _contents(path, found) == {"z": (JPEG, b"whole")}


def test_a_caption_in_the_json(tmp_path: Path) -> None:
    values = [b'{"caption": "a dog"}', b'{"caption": null}', b'{"other": "x"}', b"[1]", b"{torn"]
    members = [
        member
        for number, value in enumerate(values)
        for member in ((f"{number}.webp", JPEG), (f"{number}.json", value))
    ]
    path = _tar(tmp_path / "x.tar", members)
    found = _scan(path, caption="json:caption")
    assert _contents(path, found) == {"0": (JPEG, values[0])}
    assert dict(found.left_out) == {"no_text": 4}


def test_checksums_are_those_of_the_bytes(tars: Tars) -> None:
    path = tars(5) / "00000.tar"
    plain, found = _scan(path), _scan(path, checksums=True)
    contents = _contents(path, found)
    for row in found.samples.to_pylist():
        image, text = contents[row["key"]]
        assert row["image_check"] == xxhash.xxh3_64_intdigest(image)
        assert row["text_check"] == xxhash.xxh3_64_intdigest(text)
    assert plain.samples.drop(["image_check"]).equals(found.samples.drop(["image_check"]))


def test_every_way_to_break_a_tar_is_noticed(tars: Tars, tmp_path: Path) -> None:
    whole = (tars(4) / "00000.tar").read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # the last block that is not empty
    path = tmp_path / "broken.tar"
    for size in (0, 100, 512, 1000, end // 2, end - 512, end, end + 100):
        path.write_bytes(whole[:size])
        with pytest.raises(BrokenTar, match=rf"{path}: broken at byte \d+: "):
            _scan(path)
    headers = [at for at in range(0, end, 512) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 24  # three members a sample, each with a pax header before its own
    for at in headers:
        for byte in (0, 124, 130, 150, 156, 257, 300):
            broken = bytearray(whole)
            broken[at + byte] ^= 4
            path.write_bytes(broken)
            with pytest.raises(BrokenTar, match=rf"broken at byte {at}: "):
                _scan(path)
    path.write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(BrokenTar, match="decompress it"):
        _scan(path)


def test_links_hold_nothing_and_sparse_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.jpg"
        tar.addfile(link)
        for name, data in (("b.jpg", JPEG), ("b.txt", b"b")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert list(_contents(path, _scan(path))) == ["b"]
    with tarfile.open(path, "w:") as tar:
        sparse = tarfile.TarInfo("a.jpg")
        sparse.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(sparse)
    with pytest.raises(BrokenTar, match="kind 'S'"):
        _scan(path)

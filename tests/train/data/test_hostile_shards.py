"""Shards and names of shards that mean harm, at every place where a user may put them."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pickle
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import manifest, tar
from pipeline.config import Settings, UserError
from pipeline.manifest import Damaged, digest
from pipeline.stage import Run
from pipeline.stats import Stats
from tests.train.conftest import Pack, picture
from train.data.datasets import listing
from train.data.index import DatasetError, open_dataset
from train.data.scan import scan
from train.data.storage import Shard, find
from train.settings import DatasetSettings

JPEG = picture(0)[0]


class Canary:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


NAMES = [
    "pipe:touch {canary}",
    "pipe:touch {canary}; cat x.tar",
    "pipe:touch {canary} #.tar",
    "pipe://touch {canary}",
    "{folder}/x.tar'; touch {canary}; '.tar",
    "{folder}/$(touch {canary}).tar",
    "{folder}/`touch {canary}`.tar",
    "{folder}/x.tar|touch {canary}",
    "http://127.0.0.1:9/x.tar'; touch {canary}; '",
    "simplecache::file://{folder}/x.tar",
    "zip://*.tar::file://{folder}/x.zip",
    "tar://x.tar::file://{folder}/x.tar",
    "reference://{folder}/x.json",
    "file://{folder}/x.tar::reference://",
    "github://someone:something@main/x.tar",
    "git://{folder}:x.tar",
    "jupyter://127.0.0.1:9/x.tar",
    "dask://{folder}/x.tar",
    "data:application/x-tar;base64,AAAA",
    "python:os.system('touch {canary}')",
    "-",
    "/dev/stdin",
    "/dev/zero",
    "{folder}",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_shards_is_a_place_and_no_command(
    tmp_path: Path, canary: Path, name: str
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    path = name.format(canary=canary, folder=folder)
    with pytest.raises(UserError):
        listing(DatasetSettings(path=path), 0.5)
    with pytest.raises(UserError):
        find(path, timeout_s=0.5)
    with pytest.raises(UserError):  # evaluate.datasets, and all other inputs of a run
        Run(tmp_path / "run", Settings()).find(path)
    assert not canary.exists()


def entry(name: str, data: bytes = b"", **fields: object) -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        for field, value in fields.items():
            setattr(member, field, value)
        archive.addfile(member, io.BytesIO(data))

    return add


def built(*entries: Callable[[tarfile.TarFile], None], kind: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:", format=kind) as archive:
        for add in entries:
            add(archive)
    return stream.getvalue()


WHOLE = entry("good.jpg", JPEG), entry("good.txt", b"a text")


def scanned(path: Path) -> list[str]:
    """The keys that a dataset without an index would train on; none if it is refused."""
    shard = Shard(str(path), path.stat().st_size, "")
    try:
        found = scan(shard, path.name, 0, caption="txt", checksums=True, timeout_s=9)
    except tar.BrokenTar:
        return []
    keys: list[str] = found.samples["key"].to_pylist()
    return keys


def published(path: Path) -> bool:
    """Whether a stage could publish it."""
    folder = path.parent / "stage" / "store" / "00000.x"
    folder.mkdir(parents=True)
    (folder / "x.tar").hardlink_to(path)
    try:
        manifest.publish(
            path.parent / "stage", folder, index=0, fingerprint="f" * 64, stats=Stats(),
            seconds=0, attempt=1,
        )  # fmt: skip
    except Damaged:
        return False
    return True


def refused(what: str, data: bytes) -> tuple[str, bytes, list[str]]:
    return what, data, []


SHARDS: list[tuple[str, bytes, list[str]]] = [
    refused("gzip", gzip.compress(built(*WHOLE))),
    refused("xz", lzma.compress(built(*WHOLE))),
    refused("sparse of GNU", built(entry("a.jpg", type=tarfile.GNUTYPE_SPARSE), *WHOLE)),
    refused(
        "sparse of pax, 1 GiB out of nothing",
        built(entry("a.jpg", JPEG, pax_headers={"GNU.sparse.realsize": str(1 << 30)}), *WHOLE),
    ),
    refused("a pipe", built(entry("a.jpg", type=tarfile.FIFOTYPE), *WHOLE)),
    refused("an unknown kind", built(entry("a.jpg", type=b"Z"), *WHOLE)),
    ("a link up", built(entry("a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
                        entry("a.txt", b"x"), *WHOLE), ["good"]),
    ("a hard link", built(entry("a.jpg", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
                          entry("a.txt", b"x"), *WHOLE), ["good"]),
    ("a device", built(entry("a.jpg", type=tarfile.CHRTYPE), entry("a.txt", b"x"), *WHOLE),
     ["good"]),
    ("a way up", built(entry("../../up.jpg", JPEG), entry("../../up.txt", b"x")), ["../../up"]),
    ("an absolute name", built(entry("/abs.jpg", JPEG), entry("/abs.txt", b"x")), ["/abs"]),
    ("compressed text", built(entry("a.jpg", JPEG), entry("a.txt.gz", gzip.compress(b"x" * 999)),
                              *WHOLE), ["good"]),
]  # fmt: skip


@pytest.mark.parametrize(("what", "data", "keys"), SHARDS, ids=[row[0] for row in SHARDS])
def test_a_hostile_shard_is_refused_or_what_is_hostile_in_it_left(
    tmp_path: Path, what: str, data: bytes, keys: list[str]
) -> None:
    """Of links nothing is read; a key is compared and never made a path."""
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    assert scanned(path) == keys
    assert not published(path) or what == "compressed text"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stage", "x.tar"]


def test_pickles_in_a_shard_are_not_opened(tmp_path: Path, canary: Path) -> None:
    payload = pickle.dumps(Canary(canary))
    kinds = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "ten", "tb", "json", "cls")
    path = tmp_path / "x.tar"
    path.write_bytes(
        built(
            entry("a.jpg", JPEG), entry("a.txt", b"x"), *(entry(f"a.{k}", payload) for k in kinds)
        )
    )
    assert scanned(path) == ["a"]
    path.write_bytes(payload)
    assert scanned(path) == []
    assert not published(path)
    assert not canary.exists()


def test_a_text_of_a_gigabyte_is_left_out_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    size = 1 << 30
    data = bytearray(built(*(entry(f"{k}.jpg", JPEG) for k in "ab"), entry("b.txt"), *WHOLE,
                           kind=tarfile.USTAR_FORMAT))  # fmt: skip
    at = data.index(b"b.txt")
    data[at + 124 : at + 136] = b"%011o\0" % size
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    with path.open("wb") as stream:  # the text is a hole
        stream.write(data[: at + 512])
        stream.seek(size, io.SEEK_CUR)
        stream.write(data[at + 512 :])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert scanned(path) == ["good"]
    assert not published(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("length", 1 << 40),
        ("length", -1),
        ("offset", -512),
        ("image_offset", 1 << 40),
        ("image_bytes", 1 << 31),
        ("text_bytes", -5),
        ("text_offset", 1 << 40),
        ("shard", "../../x.tar"),
        ("shard", "/etc/passwd"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(
    pack: Pack, column: str, value: int | str
) -> None:
    folder = pack(6)
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    rows[3][column] = value
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")
    with pytest.raises(DatasetError, match=r"index\.parquet: "):
        open_dataset(folder)


@pytest.mark.parametrize(
    "name", ["../x.tar", "/x.tar", "pipe:id", "x.tar::y", "", ".tar", "a/b.tar"]
)
def test_a_description_with_strange_shards_is_refused(pack: Pack, name: str) -> None:
    folder = pack(6)
    values = {"pairs_by_shard": [{"name": name, "bytes": 1}]}
    text = json.dumps({"fingerprint": digest(values), **values})
    (folder / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match="is no name of a shard"):
        listing(DatasetSettings(path=str(folder)), 9)
    (folder / "dataset.json").write_text(text.replace("tar", "tax").replace("1}", "2}"))
    with pytest.raises(DatasetError, match="it is damaged"):
        listing(DatasetSettings(path=str(folder)), 9)

"""A damaged dataset: what is said of it, and that nothing is overlooked."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_build import pack
from dataset_build.verify import verify
from pipeline.__main__ import main
from tests import mutations
from tests.dataset_build.test_pack import Pack, packed  # noqa: F401


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("original") / "dataset"


@pytest.fixture
def folder(packed: Pack, original: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of a packed dataset, by itself."""
    if not original.exists():
        shutil.copytree(packed().folder / "pack" / "out", original)
    return Path(shutil.copytree(original, tmp_path / "dataset"))


def said(folder: Path, **options: Any) -> list[str]:
    return [str(fault) for fault in verify(folder, **options)]


def edit(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def row_of(folder: Path, shard: str, sample: int = 2) -> dict[str, Any]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "index.parquet").to_pylist()
    return [row for row in rows if row["shard"] == shard][sample]


def test_a_whole_dataset_has_no_faults(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[tuple[int, int]] = []
    assert verify(folder, tick=lambda done, total: ticks.append((done, total))) == []
    total = sum(path.stat().st_size for path in (folder / "shards").iterdir())
    assert ticks[-1] == (total, total) and len(ticks) == 3
    monkeypatch.setattr("dataset_build.verify._AT_ONCE", 0)
    assert verify(folder, workers=2) == []


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("image", "its picture is not the one that was packed"),
        ("text", "its text is not the one that was packed"),
        ("json", "its json is not the one that was packed"),
    ],
)
def test_it_names_file_sample_and_what(folder: Path, kind: str, what: str) -> None:
    row = row_of(folder, "00001.tar")
    path = folder / "shards/00001.tar"

    def flip(data: bytearray) -> None:
        data[row[f"{kind}_offset"] + 5] ^= 4

    edit(path, flip)
    assert said(folder) == [
        "shards/00001.tar: its bytes differ from those that were packed",
        f"shards/00001.tar: sample {row['uid'].hex()}: {what}",
    ]


def test_damage_to_the_structure_leaves_the_samples_to_be_checked(folder: Path) -> None:
    first, third = row_of(folder, "00000.tar", 0), row_of(folder, "00000.tar", 2)

    def break_header_and_picture(data: bytearray) -> None:
        data[first["text_offset"] - 512 + 120] ^= 1
        data[third["image_offset"]] ^= 1

    edit(folder / "shards/00000.tar", break_header_and_picture)
    at = first["text_offset"] - 512
    assert said(folder)[1:] == [
        f"shards/00000.tar: broken at byte {at}: a header whose checksum is wrong",
        f"shards/00000.tar: sample {third['uid'].hex()}: "
        "its picture is not the one that was packed",
    ]


def test_missing_cut_and_strange_shards(folder: Path) -> None:
    path = folder / "shards/00002.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    found = said(folder)
    assert found[0] == f"shards/00002.tar: {len(whole) - 512} bytes, packed with {len(whole)}"
    path.unlink()
    assert said(folder) == ["shards/00002.tar: cannot be read (No such file or directory)"]
    path.write_bytes(whole)
    (folder / "shards/00003.tar").write_bytes(bytes(1024))
    assert said(folder) == ["shards/00003.tar: is no part of the dataset"]


def test_parts_of_the_index_are_those_of_the_whole(folder: Path) -> None:
    """Of a copy: their checksums are in no file of it, but the whole says what they must say."""
    first, second, third = sorted(folder.glob("index-*.parquet"))
    whole = second.read_bytes()
    second.write_bytes(whole[:50])
    third.unlink()
    said_of = [fault.partition(": ") for fault in said(folder)]
    assert [(name, what[:14]) for name, _, what in said_of] == [
        ("index-00001.parquet", "cannot be read"),
        ("index-00002.parquet", "cannot be read"),
    ]
    shutil.copy(first, second)
    assert said(folder)[0] == "index-00001.parquet: says other than index.parquet"
    second.write_bytes(whole)
    shutil.copy(first, third.with_name("index-00007.parquet"))
    assert said(folder) == [
        "index-00007.parquet: is no part of the dataset",
        "index-00002.parquet: cannot be read (No such file or directory)",
    ]
    for path in folder.glob("index-*.parquet"):
        path.unlink()  # what is of use to a build alone may be left out
    assert said(folder) == []


def test_parts_say_which_samples_were_removed(folder: Path) -> None:
    path = folder / "index-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({pack.REMOVED: bytes(16)}), path)
    (found,) = said(folder)
    assert "other uids were removed than dataset.json says" in found


def test_without_its_description_a_copy_is_a_dataset_still(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "dataset.json").unlink()
    assert main(["verify", str(folder)]) == 5
    assert "dataset.json: cannot be read (No such file or directory)" in capsys.readouterr().out


def test_an_index_that_is_cut_elsewhere_than_the_shards(folder: Path) -> None:
    path = folder / "index.parquet"
    table = pq.read_table(path)
    shards = json.loads((folder / "dataset.json").read_text())["pairs_by_shard"]
    for rows in (1, 4, 7, 100):
        pq.write_table(table, path, row_group_size=rows)
        (folder / "dataset.json").write_text(pack.description(path, shards, b""))
        assert said(folder, decodes=False) == []


KILLS = """
import os, signal

def decode_jpeg_header(picture):
    if bytes(picture) == open({file!r}, "rb").read():
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("not decoded here")
"""


def test_a_picture_that_kills_its_decoder_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_of(folder, "00001.tar", 3)
    at, size = row["image_offset"], row["image_bytes"]
    file = tmp_path / "picture"
    file.write_bytes((folder / "shards/00001.tar").read_bytes()[at : at + size])
    (tmp_path / "simplejpeg.py").write_text(KILLS.format(file=str(file)))
    monkeypatch.syspath_prepend(str(tmp_path))  # the processes of the pool have it too
    monkeypatch.setattr("dataset_build.verify._AT_ONCE", 0)
    for workers in (1, 2):
        killed = said(folder, workers=workers)[-1]
        assert killed.startswith("shards: a process that read ")
        assert f"sample {row['uid'].hex()} of 00001.tar" in killed
    assert said(folder, workers=1, decodes=False) == []


def rewrite(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change rows of the index, and let all checksums and the fingerprint agree with that; its
    parts are left out."""
    for part in folder.glob("index-*.parquet"):
        part.unlink()
    path = folder / "index.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    shards = json.loads((folder / "dataset.json").read_text())["pairs_by_shard"]
    (folder / "dataset.json").write_text(pack.description(path, shards, b""))


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("image_bytes", 3, "where the index has"),
        ("image_offset", 1 << 40, "its image lies beyond the end of the shard"),
        ("length", 512, "the index has it from byte"),
        ("shard", "00000.tar", "the index has it in 00000.tar"),
        ("uid", bytes(16), "it is out of order"),
        ("width", 31, "pixels, the index has 31 x 24"),
        ("sha256", bytes(32), "its picture is not the one that was packed"),
        ("sent_sha256", bytes(32), "its sent_sha256 is another in the json"),
        ("duplicate_group", bytes(16), "its duplicate_group is another in the json"),
        ("caption_hash", 5, "its text is not the one that was packed"),
        ("json_hash", 5, "its json is not the one that was packed"),
        ("selected_by", [9], "its selected_by is another in the json"),
    ],
)
def test_an_index_that_contradicts_the_tars(
    folder: Path, column: str, value: Any, what: str
) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[8][column] = value  # in the second shard

    rewrite(folder, change)
    found = said(folder)
    assert any(what in fault and fault.startswith("shards/00001.tar") for fault in found), found


def test_an_index_with_too_few_rows(folder: Path) -> None:
    rewrite(folder, lambda rows: rows.pop())
    assert said(folder) == ["index.parquet: 17 rows, but 18 samples"]


def test_a_picture_that_does_not_decode_is_found_only_by_decoding(folder: Path) -> None:
    """As if the picture had been broken before it was packed: all hashes agree."""
    import hashlib

    row = row_of(folder, "00001.tar")
    path, at = folder / "shards/00001.tar", row["image_offset"]

    def tear(data: bytearray) -> None:
        middle = at + row["image_bytes"] // 2
        data[middle : at + row["image_bytes"]] = bytes(row["image_bytes"] // 2 + 1)[
            : at + row["image_bytes"] - middle
        ]
        image = bytes(data[at:][: row["image_bytes"]])
        digest = hashlib.sha256(image).hexdigest().encode()
        place = data.index(row["sha256"].hex().encode(), at)
        data[place : place + 64] = digest

    edit(path, tear)
    data = path.read_bytes()

    def agree(rows: list[dict[str, Any]]) -> None:
        import xxhash

        own = next(r for r in rows if r["uid"] == row["uid"])
        own["sha256"] = hashlib.sha256(data[at:][: row["image_bytes"]]).digest()
        own["json_hash"] = xxhash.xxh3_64_intdigest(data[row["json_offset"] :][: row["json_bytes"]])

    described = json.loads((folder / "dataset.json").read_text())
    described["pairs_by_shard"][1]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(described))
    rewrite(folder, agree)
    assert said(folder, decodes=False) == []
    (found,) = said(folder)
    assert f"sample {row['uid'].hex()}: its picture cannot be decoded" in found


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda shards: shards[1].update(name="../00001.tar"), "'../00001.tar' is no name of a"),
        (lambda shards: shards[1].pop("name"), "is not what was written"),
        (lambda shards: shards[1].update(samples=5), "17 samples"),
    ],
)
def test_a_description_that_means_harm(
    folder: Path, change: Callable[[list[dict[str, Any]]], Any], what: str
) -> None:
    shards = json.loads((folder / "dataset.json").read_text())["pairs_by_shard"]
    change(shards)
    (folder / "dataset.json").write_text(pack.description(folder / "index.parquet", shards, b""))
    assert any(what in fault for fault in said(folder))


@pytest.mark.parametrize("name", ["shards/00001.tar", "index.parquet", "dataset.json"])
def test_no_damage_is_overlooked(folder: Path, name: str) -> None:
    tally = mutations.sweep(folder, name, count=60, seed=1)
    by: Counter[str] = Counter()
    for (_, _, who), times in tally.items():
        by[who] += times
    assert by["all"] >= 60
    assert by["verify"] == by["all"]
    if name.endswith(".tar"):
        assert by["structure"] == by["all"]
        # It reads pictures and texts alone: half of these small shards is something else.
        assert 0.3 * by["all"] < by["training"] < by["all"]
    elif name.endswith(".parquet"):
        assert by["training"] == by["all"]


def test_training_notices_damage_to_all_that_it_reads(folder: Path) -> None:
    """It passes over headers, padding and json, which `verify` reads."""
    path, draw = folder / "shards/00001.tar", random.Random(2)
    whole = path.read_bytes()
    for sample in range(6):
        row = row_of(folder, "00001.tar", sample)
        for kind, noticed in (("image", True), ("text", True), ("json", False)):
            damaged = bytearray(whole)
            at = row[f"{kind}_offset"] + draw.randrange(row[f"{kind}_bytes"])
            damaged[at] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            assert mutations.training_notices(folder) is noticed

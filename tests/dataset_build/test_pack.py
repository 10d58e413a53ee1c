from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import create_model

from dataset_build import pack, records
from dataset_build.pack import NothingLeft, PackSettings
from pipeline.config import Settings
from pipeline.manifest import Damaged
from pipeline.stage import Run

PAIRS = 23


def uid_of(number: int) -> bytes:
    return hashlib.md5(str(number).encode()).digest()


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32 + number, 24), (number * 9, 80, 10)).save(stream, "JPEG")
    return stream.getvalue()


def survives(number: int) -> bool:
    return number % 5 != 0


def write_download(folder: Path, parts: int, order: random.Random) -> None:
    numbers = sorted(range(PAIRS), key=uid_of)
    for part in range(parts):
        mine = numbers[part * PAIRS // parts : (part + 1) * PAIRS // parts]
        name = f"staged-{part:05d}.tar"
        pq.write_table(
            pa.Table.from_pylist(
                [
                    {
                        "uid": uid_of(n),
                        "status": "ok",
                        "staged": name,
                        "final_url": f"http://a.example/{n}.jpg",
                        "sha256": hashlib.sha256(b"sent" + picture(n)).digest(),
                        "width": 32 + n,
                        "height": 24,
                        "original_width": 64 + n,
                        "original_height": 48,
                    }
                    for n in mine
                ],
                schema=records.FETCHED,
            ),
            folder / f"fetched-{part:05d}.parquet",
        )
        order.shuffle(mine)
        with tarfile.open(folder / name, "w") as tar:
            for number in mine:
                for extension, data in (("jpg", picture(number)), ("txt", b"?"), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{uid_of(number).hex()}.{extension}")
                    member.size = len(data)
                    member.mtime = order.randrange(1 << 30)
                    tar.addfile(member, io.BytesIO(data))


def write_screen(folder: Path, parts: int) -> None:
    numbers = sorted(range(PAIRS), key=uid_of)
    kept = []
    for part in range(parts):
        mine = numbers[part * PAIRS // parts : (part + 1) * PAIRS // parts]
        rows = [{"uid": uid_of(n), "keep": survives(n), "reason": ""} for n in mine]
        name = f"screened-{part:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=records.SCREENED), folder / name)
        kept.append({"file": name, "kept": sum(row["keep"] for row in rows)})
    (folder / "survivors.json").write_text(json.dumps(kept))


def write_balance(folder: Path, files: int, order: random.Random) -> None:
    numbers = list(range(PAIRS))
    order.shuffle(numbers)
    for file in range(files):
        rows = [
            {
                "uid": uid_of(n),
                "url": f"http://a.example/{n}",
                "text": f"picture {n} ★ naïve 猫",
                "page_url": "http://a.example/",
                "source": "alt",
                "snapshot": "CC-1",
                "occurrences": 1,
                "query_ids": [n, n + 1],
                "selected_by": [n],
                "probability": 0.5,
            }
            for n in numbers[file::files]
        ]
        table = pa.Table.from_pylist(rows, schema=records.SELECTED)
        pq.write_table(table, folder / f"selected-{file:05d}.parquet", row_group_size=4)


Pack = Callable[..., Run]


@pytest.fixture
def packed(tmp_path_factory: Any, publish_files: Any, run_stage: Any) -> Pack:
    """Pack the same pairs, however they were selected, fetched and cut."""

    def go(parts: int = 2, files: int = 2, seed: int = 0, pairs_per_shard: int = 7) -> Run:
        model = create_model("Sections", __base__=Settings, pack=(PackSettings, ...))
        settings = PackSettings(pairs_per_shard=pairs_per_shard)
        run = Run(tmp_path_factory.mktemp("run"), model(pack=settings))
        order = random.Random(seed)
        publish_files(run, "balance", lambda folder: write_balance(folder, files, order))
        publish_files(run, "download", lambda folder: write_download(folder, parts, order))
        publish_files(run, "screen", lambda folder: write_screen(folder, parts))
        run_stage(run, pack.STAGE)
        return run

    return go


def output(run: Run, name: str) -> Path:
    return run.folder / "pack" / "out" / name


def test_shards_are_equal_sorted_and_complete(packed: Pack) -> None:
    run = packed()
    survivors = sorted(uid_of(n).hex() for n in range(PAIRS) if survives(n))
    found, sizes = [], []
    for shard in sorted(output(run, "shards").iterdir()):
        with tarfile.open(shard, "r:") as tar:
            members = tar.getmembers()
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert member.uname == member.gname == ""
        stems = [member.name.partition(".")[0] for member in members]
        assert [m.name.partition(".")[2] for m in members] == ["jpg", "txt", "json"] * (
            len(members) // 3
        )
        found += stems[::3]
        sizes.append(len(stems) // 3)
    assert found == survivors
    assert len(sizes) == -(-len(survivors) // 7)
    assert max(sizes) - min(sizes) <= 1


def test_the_index_addresses_exactly_the_bytes(packed: Pack) -> None:
    run = packed()
    index = pq.read_table(output(run, "index.parquet"))
    assert index.schema.equals(records.INDEX)
    rows = index.to_pylist()
    assert [row["uid"] for row in rows] == sorted(row["uid"] for row in rows)
    numbers = {uid_of(n): n for n in range(PAIRS)}
    for row in rows:
        data = output(run, f"shards/{row['shard']}").read_bytes()
        number = numbers[row["uid"]]
        image = data[row["image_offset"] :][: row["image_bytes"]]
        assert image == picture(number)
        assert row["sha256"] == hashlib.sha256(image).digest()
        text = data[row["text_offset"] :][: row["text_bytes"]].decode()
        assert text == f"picture {number} ★ naïve 猫"
        with tarfile.open(fileobj=io.BytesIO(data[row["offset"] :][: row["length"]])) as tar:
            names = tar.getnames()
        assert names == [f"{row['uid'].hex()}.{e}" for e in ("jpg", "txt", "json")]
        assert row["query_ids"] == [number, number + 1]
        assert (row["width"], row["height"]) == (32 + number, 24)


def test_provenance_is_whole_and_timeless(packed: Pack) -> None:
    run = packed()
    with tarfile.open(output(run, "shards/00000.tar")) as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".json")]
        records_ = [json.loads(tar.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
    for member, record in zip(members, records_, strict=True):
        assert record["uid"] == member.name.partition(".")[0]
        assert set(record) == {
            *("uid", "url", "final_url", "page_url", "text", "source", "snapshot", "occurrences"),
            *("query_ids", "selected_by", "probability", "sha256", "width", "height"),
            *("original_width", "original_height"),
        }


def test_bytes_do_not_depend_on_how_the_pictures_came(packed: Pack) -> None:
    def digests(run: Run) -> dict[str, str]:
        names = ["index.parquet", "dataset.json"]
        names += [f"shards/{path.name}" for path in output(run, "shards").iterdir()]
        return {name: hashlib.sha256(output(run, name).read_bytes()).hexdigest() for name in names}

    first = digests(packed(parts=1, files=1, seed=1))
    assert digests(packed(parts=4, files=3, seed=2)) == first
    assert digests(packed(parts=7, files=5, seed=3)) == first


def test_the_description_names_every_shard(packed: Pack) -> None:
    run = packed()
    description = json.loads(output(run, "dataset.json").read_text())
    assert description["samples"] == sum(survives(n) for n in range(PAIRS))
    assert [shard["name"] for shard in description["pairs_by_shard"]] == sorted(
        path.name for path in output(run, "shards").iterdir()
    )
    for shard in description["pairs_by_shard"]:
        data = output(run, f"shards/{shard['name']}").read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    other = json.loads(output(packed(pairs_per_shard=5), "dataset.json").read_text())
    assert other["fingerprint"] != description["fingerprint"]


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_the_shards(packed: Pack) -> None:
    import webdataset

    run = packed()
    shards = sorted(str(path) for path in output(run, "shards").iterdir())
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len(samples) == sum(survives(n) for n in range(PAIRS))
    numbers = {uid_of(n).hex(): n for n in range(PAIRS)}
    for sample in samples:
        assert sample["jpg"] == picture(numbers[sample["__key__"]])
        assert json.loads(sample["json"])["text"] == sample["txt"].decode()


def test_a_survivor_without_its_picture_is_damage(
    packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = write_download

    def forgetful(folder: Path, parts: int, order: random.Random) -> None:
        honest(folder, parts, order)
        tarfile.open(folder / "staged-00000.tar", "w").close()

    monkeypatch.setitem(globals(), "write_download", forgetful)
    with pytest.raises(Damaged, match="no picture for"):
        packed()


def test_no_survivor_is_an_error_that_says_so(
    packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "survives", lambda number: False)
    with pytest.raises(NothingLeft, match="not one picture survived"):
        packed()

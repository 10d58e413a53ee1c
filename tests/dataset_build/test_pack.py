from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from dataset_build import pack, records
from dataset_build.match import MatchSettings
from dataset_build.pack import NothingLeft, PackSettings
from pipeline.manifest import Damaged, digest
from pipeline.stage import Run
from tests.dataset_build import pack_inputs
from tests.dataset_build.hand_made import Config
from tests.dataset_build.pack_inputs import (
    PAIRS,
    Downloaded,
    Pack,
    address_of,
    parts_of,
    picture,
    survives,
    text_of,
    uid_of,
    write_balance,
    write_download,
    write_queries,
    write_screen,
)


@pytest.fixture
def packed(tmp_path_factory: Any, publish_files: Any, run_stage: Any) -> Pack:
    """Pack the same pairs, however they were selected, fetched and cut."""

    def go(parts: int = 2, buckets: int = 4, seed: int = 0, pairs_per_shard: int = 7) -> Run:
        config = Config(
            match=MatchSettings(buckets=buckets), pack=PackSettings(pairs_per_shard=pairs_per_shard)
        )
        run = Run(tmp_path_factory.mktemp("run"), config)
        files, order = parts_of(parts), random.Random(seed)
        publish_files(run, "queries", write_queries)
        publish_files(run, "balance", lambda folder: write_balance(run, folder))
        publish_files(run, "download", lambda folder: write_download(folder, files, order))
        publish_files(run, "screen", lambda folder: write_screen(folder, files))
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
        assert image == picture(address_of(number))
        assert row["sha256"] == hashlib.sha256(image).digest()
        text = data[row["text_offset"] :][: row["text_bytes"]].decode()
        assert text == text_of(number)
        with tarfile.open(fileobj=io.BytesIO(data[row["offset"] :][: row["length"]])) as tar:
            names = tar.getnames()
        assert names == [f"{row['uid'].hex()}.{e}" for e in ("jpg", "txt", "json")]
        assert (row["query_ids"], row["selected_by"]) == ([number, number + 1], [number])
        assert (row["width"], row["height"]) == (32 + address_of(number), 24)
        assert row["probability"] == 0.5


def test_every_sample_says_where_it_is_from_and_why_it_is_there(packed: Pack) -> None:
    run = packed()
    numbers = {uid_of(n).hex(): n for n in range(PAIRS) if survives(n)}
    found = set()
    for row in pq.read_table(output(run, "index.parquet")).to_pylist():
        data = output(run, f"shards/{row['shard']}").read_bytes()
        written = data[row["json_offset"] :][: row["json_bytes"]]
        assert row["json_hash"] == xxhash.xxh3_64_intdigest(written)
        text = data[row["text_offset"] :][: row["text_bytes"]]
        assert row["caption_hash"] == xxhash.xxh3_64_intdigest(text)
        n = numbers[row["uid"].hex()]
        address, image = address_of(n), picture(address_of(n))
        assert json.loads(written) == {
            "uid": row["uid"].hex(),
            "url": f"http://a.example/{address}",
            "final_url": f"http://a.example/{address}.jpg",
            "page_url": "http://a.example/",
            "source": "alt",
            "snapshot": "CC-1",
            "text": text_of(n),
            "captions": [text_of(n), f"another of {n}"],
            "occurrences": 1 + n,
            "query_ids": [n, n + 1],
            "queries": [f"Query № {n}", f"Query № {n + 1}"],
            "selected_by": [n],
            "probability": 0.5,
            "duplicate_group": uid_of(n - n % 5).hex(),
            "width": 32 + address,
            "height": 24,
            "bytes": len(image),
            "sha256": hashlib.sha256(image).hexdigest(),
            "original_width": 64 + address,
            "original_height": 48,
            "blurred": address % 3,
            "sent_bytes": 4 + len(image),
            "sent_format": "png",
            "sent_sha256": hashlib.sha256(b"sent" + image).hexdigest(),
        }
        assert row["sent_sha256"].hex() == json.loads(written)["sent_sha256"]
        assert row["duplicate_group"] == uid_of(n - n % 5)
        found.add(n)
    assert found == set(numbers.values())


def test_bytes_do_not_depend_on_how_the_pictures_came(packed: Pack) -> None:
    def digests(run: Run) -> dict[str, str]:
        names = ["index.parquet", "dataset.json"]
        names += [f"shards/{path.name}" for path in output(run, "shards").iterdir()]
        return {name: hashlib.sha256(output(run, name).read_bytes()).hexdigest() for name in names}

    first = digests(packed(parts=1, buckets=1, seed=1))
    assert digests(packed(parts=4, buckets=2, seed=2)) == first
    assert digests(packed(parts=7, buckets=8, seed=3)) == first
    assert digests(packed(parts=40, buckets=64, seed=4)) == first  # some parts are empty


def test_a_shard_reads_only_the_files_that_hold_it(packed: Pack) -> None:
    run = packed(parts=12, buckets=16)  # groups of two buckets
    rows = pq.read_table(output(run, "index.parquet")).to_pylist()
    for task in [planned.task for planned in run.plan("pack")][:-1]:
        uids = [
            int.from_bytes(r["uid"], "big")
            for r in rows
            if r["shard"] == f"{task.params['shard']}.tar"
        ]
        first, last = (uid * 12 >> 128 for uid in (uids[0], uids[-1]))
        files = [f"-{part:05d}-of-00012.parquet" for part in range(first, last + 1)]
        groups = range(first * 8 // 12, -(-(last + 1) * 8 // 12))
        assert [name for name in task.reads if not name.endswith(".tar")] == [
            "queries:queries.parquet",
            *(f"screen:screened{name}" for name in files),
            *(f"download:fetched{name}" for name in files),
            *(f"balance:selected-{group:05d}.parquet" for group in groups),
        ]


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
    index = output(run, "index.parquet").read_bytes()
    assert description["index"] == {
        "bytes": len(index),
        "sha256": hashlib.sha256(index).hexdigest(),
    }
    fingerprint = description.pop("fingerprint")
    assert fingerprint == digest(description)
    other = json.loads(output(packed(pairs_per_shard=5), "dataset.json").read_text())
    assert other["fingerprint"] != fingerprint


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_the_shards(packed: Pack) -> None:
    import webdataset

    run = packed()
    shards = sorted(str(path) for path in output(run, "shards").iterdir())
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len(samples) == sum(survives(n) for n in range(PAIRS))
    numbers = {uid_of(n).hex(): n for n in range(PAIRS)}
    for sample in samples:
        assert sample["jpg"] == picture(address_of(numbers[sample["__key__"]]))
        assert json.loads(sample["json"])["text"] == sample["txt"].decode()


def test_a_survivor_without_its_picture_is_damage(
    packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = write_download

    def forgetful(folder: Path, parts: Downloaded, order: random.Random) -> None:
        honest(folder, parts, order)
        tars = list(folder.glob("staged-*.tar"))
        assert len(tars) > 2
        for tar in tars:
            tarfile.open(tar, "w").close()

    monkeypatch.setitem(globals(), "write_download", forgetful)
    with pytest.raises(Damaged, match="has changed"):
        packed()


@pytest.mark.parametrize("name", ["selected", "fetched"])
def test_a_survivor_without_its_record_is_damage(
    packed: Pack, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lost = next(uid_of(n) for n in range(PAIRS) if survives(n))
    honest = pq.write_table

    def forgetful(table: pa.Table, path: Path, **options: Any) -> None:
        if path.name.startswith(name):
            table = table.filter(pa.array([uid != lost for uid in table["uid"].to_pylist()]))
        honest(table, path, **options)

    monkeypatch.setattr(pq, "write_table", forgetful)
    with pytest.raises(Damaged, match=f"1 pairs are missing, as {lost.hex()}"):
        packed()


def test_no_survivor_is_an_error_that_says_so(
    packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_inputs, "survives", lambda number: False)
    with pytest.raises(NothingLeft, match="not one picture survived"):
        packed()

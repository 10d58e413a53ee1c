"""What lists name leaves no byte in what is packed, and is not asked for if they name the place."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dataset_build import lists
from dataset_build.list_entries import Kind
from dataset_build.lists import ListsSettings
from dataset_build.screen import perceptual
from pipeline import files, tar
from tests.dataset_build.download.conftest import HostileWeb
from tests.small_build import SmallBuild

Sample = dict[str, Any]


@pytest.fixture
def web() -> Iterator[HostileWeb]:
    web = HostileWeb()
    yield web
    web.close()


def _packed(run: Path) -> list[Sample]:
    """Every sample's provenance, its uid, and its picture, as the shard has them."""
    found = []
    for row in pq.read_table(run / "pack/out/index.parquet").to_pylist():
        with tar.opened(run / "pack/out/shards" / row["shard"]) as shard:
            picture = bytes(shard.read(row["image_offset"], row["image_bytes"]))
            provenance = json.loads(bytes(shard.read(row["json_offset"], row["json_bytes"])))
        found.append({**provenance, "uid": row["uid"], "picture": picture, "row": row})
    return sorted(found, key=lambda sample: str(sample["url"]))


def _entry(kind: Kind, sample: Sample) -> str:
    if kind == "addresses":
        return str(sample["url"])
    if kind == "sha256":
        return bytes(sample["row"]["sent_sha256"]).hex()
    if kind == "perceptual":
        return perceptual.hash_of(sample["picture"]).pdq.hex()
    return bytes(sample["uid"]).hex()


def test_no_byte_of_what_is_listed_is_packed(
    web: HostileWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENWIT_CONNECT_TO", web.connect_to)
    small = SmallBuild(web, addresses=120)
    small.build(tmp_path / "all")
    everything = _packed(tmp_path / "all")
    named = {"domains": [sample for sample in everything if "//a3.example/" in sample["url"]]}
    others = [sample for sample in everything if sample not in named["domains"]]
    (tmp_path / "domains.txt").write_text("a3.example  # all of it\n")
    patterns: dict[str, tuple[str, ...]] = {"domains": (str(tmp_path / "domains.txt"),)}
    kinds: tuple[Kind, ...] = ("addresses", "sha256", "perceptual", "uids")
    pairs = Counter(pair.url for pair in small.pairs)
    for kind in kinds:
        # A listed pair is no word against its picture: another pair of it would come in.
        own = [sample for sample in others if kind != "uids" or pairs[sample["url"]] == 1][:5]
        others = [sample for sample in others if sample not in own]
        named[kind] = own
        path = tmp_path / f"{kind}.txt.gz"
        path.write_bytes(gzip.compress("\n".join(_entry(kind, s) for s in own).encode()))
        patterns[kind] = (str(path),)
    listed = [sample for each in named.values() for sample in each]
    assert len(listed) > 30

    blocked = lists.ListSettings(**patterns)
    small.config = small.config.model_copy(update={"lists": ListsSettings(blocked=blocked)})
    web.hits.clear()
    small.build(tmp_path / "kept")
    kept = _packed(tmp_path / "kept")
    uids = {sample["uid"] for sample in listed}
    assert {s["uid"] for s in kept} == {s["uid"] for s in everything} - uids
    written = b"".join(path.read_bytes() for path in files.walk(tmp_path / "kept/pack"))
    for sample in listed:
        assert sample["picture"] not in written
        assert sample["row"]["sha256"] not in written
        assert str(sample["url"]).encode() not in written
    assert sum(sample["picture"] in written for sample in kept) == len(kept)
    asked = small.asked()
    place = (*named["addresses"], *named["domains"])
    assert not [sample["url"] for sample in place if asked[sample["uid"][:8]]]

"""A rebuild accepts of each listed address the very file that the published dataset was made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_build import download, records
from dataset_build.download import DownloadSettings
from pipeline.config import ConfigError
from pipeline.stage import Run
from tests.dataset_build.download import conftest
from tests.dataset_build.download.conftest import HostileWeb, picture
from tests.dataset_build.hand_made import Config, Pair, balance_of, dedup_of
from tests.dataset_build.inline import InlineExecutor

PAIRS = [Pair(f"http://a{i % 3}.example/picture/{i}", text) for i in range(12) for text in "xy"]
CHANGED = frozenset({0, 3, 4, 11})
Build = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def build(
    tmp_path: Path, web: HostileWeb, inline: InlineExecutor, monkeypatch: pytest.MonkeyPatch
) -> Build:
    """Download the pairs into a run of this name; their outcomes."""
    monkeypatch.setenv("OPENWIT_CONNECT_TO", web.connect_to)

    def go(name: str, *expected: Path, pairs: list[Pair] = PAIRS) -> list[dict[str, Any]]:
        settings = DownloadSettings(
            allow_networks=("127.0.0.0/8",),
            polite_connections=8,
            requests_per_s=None,
            robots="ignore",
            pairs_per_task=8,
            expected=tuple(map(str, expected)),
        )
        run = Run(tmp_path / name, Config(download=settings))
        inline.advance(run, [dedup_of(pairs), balance_of(pairs), download.STAGE])
        run = Run(run.folder, run.config)
        tables = [pq.read_table(run.path(name)) for name in run.find("download:fetched-*")]
        return list(pa.concat_tables(tables).to_pylist())

    return go


@pytest.fixture
def published(tmp_path: Path, build: Build) -> Path:
    """A folder with the `fetched-*.parquet` of a build, whose run is gone."""
    build("first")
    shutil.copytree(tmp_path / "first/download/out", tmp_path / "published")
    shutil.rmtree(tmp_path / "first")
    return tmp_path / "published"


@pytest.fixture
def changed_web(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the web serves other files at the addresses of `CHANGED`."""

    def other(seed: int) -> bytes:
        return picture(seed + 1000 if seed in CHANGED else seed)

    monkeypatch.setattr(conftest, "picture", other)


def changed(rows: list[dict[str, Any]]) -> set[int]:
    """The addresses that were rejected; every other has its picture."""
    statuses = {int(row["url"].rpartition("/")[2]): row["status"] for row in rows}
    assert len(rows) == len(PAIRS) and set(statuses.values()) <= {"ok", "changed"}
    return {number for number, status in statuses.items() if status == "changed"}


def test_changed_files_and_no_others_are_rejected(
    build: Build, published: Path, changed_web: None, web: HostileWeb
) -> None:
    web.hits.clear()
    rows = build("again", published / "fetched-*.parquet")
    assert changed(rows) == CHANGED
    assert len(web.hits) == 12, "asked once each"
    assert all(row["staged"] == "" for row in rows if row["status"] == "changed")
    assert changed(build("careless")) == set()


def test_an_index_with_the_digests_will_do(
    build: Build, published: Path, changed_web: None, tmp_path: Path
) -> None:
    tables = [pq.read_table(path) for path in sorted(published.glob("fetched-*.parquet"))]
    rows = pa.concat_tables(tables).to_pylist()
    kept = [row for row in rows if not row["url"].endswith("/11")]  # of this nothing is known
    index = [{"uid": row["uid"], "sent_sha256": row["sha256"]} for row in kept]
    path = tmp_path / "index.parquet"
    pq.write_table(pa.Table.from_pylist(index, schema=records.INDEX), path)
    assert changed(build("again", path)) == CHANGED - {11}


def test_what_had_no_file_may_have_one_by_now(
    build: Build, published: Path, changed_web: None
) -> None:
    """Of an address that had failed a published table has the digest of nothing."""
    for path in published.glob("fetched-*.parquet"):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            if row["url"].endswith("/3"):
                row.update(status="dead_link", sha256=bytes(32))
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    assert changed(build("again", published / "fetched-*.parquet")) == CHANGED - {3}


def test_other_expectations_are_judged_anew(
    build: Build, published: Path, changed_web: None, web: HostileWeb
) -> None:
    """What one list let pass is not taken over under another, though its name is the same."""
    files = sorted(published.glob("fetched-*.parquet"))
    assert changed(build("again", published / "*.parquet")) == CHANGED
    for path in files:
        table = pq.read_table(path)
        pq.write_table(table.slice(0, 0), path)
    web.hits.clear()
    assert changed(build("again", published / "*.parquet")) == set()
    assert len(web.hits) == 12


def test_a_table_that_says_nothing_of_what_was_sent_is_refused(
    build: Build, tmp_path: Path
) -> None:
    """An older `index.parquet` lists stored pictures; no file of a server is one of them."""
    path = tmp_path / "index.parquet"
    pq.write_table(pa.table({"uid": [bytes(16)], "sha256": [bytes(32)]}), path)
    with pytest.raises(ConfigError, match="does not say which files servers sent"):
        build("again", path)

"""Counts of each query at every step, and the table that holds them."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_build import report
from dataset_build.report.per_query import STEPS, PerQuery, doubling, parquet, read, table
from dataset_build.report.published import Absent, Build
from tests.dataset_build.report.fake_build import NAMES, STAGES, FakeBuild

COUNTS = ("raw", "deduplicated", "charged", "selected", "in_union", "downloaded", "packed")


def _table(fake_build: FakeBuild) -> pa.Table:
    return pq.read_table(report.write(fake_build.run, STAGES).parent / "queries.parquet")


def test_doubling_bins_hold_the_edges() -> None:
    values = np.array([0, 1, 2, 3, 4, 7, 8, 1023, 1024, 65535], np.uint16)
    assert doubling(values) == Counter({0: 1, 1: 1, 2: 2, 4: 2, 8: 1, 512: 1, 1024: 1, 32768: 1})
    assert doubling(np.zeros(0, np.uint32)) == Counter()


def test_the_table_has_every_query_at_every_step(fake_build: FakeBuild) -> None:
    rows = _table(fake_build.through("pack"))
    assert rows.schema.names == ["query_id", "text", "sources", *COUNTS, "in_packed"]
    assert rows.schema.field("query_id").type == pa.uint32()
    assert {rows.schema.field(name).type for name in (*COUNTS, "in_packed")} == {pa.uint64()}
    made = rows.to_pydict()
    assert made["query_id"] == list(range(fake_build.queries))
    assert made["text"][7] == "query 7"
    assert made["sources"][2] == ["title", "word"]
    kept, selected = fake_build.kept, fake_build.selected
    contained = fake_build.contained
    assert made["raw"] == fake_build.raw.tolist()
    assert made["deduplicated"] == made["charged"] == fake_build.counts.tolist()
    assert made["selected"] == [selected.count(q) for q in range(fake_build.queries)]
    assert made["downloaded"] == fake_build.tally(selected[: fake_build.fetched]).tolist()
    assert made["packed"] == fake_build.tally(selected[:kept]).tolist()
    assert made["in_union"][0] == sum(0 in ids for ids in contained) > made["selected"][0]
    assert made["in_packed"][0] == sum(0 in ids for ids in contained[:kept]) > made["packed"][0]
    for before, after in (("raw", "deduplicated"), ("selected", "downloaded")):
        assert sum(made[before]) > sum(made[after])


@pytest.mark.parametrize("last", NAMES[: NAMES.index("pack") + 1])
def test_columns_of_stages_to_come_are_null(fake_build: FakeBuild, last: str) -> None:
    made = _table(fake_build.through(last))
    stages = {**dict.fromkeys(COUNTS, "balance"), **STEPS, "in_packed": "pack"}
    for name, stage in stages.items():
        there = NAMES.index(stage) <= NAMES.index(last)
        assert made[name].null_count == (0 if there else fake_build.queries), name


def test_counts_are_known_before_the_rest_of_what_balance_knows(fake_build: FakeBuild) -> None:
    fake_build.through("dedup")
    fake_build.publish("balance", lambda f: np.save(f / "counts.npy", fake_build.counts), planned=9)
    made = _table(fake_build)
    assert made["deduplicated"].to_pylist() == fake_build.counts.tolist()
    assert made["raw"].null_count == made["selected"].null_count == fake_build.queries


def test_a_table_of_another_list_is_taken_away(fake_build: FakeBuild) -> None:
    _table(fake_build.through("screen"))
    fake_build.queries = 60
    fake_build.run.stage_folder("queries").rename(fake_build.run.folder / "old")
    fake_build.make_queries()
    page = report.write(fake_build.run, STAGES)
    assert not (page.parent / "queries.parquet").exists()


@pytest.mark.parametrize("stage", ["balance", "screen"])
def test_every_count_must_be_of_the_present_list(fake_build: FakeBuild, stage: str) -> None:
    fake_build.make_queries()
    getattr(fake_build, f"make_{stage}")()
    build = Build(fake_build.run, STAGES)
    assert any(values is not None for values in vars(read(build, 120, None)).values())
    with pytest.raises(Absent, match="another query list"):
        read(build, 121, None)


def test_the_same_table_is_the_same_bytes_and_reads_back(tmp_path: Path) -> None:
    queries = pa.table({"text": ["a", "b"], "sources": [["word"], ["bigram", "word"]]})
    made = table(queries, PerQuery(raw=np.array([3, 2**40]), packed=np.array([0, 1])))
    written = parquet(made)
    assert parquet(made) == written
    assert pq.read_table(io.BytesIO(written)).equals(made)
    assert made["raw"].to_pylist() == [3, 2**40]
    assert made["selected"].to_pylist() == [None, None]

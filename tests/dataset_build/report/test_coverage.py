"""Counts per query, from head to tail."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build.report.coverage import CURVE_POINTS, curve, doubling
from dataset_build.report.gather import gather
from tests.dataset_build.report.fake_build import STAGES, FakeBuild


def test_doubling_bins_hold_the_edges() -> None:
    values = np.array([0, 1, 2, 3, 4, 7, 8, 1023, 1024, 65535], np.uint16)
    assert doubling(values) == Counter({0: 1, 1: 1, 2: 2, 4: 2, 8: 1, 512: 1, 1024: 1, 32768: 1})
    assert doubling(np.zeros(0, np.uint32)) == Counter()


def test_a_curve_is_thinned_and_keeps_its_ends() -> None:
    counts = np.arange(500_000, dtype=np.int64)
    points = curve(counts)
    assert len(points) <= CURVE_POINTS
    assert points[0] == [1, 499_999]
    assert points[-1] == [499_999, 1]  # the query without a pair is left out
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in itertools.pairwise(points))
    assert curve(np.zeros(5, np.int64)) == []


def test_queries_are_counted_at_every_step(fake_build: FakeBuild) -> None:
    fake_build.through("pack")
    section = gather(fake_build.run, STAGES)[0]["queries"]
    counts = fake_build.counts.astype(int)
    assert section["total"] == fake_build.queries
    assert section["zero_hit"] == int((counts == 0).sum())
    assert section["matches"] == {
        "candidates": int(counts.sum()),
        "selected": fake_build.selected_count,
        "packed": fake_build.kept,
    }
    assert section["cap"] == 40
    assert section["capped"]["queries"] == int((counts > 40).sum())
    held = counts[counts > 40].sum() / counts.sum()
    assert abs(section["capped"]["share_of_candidates"] - held) < 1e-12
    assert section["capped"]["share_of_selected"] < held
    assert section["effective"]["selected"] > section["effective"]["candidates"]
    head = section["top"][0]
    assert head["query_id"] == 0
    assert (head["candidates"], head["selected"], head["capped"]) == (500, 40, True)
    assert head["packed"] == len(range(0, fake_build.kept, 97))
    occurs = sum(1 for i in range(fake_build.kept) if 0 in (i % 97, i % 7))
    assert head["in_packed"] == occurs > head["packed"]
    assert head["in_selected"] == 40
    assert sum(band["queries"] for band in section["bands"]) == fake_build.queries


def test_sources_count_every_query_that_names_them(fake_build: FakeBuild) -> None:
    fake_build.through("balance")
    section = gather(fake_build.run, STAGES)[0]["queries"]
    quarter = fake_build.queries // 4
    assert {name: row["queries"] for name, row in section["by_source"].items()} == {
        "word": 2 * quarter,  # alone, and with a title
        "bigram": quarter,
        "title": quarter,
        "wordnet": quarter,
    }
    counts = fake_build.counts.astype(int)
    assert section["by_source"]["bigram"]["candidates"] == counts[1::4].sum()
    assert section["by_source"]["bigram"]["zero_hit"] == (counts[1::4] == 0).sum()
    assert section["by_source"]["bigram"]["packed"] is None


def test_before_balancing_there_are_the_queries_alone(fake_build: FakeBuild) -> None:
    fake_build.through("match")
    section = gather(fake_build.run, STAGES)[0]["queries"]
    assert section["total"] == fake_build.queries
    assert section["zero_hit"] is None
    assert section["curves"] == {}
    assert section["top"] == []


def test_the_sums_of_balance_are_taken_over_where_it_has_them(fake_build: FakeBuild) -> None:
    fake_build.through("dedup")
    charged = fake_build.counts // 10

    def write(folder: Path) -> None:
        np.save(folder / "counts.npy", fake_build.counts)
        table = {
            "query_id": np.arange(fake_build.queries),
            "count": fake_build.counts,
            "charged": charged,
            "selected": np.minimum(charged, 40),
            "in_union": fake_build.counts // 2,
        }
        pq.write_table(pa.table(table), folder / "coverage.parquet")

    fake_build.publish("balance", write)
    section = gather(fake_build.run, STAGES)[0]["queries"]
    assert section["matches"]["selected"] == int(np.minimum(charged, 40).sum())
    assert section["capped"]["queries"] == int((charged > 40).sum()) == 1
    assert [row["capped"] for row in section["top"][:3]] == [True, False, False]
    assert section["top"][1]["in_selected"] == int(fake_build.counts[1]) // 2

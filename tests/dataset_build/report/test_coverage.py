"""Counts per query, from head to tail."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_build.balance.phases import HEAD_DOMAINS
from dataset_build.report.coverage import CURVE_POINTS, TOP, curve
from dataset_build.report.gather import gather
from dataset_build.report.per_query import STEPS
from pipeline.stats import Stats
from tests.dataset_build.report.fake_build import STAGES, FakeBuild


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
    section = gather(fake_build.run, STAGES).report["queries"]
    counts = fake_build.counts.astype(int)
    assert section["total"] == fake_build.queries
    assert section["zero_hit"] == int((counts == 0).sum())
    assert section["pending"] == {}
    assert section["matches"] == {
        "raw": int(fake_build.raw.sum()),
        "deduplicated": int(counts.sum()),
        "selected": fake_build.selected_count,
        "downloaded": fake_build.fetched,
        "packed": fake_build.kept,
    }
    assert list(section["curves"]) == list(section["matches"]) == list(STEPS)
    assert {step: points[0][1] for step, points in section["curves"].items()} == {
        "raw": 750,
        "deduplicated": 500,
        "selected": 40,
        "downloaded": fake_build.tally(fake_build.selected[: fake_build.fetched]).max(),
        "packed": fake_build.tally(fake_build.selected[: fake_build.kept]).max(),
    }
    assert section["covered"]["raw"] == fake_build.queries - section["zero_hit"]
    assert section["covered"]["packed"] == len(set(fake_build.selected[: fake_build.kept]))
    assert section["effective"]["selected"] > 2 * section["effective"]["raw"]


def test_head_and_tail_add_up_at_every_step(fake_build: FakeBuild) -> None:
    fake_build.through("pack")
    section = gather(fake_build.run, STAGES).report["queries"]
    counts = fake_build.counts.astype(int)
    assert sum(band["queries"] for band in section["bands"]) == fake_build.queries
    for step in STEPS:
        share = sum(band[f"share_of_{step}"] for band in section["bands"])
        assert share == pytest.approx(1), step
    capped = section["capped"]
    assert section["cap"] == 40
    assert capped["queries"] == int((counts > 40).sum())
    fetched = np.array(fake_build.selected[: fake_build.fetched])
    assert capped["share_of_raw"] == pytest.approx(
        fake_build.raw[counts > 40].sum() / fake_build.raw.sum()
    )
    assert capped["share_of_downloaded"] == pytest.approx((counts[fetched] > 40).mean())
    assert capped["share_of_selected"] < capped["share_of_deduplicated"] < capped["share_of_raw"]


def test_the_head_is_listed_with_its_domains(fake_build: FakeBuild) -> None:
    fake_build.through("pack")
    top = gather(fake_build.run, STAGES).report["queries"]["top"]
    assert [row["query_id"] for row in top] == list(range(TOP))
    head = top[0]
    kept = fake_build.selected[: fake_build.kept]
    assert [head[step] for step in STEPS] == [
        *(750, 500, 40),
        fake_build.selected[: fake_build.fetched].count(0),
        kept.count(0),
    ]
    assert head["in_union"] == sum(0 in ids for ids in fake_build.contained) > 40
    assert head["in_packed"] > head["packed"]
    assert [row["capped"] for row in top] == [bool(n > 40) for n in fake_build.counts[:TOP]]
    assert head["domains"][:3] == [
        ["photos-1.example", 20],
        ["photos-2.example", 10],
        ["photos-3.example", 5],
    ]
    assert len(head["domains"]) == 5  # 40 halved until nothing is left
    assert top[7]["domains"][0] == ["photos-3.example", 20]


def test_only_the_heads_have_domains(fake_build: FakeBuild) -> None:
    fake_build.through("dedup")
    rows = [(0, "c", 9), (0, "", 3), (0, "b", 3), (1, "d", 1), (119, "e", 1)]
    domains = [dict(zip(HEAD_DOMAINS.names, row, strict=True)) for row in rows]

    def write(folder: Path) -> None:
        np.save(folder / "counts.npy", fake_build.counts)
        pq.write_table(pa.Table.from_pylist(domains, HEAD_DOMAINS), folder / "domains.parquet")

    fake_build.publish("balance", write)
    top = gather(fake_build.run, STAGES).report["queries"]["top"]
    assert top[0]["domains"] == [["c", 9], ["", 3], ["b", 3]]
    assert top[1]["domains"] == [["d", 1]]
    assert top[2]["domains"] == []


@pytest.mark.parametrize("delta", [(17, 5), (0, 3), (0, 0), None])
def test_what_came_and_went_is_told_from_no_comparison(
    fake_build: FakeBuild, delta: tuple[int, int] | None
) -> None:
    fake_build.delta = delta
    fake_build.through("balance")
    section = gather(fake_build.run, STAGES).report["queries"]
    expected = None if delta is None else {"came": delta[0], "went": delta[1]}
    assert section["delta"] == expected


def test_what_came_and_went_waits_for_the_whole_selection(fake_build: FakeBuild) -> None:
    fake_build.make_queries()
    half = Stats(counts=Counter(came=3, went=4))
    fake_build.publish("balance", stats=half, index=0, planned=3)
    assert gather(fake_build.run, STAGES).report["queries"]["delta"] is None
    fake_build.publish("balance", stats=half, index=1, planned=3)
    fake_build.publish("balance", fake_build.write_balance, index=2, planned=3)
    section = gather(fake_build.run, STAGES).report["queries"]
    assert section["delta"] == {"came": 6, "went": 8}


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
    word = section["by_source"]["word"]
    assert (word["alone"], word["brought"], word["cut_off"]) == (quarter, quarter, 0)
    assert word["first"] == [f"query {n}" for n in (0, 2, 4, 6, 8)]
    assert word["last"][-1] == f"query {fake_build.queries - 2}"
    title = section["by_source"]["title"]
    assert (title["alone"], title["brought"], title["cut_off"]) == (0, quarter, 34)
    bigram = section["by_source"]["bigram"]
    counts = fake_build.counts.astype(int)
    assert bigram["raw"] == fake_build.raw[1::4].sum()
    assert bigram["deduplicated"] == counts[1::4].sum()
    assert bigram["zero_hit"] == (counts[1::4] == 0).sum() > 0
    assert bigram["selected"] == sum(query % 4 == 1 for query in fake_build.selected)
    assert bigram["downloaded"] is None and bigram["packed"] is None


def test_a_limit_may_cut_off_nothing(fake_build: FakeBuild) -> None:
    fake_build.cut_off = 0
    fake_build.through("balance")
    section = gather(fake_build.run, STAGES).report["queries"]
    assert [row["cut_off"] for row in section["by_source"].values()] == [0, 0, 0, 0]


def test_before_balancing_there_are_the_queries_alone(fake_build: FakeBuild) -> None:
    fake_build.through("match")
    section = gather(fake_build.run, STAGES).report["queries"]
    assert section["total"] == fake_build.queries
    assert section["zero_hit"] is None
    assert section["curves"] == {}
    assert section["top"] == []
    assert section["delta"] is None
    assert section["pending"] == {
        "raw": "balance: not started",
        "deduplicated": "balance: not started",
        "selected": "balance: not started",
        "downloaded": "screen: not started",
        "packed": "pack: not started",
    }


def test_a_stage_that_is_not_in_the_run_or_did_not_count_is_named(fake_build: FakeBuild) -> None:
    fake_build.through("dedup")
    fake_build.publish("balance", lambda f: np.save(f / "counts.npy", fake_build.counts))
    stages = [stage for stage in STAGES if stage.name not in ("screen", "pack")]
    pending = gather(fake_build.run, stages).report["queries"]["pending"]
    assert pending == {
        "raw": "balance: done, without them",
        "selected": "balance: done, without them",
        "downloaded": "the stage 'screen' is not part of this run",
        "packed": "the stage 'pack' is not part of this run",
    }


def test_the_cap_is_held_against_what_a_query_may_select(fake_build: FakeBuild) -> None:
    fake_build.through("dedup")
    charged = fake_build.counts // 10

    def write(folder: Path) -> None:
        table = {
            "query_id": np.arange(fake_build.queries),
            "raw": fake_build.raw,
            "count": fake_build.counts,
            "charged": charged,
            "selected": np.minimum(charged, 40),
            "in_union": fake_build.counts // 2,
        }
        pq.write_table(pa.table(table), folder / "coverage.parquet")

    fake_build.publish("balance", write)
    section = gather(fake_build.run, STAGES).report["queries"]
    assert section["matches"]["selected"] == int(np.minimum(charged, 40).sum())
    assert section["capped"]["queries"] == int((charged > 40).sum()) == 1
    assert [row["capped"] for row in section["top"][:3]] == [True, False, False]
    assert section["top"][1]["in_union"] == int(fake_build.counts[1]) // 2
    assert section["top"][1]["domains"] is None

"""The report's numbers: sums of the manifests, at any moment of a build."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest

from dataset_build import report
from dataset_build.report.gather import gather, strict
from pipeline.stats import Stats
from tests.dataset_build.report.fake_build import NAMES, STAGES, FakeBuild


def test_totals_are_the_sums_of_the_manifests(fake_build: FakeBuild) -> None:
    fake_build.through("evaluate")
    made, *_ = gather(fake_build.run, STAGES)
    assert [stage["name"] for stage in made["stages"]] == list(NAMES)
    for stage in made["stages"]:
        total = sum((m.stats for m in fake_build.run.manifests(stage["name"])), Stats())
        assert stage["rows_in"] == total.rows_in
        assert stage["rows_out"] == total.rows_out
        assert stage["dropped"] == dict(total.dropped)
        assert stage["counts"] == dict(total.counts)
        assert stage["state"] == "done"
    extract = made["stages"][1]
    assert extract["rows_in"] == 2 * 859_006
    assert list(extract["dropped"]) == ["no_alt", "too_short", "boilerplate"]
    assert made["accounting"]["balanced"]
    assert [h["equal"] for h in made["accounting"]["handovers"]] == [True] * 6
    assert made["absent"] == {}


def test_histogram_bins_come_in_the_order_of_their_numbers(fake_build: FakeBuild) -> None:
    fake_build.through("match")
    made, *_ = gather(fake_build.run, STAGES)
    assert list(made["stages"][2]["histograms"]["queries_a_text"]) == ["1", "2", "3", "10"]


@pytest.mark.parametrize("last", [None, *NAMES])
def test_it_can_be_written_at_any_moment(fake_build: FakeBuild, last: str | None) -> None:
    if last:
        fake_build.through(last)
    page = report.write(fake_build.run, STAGES)
    made = json.loads((page.parent / "report.json").read_text())
    reached = NAMES.index(last) + 1 if last else 0
    assert [stage["state"] == "done" for stage in made["stages"]] == [
        position < reached for position in range(len(NAMES))
    ]
    sections = {
        "queries": "queries",
        "downloads": "download",
        "screening": "screen",
        "dataset": "pack",
        "pictures": "pack",
        "training": "train",
        "evaluation": "evaluate",
    }
    for section, stage in sections.items():
        there = NAMES.index(stage) < reached
        assert (made[section] is not None) == there
        assert (section in made["absent"]) != there
    if not there:
        assert "not evaluated yet" in page.read_text()


def test_a_stage_half_done_is_counted_so_far(fake_build: FakeBuild) -> None:
    stats = Stats(10, 7, Counter(no_alt=3))
    fake_build.publish("extract", stats=stats, index=1, planned=4)
    made, *_ = gather(fake_build.run, STAGES)
    extract = made["stages"][0]  # what stands before it is not planned
    assert extract["state"] == "1 of 4 tasks"
    assert (extract["rows_in"], extract["rows_out"], extract["dropped"]) == (10, 7, {"no_alt": 3})
    assert made["accounting"]["handovers"][0]["equal"] is None


def test_rows_lost_between_stages_are_seen(fake_build: FakeBuild) -> None:
    fake_build.through("dedup")
    fake_build.publish("dedup", stats=Stats(40_999, 40_999))
    made, *_ = gather(fake_build.run, STAGES)
    handovers = {(h["from"], h["to"]): h["equal"] for h in made["accounting"]["handovers"]}
    assert handovers["extract", "match"] is True
    fake_build.publish("match", stats=Stats(5, 5), index=1, planned=2)
    made, *_ = gather(fake_build.run, STAGES)
    handovers = {(h["from"], h["to"]): h["equal"] for h in made["accounting"]["handovers"]}
    assert handovers["extract", "match"] is False
    assert "match took in" in report.write(fake_build.run, STAGES).read_text()


def test_downloads_are_counted_from_the_records_of_every_pair(fake_build: FakeBuild) -> None:
    fake_build.through("download")
    downloads = gather(fake_build.run, STAGES)[0]["downloads"]
    assert downloads["total"] == fake_build.selected_count
    assert downloads["outcomes"]["ok"] == fake_build.fetched
    assert sum(downloads["outcomes"].values()) == downloads["total"]
    assert sum(downloads["shorter_side"].values()) == fake_build.fetched
    assert downloads["http_status"]["200"] == fake_build.fetched
    assert downloads["received_bytes"] == 123_456_789


def test_screening_is_told_by_set_list_and_score(fake_build: FakeBuild) -> None:
    fake_build.through("screen")
    screening = gather(fake_build.run, STAGES)[0]["screening"]
    lost = fake_build.fetched - fake_build.kept
    assert screening["kept"] == screening["pictures"] - lost == fake_build.kept
    assert sum(screening["dropped"].values()) == lost
    read = {"pictures": 90, "undecodable": 2, "too_plain": 0}
    unmet = {"pictures": 10, "undecodable": 0, "too_plain": 0, "exact": 0, "near": 0}
    assert screening["evaluation"] == {"imagenet": {**read, "exact": 5, "near": 7}, "cifar": unmet}
    assert screening["lists"] == {"blocked": {"address": 2, "picture": 1}}
    values = screening["scores"]["faces"]["values"]
    assert list(values.items()) == [("0", 90), ("0.03", 9), ("0.2", 7)]


def test_the_dataset_is_described_shard_by_shard(fake_build: FakeBuild) -> None:
    fake_build.through("pack")
    made, *_ = gather(fake_build.run, STAGES)
    dataset = made["dataset"]
    assert made["fingerprint"] == "f00d" * 16
    assert dataset["pairs"] == fake_build.kept
    assert sum(shard["samples"] for shard in dataset["shards"]) == fake_build.kept
    assert [shard["name"] for shard in dataset["shards"]] == ["00000.tar", "00001.tar", "00002.tar"]
    assert dataset["queries_a_pair"] == {"1": fake_build.kept}
    for histogram in ("caption_bytes", "shorter_side"):
        assert sum(dataset[histogram].values()) == fake_build.kept


def test_damaged_inputs_cost_their_section_only(fake_build: FakeBuild) -> None:
    fake_build.through("evaluate")
    folder = fake_build.run.stage_folder("pack")
    (index,) = (folder / "store").glob("*/index.parquet")
    index.write_bytes(b"\0" * index.stat().st_size)
    counts = next((fake_build.run.stage_folder("balance") / "store").glob("*/counts.npy"))
    counts.write_bytes(b"\0" * counts.stat().st_size)
    (fake_build.run.stage_folder("evaluate") / "evaluation.json").write_text("{")
    page = report.write(fake_build.run, STAGES)
    made = json.loads((page.parent / "report.json").read_text())
    assert set(made["absent"]) == {"dataset", "pictures", "queries", "evaluation"}
    assert made["downloads"]["total"] == fake_build.selected_count


def test_another_query_list_is_not_mixed_in(fake_build: FakeBuild) -> None:
    fake_build.through("pack")
    fake_build.queries = 60
    fake_build.run.stage_folder("queries").rename(fake_build.run.folder / "old")
    fake_build.make_queries()
    absent = gather(fake_build.run, STAGES)[0]["absent"]
    assert "another query list" in absent["queries"]


def test_json_is_strict(fake_build: FakeBuild) -> None:
    fake_build.through("evaluate")
    metrics = fake_build.run.stage_folder("train") / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity, "accuracy": 0.5}\n')
    page = report.write(fake_build.run, STAGES)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    made = json.loads((page.parent / "report.json").read_text(), parse_constant=refuse)
    assert made["training"]["curves"] == {"loss": [], "accuracy": [[2, 0.5]]}


def test_strict_leaves_json_values_alone_and_mends_the_rest() -> None:
    assert strict({1: (np.int64(3), np.float32(0.5), math.nan, -math.inf, None, True, "é")}) == {
        "1": [3, 0.5, None, None, None, True, "é"]
    }

"""`dedup` keeps one row a pair whatever the order and partition of its input."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_build import dedup, domains, match, records
from dataset_build.dedup import DedupSettings, first_occurrences, merge
from dataset_build.hashing import identify
from dataset_build.match import MatchSettings
from dataset_build.text import TextSettings, normalise
from pipeline.config import Settings
from pipeline.manifest import Manifest
from pipeline.stage import Run, Stage
from pipeline.stats import Stats

QUERIES = ["red", "red dog"]


def rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with many repeated addresses and pairs, and captions that differ only in case."""
    rng = random.Random(seed)
    result = []
    for _ in range(number):
        url = f"https://e.example/{rng.randrange(number // 6)}.jpg"
        text = rng.choice(["Red dog", "red dog", "red-dog!", "dog", "Dog", "a red cat", "red"])
        (uid,) = identify([url], [normalise(text)])
        result.append(
            {
                "uid": uid,
                "url": url,
                "text": text,
                "page_url": f"https://e.example/{rng.randrange(3)}",
                "source": rng.choice(["alt", "title"]),
                "snapshot": rng.choice(["A", "B"]),
                "file": f"f{rng.randrange(3)}",
                "query_ids": [i for i, q in enumerate(QUERIES) if q in normalise(text)],
            }
        )
    return result


def by_definition(values: list[dict[str, Any]], captions_per_url: int) -> list[dict[str, Any]]:
    pairs: dict[bytes, list[dict[str, Any]]] = {}
    for row in values:
        pairs.setdefault(row["uid"], []).append(row)
    order = ("snapshot", "file", "page_url", "source", "text")
    kept = [
        {**min(same, key=lambda r: [r[n] for n in order]), "occurrences": len(same)}
        for same in pairs.values()
    ]
    urls: dict[str, list[dict[str, Any]]] = {}
    for row in kept:
        urls.setdefault(row["url"], []).append(row)
    result: list[dict[str, Any]] = []
    for same in urls.values():
        same.sort(key=lambda r: (not r["query_ids"], -r["occurrences"], r["uid"]))
        result += same[:captions_per_url]
    return sorted(result, key=lambda r: bytes(r["uid"]))


def table(values: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(values, schema=records.MATCHED)


def found_of(values: list[dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
    """(the rows that stand for the pairs of a snapshot, the same as `records.FOUND`)."""
    first, occurrences = first_occurrences(table(values))
    domain = domains.of_urls(first["url"])
    columns = [first["uid"], domain, first["query_ids"], pa.array(occurrences)]
    return first, pa.table(columns, schema=records.FOUND)


@pytest.mark.parametrize("captions_per_url", [1, 2, 4])
def test_keeps_what_the_definition_says_in_any_order(captions_per_url: int) -> None:
    values = rows(600)
    expected = by_definition(values, captions_per_url)
    for seed in range(3):
        random.Random(seed).shuffle(values)
        names = ["B", "A"] if seed else ["A", "B"]
        by_snapshot = {n: found_of([v for v in values if v["snapshot"] == n]) for n in names}
        stats, raw = Stats(), np.zeros(len(QUERIES), np.uint64)
        parts = [by_snapshot[name][1] for name in names]
        kept = merge(parts, names, captions_per_url, raw, stats)
        assert kept.schema.equals(records.PAIRS)
        texts = {
            (name, row["uid"]): row for name in names for row in by_snapshot[name][0].to_pylist()
        }
        found = [
            {**texts[row["snapshot"], row["uid"]], "occurrences": row["occurrences"]}
            for row in kept.to_pylist()
        ]
        assert found == expected
        assert stats.balanced()
        assert stats.rows_in == 600
        assert stats.dropped["duplicate"] == 600 - len({r["uid"] for r in values})
        assert raw.tolist() == [sum(q in r["query_ids"] for r in values) for q in (0, 1)]
        assert set(kept["domain"].to_pylist()) == {"e.example"}


class Config(Settings):
    text: TextSettings = TextSettings()
    match: MatchSettings = MatchSettings()
    dedup: DedupSettings = DedupSettings()


Built = tuple[list[dict[str, Any]], list[Manifest], Run]


@pytest.fixture
def build(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
) -> Callable[..., Built]:
    """Candidates of each snapshot in some files through `match` and `dedup`; pairs with texts."""

    def go(name: str, values: list[dict[str, Any]], files: int, config: Config) -> Built:
        run = Run(tmp_path / name, config)

        def candidates(folder: Path) -> None:
            for snapshot in sorted({row["snapshot"] for row in values}):
                own = [row for row in values if row["snapshot"] == snapshot]
                for number in range(files):
                    part = table(own[number::files]).select(records.CANDIDATES.names)
                    pq.write_table(part, folder / f"candidates-{snapshot}-{number:05d}.parquet")

        def queries(folder: Path) -> None:
            columns = {"text": QUERIES, "norm": QUERIES}
            pq.write_table(pa.table(columns), folder / "queries.parquet")

        publish_files(run, "extract", candidates)
        publish_files(run, "queries", queries)
        run_stage(run, match.STAGE)
        manifests = run_stage(run, dedup.STAGE)
        run = Run(run.folder, config)
        texts = {
            (row["snapshot"], row["uid"]): row
            for reference in run.find("dedup:texts-*.parquet")
            for row in pq.read_table(run.path(reference)).to_pylist()
        }
        pairs: list[dict[str, Any]] = []
        for reference in run.find("dedup:pairs-*.parquet"):
            part = pq.read_table(run.path(reference))
            assert part.schema.equals(records.PAIRS)
            pairs += part.to_pylist()
        assert [row["uid"] for row in pairs] == sorted(row["uid"] for row in pairs)
        return [{**texts[r["snapshot"], r["uid"]], **r} for r in pairs], manifests, run

    return go


def test_stage_is_free_of_order_and_partition(build: Callable[..., Built]) -> None:
    values = rows(400, seed=1)
    limits = {"captions_per_url": 2}
    one, manifests, run = build(
        "one",
        values,
        1,
        Config(match=MatchSettings(buckets=1, keep_unmatched=True), dedup=DedupSettings(**limits)),
    )
    expected = by_definition(values, 2)
    assert [{name: row[name] for name in expected[0]} for row in one] == expected
    assert sum(m.stats.dropped["captions_per_url"] for m in manifests) > 0
    for files, buckets, step in ((7, 16, 5), (3, 64, 1)):
        random.Random(files).shuffle(values)
        config = Config(
            match=MatchSettings(buckets=buckets, keep_unmatched=True),
            dedup=DedupSettings(**limits, buckets_per_task=step),
        )
        many, manifests, other = build(str(files), values, files, config)
        assert many == one
        merges = -(-buckets // step)
        assert len(manifests) == 3 * merges  # two snapshots, then both
        stats = sum((m.stats for m in manifests), Stats())
        assert (stats.rows_in, stats.rows_out) == (400, len(one))
        raw = [np.load(other.path(r)) for r in other.find("dedup:raw-*.npy")]
        assert sum(raw).tolist() == np.load(run.path("dedup:raw-00000.npy")).tolist()


def test_ranges_that_fit_into_memory_change_no_row(
    build: Callable[..., Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = rows(400, seed=1)
    config = Config(match=MatchSettings(buckets=2, keep_unmatched=True))
    whole, manifests, run = build("whole", values, 3, config)
    held = []

    def watched(matched: pa.Table) -> tuple[pa.Table, npt.NDArray[np.uint32]]:
        held.append(len(matched))
        return first_occurrences(matched)

    monkeypatch.setattr(dedup, "first_occurrences", watched)
    monkeypatch.setattr(dedup, "_RANGE_ROWS", 20)
    parts, limited, other = build("parts", values, 3, config)
    assert parts == whole
    assert max(held) < 60, "addresses with many captions stay whole, but a bucket has some 100 rows"
    assert sum(held) == 400
    total = [sum((m.stats for m in ms), Stats()) for ms in (manifests, limited)]
    assert total[0] == total[1]
    for name in ("raw", "count"):
        arrays = [np.load(r.path(f"dedup:{name}-00000.npy")).tolist() for r in (run, other)]
        assert arrays[0] == arrays[1]
    counts = [sum(q in row["query_ids"] for row in whole) for q in range(len(QUERIES))]
    assert arrays[0] == counts
    for manifest in limited:
        assert all(o.name.endswith((".parquet", ".npy")) for o in manifest.outputs)


def test_a_group_is_a_range_of_uids(build: Callable[..., Built]) -> None:
    config = Config(match=MatchSettings(buckets=8), dedup=DedupSettings(buckets_per_task=3))
    pairs, _, run = build("run", rows(300), 2, config)
    for number, (start, stop) in enumerate(dedup.groups(run)):
        own = pq.read_table(run.path(f"dedup:pairs-{number:05d}.parquet"))["uid"].to_pylist()
        assert {uid[0] >> 5 for uid in own} <= set(range(start, stop))
    uids = [row["uid"] for row in pairs]
    assert dedup.within(run, uids[0], uids[-1]) == [0, 1, 2]
    assert dedup.within(run, b"\0" * 16, b"\x5f" + b"\xff" * 15) == [0]
    assert dedup.within(run, b"\x60" + b"\0" * 15, b"\xff" * 16) == [1, 2]

"""`dedup` keeps one row a pair whatever the order and partition of its input."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_build import dedup, match, records
from dataset_build.dedup import DedupSettings, deduplicate
from dataset_build.hashing import identify
from dataset_build.match import MatchSettings
from dataset_build.text import TextSettings, normalise
from pipeline.config import Settings
from pipeline.manifest import Manifest, Stats
from pipeline.stage import Run, Stage

QUERIES = ["red", "red dog"]


def rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with many repeated addresses and pairs, and captions that differ only in case."""
    rng = random.Random(seed)
    result = []
    for _ in range(number):
        url = f"https://e.example/{rng.randrange(number // 6)}.jpg"
        text = rng.choice(["Red dog", "red dog", "red-dog!", "dog", "Dog", "a red cat", "red"])
        (uid,), address = identify([url], [normalise(text)])
        result.append(
            {
                "uid": uid,
                "url_hash": int(address[0]),
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


def table(values: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(values, schema=records.MATCHED)


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


@pytest.mark.parametrize("captions_per_url", [1, 2, 4])
def test_keeps_what_the_definition_says_in_any_order(captions_per_url: int) -> None:
    values = rows(600)
    expected = by_definition(values, captions_per_url)
    for seed in range(3):
        random.Random(seed).shuffle(values)
        stats = Stats()
        kept = deduplicate(table(values), captions_per_url, stats)
        assert kept.schema.equals(records.PAIRS)
        assert sorted(kept.to_pylist(), key=lambda r: bytes(r["uid"])) == expected
        assert stats.balanced()
        assert stats.rows_in == 600
        assert stats.dropped["duplicate"] == 600 - len({r["uid"] for r in values})


def test_addresses_whose_hashes_collide_are_not_mixed_up() -> None:
    values = [{**row, "url_hash": 7} for row in rows(60)]
    kept = deduplicate(table(values), 1, Stats())
    assert sorted(kept["url"].to_pylist()) == sorted({row["url"] for row in values})


class Config(Settings):
    text: TextSettings = TextSettings()
    match: MatchSettings = MatchSettings()
    dedup: DedupSettings = DedupSettings()


def build(
    folder: Path,
    values: list[dict[str, Any]],
    files: int,
    config: Config,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish: Callable[..., Manifest],
) -> tuple[pa.Table, list[Manifest]]:
    """Candidates in a number of files through `match` and `dedup`; all pairs by uid."""
    run = Run(folder, config)

    def candidates(folder: Path) -> None:
        for number in range(files):
            part = table(values[number::files]).select(records.CANDIDATES.names)
            pq.write_table(part, folder / f"candidates-{number:05d}.parquet")

    def queries(folder: Path) -> None:
        pq.write_table(pa.table({"norm": QUERIES}), folder / "queries.parquet")

    publish(run, "extract", candidates)
    publish(run, "queries", queries)
    run_stage(run, match.STAGE)
    manifests = run_stage(run, dedup.STAGE)
    parts = [pq.read_table(run.path(name)) for name in run.find("dedup:pairs-*.parquet")]
    for part in parts:
        assert part.schema.equals(records.PAIRS)
        assert part["uid"].to_pylist() == sorted(part["uid"].to_pylist())
    return pa.concat_tables(parts).sort_by("uid"), manifests


def test_stage_is_free_of_order_and_partition(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
) -> None:
    values = rows(400, seed=1)
    one, manifests = build(
        tmp_path / "one",
        values,
        1,
        Config(
            match=MatchSettings(buckets=1, keep_unmatched=True),
            dedup=DedupSettings(captions_per_url=2),
        ),
        run_stage,
        publish_files,
    )
    expected = by_definition(values, 2)
    assert one.column("uid").to_pylist() == [row["uid"] for row in expected]
    assert one.column("occurrences").to_pylist() == [row["occurrences"] for row in expected]
    assert [m.stats.dropped["captions_per_url"] for m in manifests] != [0]
    random.Random(5).shuffle(values)
    config = Config(
        match=MatchSettings(buckets=16, keep_unmatched=True),
        dedup=DedupSettings(captions_per_url=2, buckets_per_task=5),
    )
    many, manifests = build(tmp_path / "many", values, 7, config, run_stage, publish_files)
    assert many.equals(one)
    assert len(manifests) == 4
    assert sum(m.stats.rows_out for m in manifests) == one.num_rows

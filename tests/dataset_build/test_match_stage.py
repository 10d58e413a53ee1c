"""The `match` stage: its phases, parts and order, and what makes it run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from pydantic import ValidationError

from dataset_build import match, records, text
from dataset_build.match import MatchSettings
from dataset_build.text import TextSettings, normalise
from pipeline.config import Settings
from pipeline.manifest import Manifest
from pipeline.stage import Run, Stage


class Config(Settings):
    text: TextSettings = TextSettings()
    match: MatchSettings = MatchSettings()


QUERIES = ["red", "dog", "Red dog", "zebra"]
Rows = list[tuple[str, str]]


def publish_inputs(
    run: Run, publish: Callable[..., Manifest], files: dict[str, Rows], row_group: int = 1 << 16
) -> None:
    """Queries, and a file of candidates `candidates-NAME.parquet` for each entry of `files`."""

    def queries(folder: Path) -> None:
        columns = {"text": QUERIES, "norm": [normalise(q) for q in QUERIES]}
        pq.write_table(pa.table(columns), folder / "queries.parquet")

    def candidates(folder: Path) -> None:
        for name, rows in files.items():
            table = pa.Table.from_pylist(
                [
                    {
                        "url": url,
                        "text": text,
                        "page_url": "https://page.example/",
                        "source": "alt",
                        "snapshot": "S",
                        "file": name,
                    }
                    for url, text in rows
                ],
                schema=records.CANDIDATES,
            )
            path = folder / f"candidates-{name}.parquet"
            pq.write_table(table, path, row_group_size=row_group)

    publish(run, "queries", queries)
    publish(run, "extract", candidates)


def published(run: Run, manifests: list[Manifest], buckets: int) -> list[dict[str, object]]:
    """The rows of all parts; each file is in order and divided into buckets."""
    rows = []
    for manifest in manifests:
        (output,) = manifest.outputs
        parquet = pq.ParquetFile(run.path(f"match:{output.name}"))
        assert parquet.schema_arrow.equals(records.MATCHED)
        assert parquet.num_row_groups == buckets
        uids = parquet.read()["uid"].to_pylist()
        assert uids == sorted(uids)
        for bucket in range(buckets):
            for row in parquet.read_row_group(bucket).to_pylist():
                url, norm = row["url"].encode(), normalise(row["text"]).encode()
                assert row["uid"][:8] == xxhash.xxh3_64_digest(url)
                assert row["uid"][8:] == xxhash.xxh3_64_digest(url + b"\0" + norm)
                assert int.from_bytes(row["uid"][:8], "big") * buckets >> 64 == bucket
                rows.append(row)
    return rows


def many(count: int) -> Rows:
    return [
        (f"https://e.example/{i}.jpg", f"A red-dog {i}" if i % 3 else "cat") for i in range(count)
    ]


@pytest.mark.parametrize("buckets", [1, 8])
def test_stage(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
    buckets: int,
) -> None:
    monkeypatch.setattr(match, "_BATCH_ROWS", 16)
    run = Run(tmp_path, Config(match=MatchSettings(buckets=buckets)))
    rows = many(90)
    files = {"A-00000": rows[:60], "A-00001": [], "CC-MAIN-2021-04-00000": rows[60:]}
    publish_inputs(run, publish_files, files)
    matcher, *manifests = run_stage(run, match.STAGE)
    assert matcher.stats.counts == {"queries": 4}
    assert {Path(output.name).parent.name for output in matcher.outputs} == {"matcher"}
    assert [manifest.outputs[0].name for manifest in manifests] == [
        "matched-A-00000-000.parquet",
        "matched-A-00001-000.parquet",
        "matched-CC-MAIN-2021-04-00000-000.parquet",
    ]
    assert [(m.stats.rows_in, m.stats.rows_out) for m in manifests] == [(60, 40), (0, 0), (30, 20)]
    assert manifests[0].stats.dropped == {"unmatched": 20}
    assert manifests[0].stats.counts["matches"] == 120
    assert manifests[0].stats.histograms["queries_per_text"] == {"0": 20, "2": 40}
    found = published(run, manifests, buckets)
    assert all(row["query_ids"] == [0, 1, 2] for row in found)
    pairs = sorted((row["url"], row["text"]) for row in found)
    assert pairs == sorted(row for row in rows if row[1] != "cat")


def test_large_files_are_shared_among_tasks(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
) -> None:
    """The rows do not depend on how many tasks read a file, and only its own parts run again."""
    files = {"S-00000": many(100), "S-00001": many(30)}
    made: dict[int, dict[str, str]] = {}
    for limit, sizes in {
        1000: [100, 30],
        40: [30, 30, 40, 30],  # ten row groups among three tasks
        29: [20, 30, 20, 30, 10, 20],
        1: [10 * (i % 10 == 9) for i in range(100)] + [10 * (i % 10 == 9) for i in range(30)],
    }.items():
        run = Run(tmp_path, Config(match=MatchSettings(buckets=4, rows_per_task=limit)))
        if not made:
            publish_inputs(run, publish_files, files, row_group=10)
        matcher, *manifests = run_stage(run, match.STAGE)
        run = Run(tmp_path, run.config)
        assert [m.stats.rows_in for m in manifests] == sizes
        names = [m.outputs[0].name for m in manifests]
        assert names == sorted(set(names))
        found = sorted((row["uid"], row["file"]) for row in published(run, manifests, 4))
        assert len(found) == 66 + 20
        made[limit] = {m.outputs[0].name: m.fingerprint for m in manifests}
        made[limit]["matcher"] = matcher.fingerprint
    whole = "matched-S-00001-000.parquet"
    assert made[1000][whole] == made[40][whole] != made[29][whole]
    assert len({each["matcher"] for each in made.values()}) == 1


def test_stage_keeps_unmatched_if_asked(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
) -> None:
    run = Run(tmp_path, Config(match=MatchSettings(buckets=2, keep_unmatched=True)))
    publish_inputs(
        run, publish_files, {"S-00000": [("https://e.example/1", "cat"), ("u:2", "a zebra")]}
    )
    _, manifest = run_stage(run, match.STAGE)
    table = pq.read_table(run.path("match:matched-S-00000-000.parquet"))
    assert dict(zip(table["text"].to_pylist(), table["query_ids"].to_pylist(), strict=True)) == {
        "cat": [],
        "a zebra": [3],
    }
    assert manifest.stats.counts["unmatched"] == 1


def test_stage_searches_as_metaclip_if_asked(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
) -> None:
    run = Run(tmp_path, Config(match=MatchSettings(buckets=2, compat="metaclip")))
    captions = ["a Red dog.", "a red-dog", "red, dog"]
    publish_inputs(run, publish_files, {"S-00000": [(f"u:{c}", c) for c in captions]})
    _, *manifests = run_stage(run, match.STAGE)
    found = {row["text"]: row["query_ids"] for row in published(run, manifests, 2)}
    assert found == {"a Red dog.": [1, 2], "red, dog": [0, 1]}


def test_the_rules_of_comparison_are_in_every_fingerprint(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish_inputs(Run(tmp_path, Config()), publish_files, {"S-00000": many(3)})

    def fingerprints(config: Config) -> list[str]:
        return [m.fingerprint for m in run_stage(Run(tmp_path, config), match.STAGE)]

    before = fingerprints(Config())
    assert fingerprints(Config()) == before
    (matcher, _), others = before, fingerprints(Config(match=MatchSettings(keep_unmatched=True)))
    assert others[0] == matcher
    assert others[1] not in before
    assert not {*before} & {*fingerprints(Config(match=MatchSettings(compat="metaclip")))}
    monkeypatch.setattr(text, "NORM_ID", "words-of-tomorrow")
    assert not {*before} & {*fingerprints(Config())}


def test_settings_refuse_buckets_that_are_no_power_of_two() -> None:
    with pytest.raises(ValidationError, match="48 is not a power of two; use 32 or 64"):
        MatchSettings(buckets=48)

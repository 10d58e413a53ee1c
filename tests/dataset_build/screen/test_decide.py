from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset_build import records, screen, uid_range
from dataset_build.screen import ScreenSettings, duplicates
from pipeline.manifest import Manifest
from pipeline.stage import Run
from tests.dataset_build.hand_made import Config, write_groups

QUERIES = 5
Fetched = tuple[int, str, str]  # number, status, what the file holds


def uid_of(number: int) -> bytes:
    """Uids in the order of numbers below 256, over the whole space."""
    return bytes([number]) + hashlib.md5(bytes([number])).digest()[1:]


def queries_of(number: int) -> list[int]:
    return [number % 3, 3]


def write_fetched(folder: Path, rows: list[Fetched], files: int) -> None:
    """A range of uids a file, as the download's tasks leave them."""
    for part in range(files):
        first, last = uid_range.bounds(part, files)
        found = [
            {
                "uid": uid_of(number),
                "url": f"http://a.example/{number}",
                "status": status,
                "sha256": hashlib.sha256(content.encode()).digest(),
            }
            for number, status, content in sorted(rows)
            if first <= uid_of(number) <= last
        ]
        table = pa.Table.from_pylist(found, schema=records.FETCHED)
        pq.write_table(table, folder / f"fetched-{part:05d}-of-{files:05d}.parquet")


def write_balance(run: Run, folder: Path, numbers: list[int]) -> None:
    rows = [{"uid": uid_of(number), "selected_by": queries_of(number)} for number in numbers]
    write_groups(run, folder, "selected", rows, records.SELECTED)
    np.save(folder / "counts.npy", np.full(QUERIES, 100, np.uint64))


Screen = Callable[..., tuple[dict[int, str], Manifest, Run]]


@pytest.fixture
def screened(tmp_path_factory: Any, publish_files: Any, run_stage: Any) -> Screen:
    """Screen rows cut into `files`: reason by number ("" is kept), manifest, run."""

    def go(rows: list[Fetched], files: int = 2, selected: Any = None, **options: Any) -> Any:
        options.setdefault("near_distance", None)  # these files hold no pictures
        config = Config(screen=ScreenSettings(**options))
        run = Run(tmp_path_factory.mktemp("run"), config)
        numbers = selected or [row[0] for row in rows]
        publish_files(run, "balance", lambda folder: write_balance(run, folder, numbers))
        publish_files(run, "download", lambda folder: write_fetched(folder, rows, files))
        (manifest,) = run_stage(run, screen.STAGE)
        run = Run(run.folder, config)
        references = run.find("screen:screened-*")
        assert references == [
            f"screen:screened-{part:05d}-of-{files:05d}.parquet" for part in range(files)
        ]
        tables = [pq.read_table(run.path(reference)) for reference in references]
        survivors = json.loads(run.path("screen:survivors.json").read_text())
        assert survivors == [
            {"file": reference.partition(":")[2], "kept": sum(table["keep"].to_pylist())}
            for reference, table in zip(references, tables, strict=True)
        ]
        found = pa.concat_tables(tables).to_pylist()
        for row in found:
            assert row["keep"] == (row["reason"] == "")
            assert row["selected_by"] == queries_of(row["uid"][0])
        assert [row["uid"] for row in found] == sorted(row["uid"] for row in found)
        assert manifest.stats.rows_in == len(found)
        return {row["uid"][0]: row["reason"] for row in found}, manifest, run

    return go


def test_the_smallest_uid_keeps_the_picture(screened: Screen) -> None:
    rows = [(9, "ok", "cat"), (3, "ok", "cat"), (5, "ok", "dog"), (7, "ok", "cat")]
    verdicts, manifest, _ = screened(rows)
    assert verdicts == {3: "", 5: "", 7: "duplicate_picture", 9: "duplicate_picture"}
    assert manifest.stats.rows_in == 4
    assert manifest.stats.rows_out == 2
    assert manifest.stats.dropped == {"duplicate_picture": 2}


def test_pairs_without_a_picture_are_no_rows(screened: Screen) -> None:
    rows = [(1, "dead_link", ""), (2, "ok", "cat"), (250, "timeout", ""), (5, "ok", "cat")]
    verdicts, manifest, run = screened(rows)
    assert verdicts == {2: "", 5: "duplicate_picture"}
    assert manifest.stats.rows_in == 2
    # By query, what was downloaded: 2 by the queries 2 and 3, as was 5.
    assert np.load(run.path("screen:downloaded.npy")).tolist() == [0, 0, 2, 2, 0]


def test_no_picture_at_all(screened: Screen) -> None:
    verdicts, manifest, run = screened([(1, "dead_link", ""), (200, "timeout", "")], files=3)
    assert (verdicts, manifest.stats.rows_out) == ({}, 0)
    assert not np.load(run.path("screen:downloaded.npy")).any()


@pytest.mark.parametrize("selected", [[1], [1, 3], [1, 200]])
def test_what_was_fetched_must_be_what_was_selected(screened: Screen, selected: list[int]) -> None:
    with pytest.raises(AssertionError, match="not the selected pairs"):
        screened([(1, "ok", "cat"), (2, "ok", "dog")], selected=selected)


def test_a_placeholder_is_dropped_altogether(screened: Screen) -> None:
    rows = [(i, "ok", "not available") for i in range(1, 12)] + [(50, "ok", "cat")]
    verdicts, manifest, _ = screened(rows, placeholder_pairs=10)
    assert {uid for uid, reason in verdicts.items() if not reason} == {50}
    assert manifest.stats.dropped == {"placeholder": 11}
    verdicts, _, _ = screened(rows, placeholder_pairs=11)
    assert {uid for uid, reason in verdicts.items() if not reason} == {1, 50}


def test_an_address_with_many_captions_is_no_placeholder() -> None:
    """Ten captions of one address, and of three; all have the same file in each half."""
    first_of_address = np.zeros(20, np.bool_)
    first_of_address[[0, 10, 13, 15]] = True
    halves = np.repeat(np.array([1, 2], np.uint64), 10)
    with pytest.MonkeyPatch.context() as patch:
        found = halves, halves, np.arange(20)
        patch.setattr(duplicates, "digests", lambda *about: found)
        files = duplicates.Files(20)
        files.read([], np.ones(20, np.bool_), first_of_address, 2, lambda: None)
    assert files.placeholder.tolist() == [False] * 10 + [True] * 10


def test_both_rules_can_be_left_out(screened: Screen) -> None:
    rows = [(i, "ok", "same") for i in range(1, 12)]
    verdicts, _, _ = screened(rows, placeholder_pairs=2, drop_placeholders=False)
    assert [uid for uid, reason in verdicts.items() if not reason] == [1]
    verdicts, _, _ = screened(rows, pairs_per_picture=None)
    assert set(verdicts.values()) == {""}


@pytest.mark.parametrize("number", [1, 2, 3, 7, None])
def test_the_first_pairs_keep_the_picture(screened: Screen, number: int | None) -> None:
    cats, dogs = [3, 90, 91, 150, 201, 240], [2, 89]
    rows = [(i, "ok", "cat") for i in reversed(cats)] + [(i, "ok", "dog") for i in dogs]
    verdicts, manifest, _ = screened([*rows, (1, "timeout", "cat")], pairs_per_picture=number)
    kept = sorted([*cats[:number], *dogs[:number]])
    assert sorted(uid for uid, reason in verdicts.items() if not reason) == kept
    dropped = len(rows) - len(kept)
    assert +manifest.stats.dropped == ({"duplicate_picture": dropped} if dropped else {})
    assert manifest.stats.rows_out == len(kept)


@pytest.mark.parametrize("number", [2, None])
def test_a_placeholder_is_one_however_many_pairs_may_share_a_picture(
    screened: Screen, number: int | None
) -> None:
    rows = [(i, "ok", "not available") for i in range(1, 5)] + [(50, "ok", "cat")]
    verdicts, manifest, _ = screened(rows, pairs_per_picture=number, placeholder_pairs=3)
    assert {uid for uid, reason in verdicts.items() if not reason} == {50}
    assert manifest.stats.dropped == {"placeholder": 4}


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.integers(0, 255),
        st.tuples(st.sampled_from(["ok", "ok", "dns"]), st.sampled_from("abcdef")),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([1, 2, None]),
)
def test_the_verdict_depends_on_nothing_but_the_pairs(
    screened: Screen,
    pairs: dict[int, tuple[str, str]],
    files: int,
    passes: int,
    number: int | None,
) -> None:
    rows = [(uid, status, content) for uid, (status, content) in pairs.items()]
    expected: dict[int, str] = {}
    seen: Counter[str] = Counter()
    for uid, status, content in sorted(rows):
        if status == "ok":
            repeated = number is not None and seen[content] >= number
            expected[uid] = "duplicate_picture" if repeated else ""
            seen[content] += 1
    own = duplicates.ROWS_AT_ONCE
    try:
        duplicates.ROWS_AT_ONCE = -(-len(rows) // passes)
        assert screened(rows, files, pairs_per_picture=number)[0] == expected
    finally:
        duplicates.ROWS_AT_ONCE = own

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import create_model

from dataset_build import records, screen
from dataset_build.screen import ScreenSettings
from pipeline.config import Settings
from pipeline.manifest import Manifest
from pipeline.stage import Run

Fetched = tuple[int, str, str]  # uid, status, what the file holds


def run_of(folder: Path, **options: Any) -> Run:
    model = create_model("Sections", __base__=Settings, screen=(ScreenSettings, ...))
    return Run(folder, model(screen=ScreenSettings(**options)))


def fetched(folder: Path, rows: list[Fetched], files: int) -> None:
    """Rows by uid in `files` files, as the download's tasks leave them."""
    rows = sorted(rows)
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        table = pa.Table.from_pylist(
            [
                {
                    "uid": rows[i][0].to_bytes(16, "big"),
                    "status": rows[i][1],
                    "sha256": hashlib.sha256(rows[i][2].encode()).digest(),
                    "staged": f"staged-{number:05d}.tar" if rows[i][1] == "ok" else "",
                }
                for i in part
            ],
            schema=records.FETCHED,
        )
        pq.write_table(table, folder / f"fetched-{number:05d}.parquet")


Screen = Callable[..., tuple[dict[int, str], Manifest, Run]]


@pytest.fixture
def screened(tmp_path_factory: Any, publish_files: Any, run_stage: Any) -> Screen:
    """Screen rows cut into `files`: reason by uid ("" is kept), manifest, run."""

    def go(rows: list[Fetched], files: int = 2, **options: Any) -> Any:
        run = run_of(tmp_path_factory.mktemp("run"), **options)
        publish_files(run, "download", lambda folder: fetched(folder, rows, files))
        (manifest,) = run_stage(run, screen.STAGE)
        tables = [pq.read_table(run.path(r)) for r in run.find("screen:screened-*")]
        found = pa.concat_tables(tables).to_pylist()
        for row in found:
            assert row["keep"] == (row["reason"] == "")
        return {int.from_bytes(row["uid"], "big"): row["reason"] for row in found}, manifest, run

    return go


def test_the_smallest_uid_keeps_the_picture(screened: Screen) -> None:
    rows = [(9, "ok", "cat"), (3, "ok", "cat"), (5, "ok", "dog"), (7, "ok", "cat")]
    verdicts, manifest, _ = screened(rows)
    assert verdicts == {3: "", 5: "", 7: "duplicate_picture", 9: "duplicate_picture"}
    assert manifest.stats.rows_in == 4
    assert manifest.stats.rows_out == 2
    assert manifest.stats.dropped == {"duplicate_picture": 2}


def test_pairs_without_a_picture_are_no_rows(screened: Screen) -> None:
    verdicts, manifest, _ = screened([(1, "dead_link", ""), (2, "ok", "cat"), (3, "timeout", "")])
    assert verdicts == {2: ""}
    assert manifest.stats.rows_in == 1


def test_a_placeholder_is_dropped_altogether(screened: Screen) -> None:
    rows = [(i, "ok", "not available") for i in range(1, 12)] + [(50, "ok", "cat")]
    verdicts, manifest, _ = screened(rows, placeholder_pairs=10)
    assert {uid for uid, reason in verdicts.items() if not reason} == {50}
    assert manifest.stats.dropped == {"placeholder": 11}
    verdicts, _, _ = screened(rows, placeholder_pairs=11)
    assert {uid for uid, reason in verdicts.items() if not reason} == {1, 50}


def test_both_rules_can_be_left_out(screened: Screen) -> None:
    rows = [(i, "ok", "same") for i in range(1, 12)]
    verdicts, _, _ = screened(rows, placeholder_pairs=2, drop_placeholders=False)
    assert [uid for uid, reason in verdicts.items() if not reason] == [1]
    verdicts, _, _ = screened(rows, drop_duplicate_pictures=False)
    assert set(verdicts.values()) == {""}


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.integers(1, (1 << 128) - 1),
        st.tuples(st.sampled_from(["ok", "ok", "dns"]), st.sampled_from("abcdef")),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 6),
    st.integers(1, 5),
)
def test_the_verdict_depends_on_nothing_but_the_pairs(
    screened: Screen, pairs: dict[int, tuple[str, str]], files: int, passes: int
) -> None:
    rows = [(uid, status, content) for uid, (status, content) in pairs.items()]
    expected: dict[int, str] = {}
    seen: set[str] = set()
    for uid, status, content in sorted(rows):
        if status == "ok":
            expected[uid] = "duplicate_picture" if content in seen else ""
            seen.add(content)
    own = screen._ROWS_AT_ONCE
    try:
        screen._ROWS_AT_ONCE = -(-len(rows) // passes)
        assert screened(rows, files)[0] == expected
    finally:
        screen._ROWS_AT_ONCE = own

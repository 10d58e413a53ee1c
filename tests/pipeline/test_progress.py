"""What a running task says of itself reaches whoever watches the run."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from pipeline.manifest import Manifest
from pipeline.progress import LineProgress
from pipeline.stage import Stage
from pipeline.stats import Stats
from tests.pipeline.conftest import Watched

STAGE = Stage("train", (), lambda run: [], lambda attempt: Stats(), unit="samples")


def _said(watched: Watched, caplog: pytest.LogCaptureFixture) -> list[str]:
    watch = LineProgress(watched.run, every_s=0)
    watch.begin(STAGE, 1, 0)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        watch.tick(STAGE, None)
    return caplog.messages


def test_a_line_says_how_far_how_fast_and_how_it_goes(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = watched.attempt()
    watched.after(0, attempt, 0, 1200, "loss 5.000")
    watched.after(30, attempt, 300, 1200, "loss 2.310")
    assert _said(watched, caplog) == ["train: 300 of 1,200 samples, 10/s, 1m30s left, loss 2.310"]


def test_what_was_done_before_a_stop_does_not_count_as_fast(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = watched.attempt()
    attempt.progress(0)  # rows, of which no more comes: the runner's beginning
    watched.after(60, attempt, 600, 1200)
    watched.after(10, attempt, 650, 1200)
    assert _said(watched, caplog) == ["train: 650 of 1,200 samples, 5/s, 1m50s left"]


def test_going_back_is_no_negative_rate(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    attempt = watched.attempt()
    watched.after(0, attempt, 500, 1200)
    watched.after(10, attempt, 400, 1200)
    watched.after(10, attempt, 480, 1200)
    assert _said(watched, caplog) == ["train: 480 of 1,200 samples, 8/s, 1m30s left"]


def test_where_nothing_runs_nothing_is_said(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    assert _said(watched, caplog) == []


def test_a_change_of_unit_is_said_at_once(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = watched.attempt()
    attempt.progress(8, 8, "shards")
    watched.after(0, attempt, 0, 1200, "first step")
    watched.after(0, attempt, 8, 1200, "of no news yet")
    assert _said(watched, caplog) == ["train: 0 of 1,200 samples, first step"]


def test_a_phase_says_what_is_left_to_do(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watch = LineProgress(watched.run)
    with caplog.at_level(logging.INFO):
        watch.begin(STAGE, 1, 0)
        watch.begin(STAGE, 6, 1)
        watch.begin(STAGE, 6, 6)
    assert caplog.messages == ["train: 1 task", "train: 5 tasks (1 of 6 done)"]


@pytest.mark.parametrize(
    ("dropped", "said"),
    [
        ({}, ""),
        ({"a": 4, "b": 3, "c": 2, "d": 1}, " (dropped: 4 a, 3 b, 2 c, 1 d)"),
        (
            {"a": 2000, "b": 30, "c": 20, "d": 10, "e": 6, "f": 5},
            " (dropped: 2,000 a, 30 b, 20 c, 10 d, and 2 more: 11 rows)",
        ),
    ],
)
def test_the_closing_line_accounts_for_every_row(
    watched: Watched, caplog: pytest.LogCaptureFixture, dropped: dict[str, int], said: str
) -> None:
    rows_in = 7 + sum(dropped.values())
    stats = Stats(rows_in=rows_in, rows_out=7, dropped=Counter(dropped))
    made = Manifest("train", 0, "f" * 64, "a", (), stats, 1.0, 1.0, 0.0, "", "", 1)
    with caplog.at_level(logging.INFO):
        LineProgress(watched.run).end(STAGE, [made], ran=1)
    assert caplog.messages == [f"train: {rows_in:,} in, 7 samples out{said}"]


def test_inputs_that_are_not_as_they_should_be_are_named_at_the_end(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    made = []
    for number in range(8):
        stats = Stats(warnings={f"{number}.warc.gz": "cut off"})
        made.append(Manifest("train", number, "f" * 64, "a", (), stats, 1.0, 1.0, 0.0, "", "", 1))
    with caplog.at_level(logging.WARNING):
        LineProgress(watched.run).end(STAGE, made, ran=0)
        assert not caplog.messages  # said when they were read
        LineProgress(watched.run).end(STAGE, made, ran=1)
    *named, rest = caplog.messages
    assert named == [f"{number}.warc.gz: cut off" for number in range(5)]
    assert rest == "and 3 more inputs; the report names them"

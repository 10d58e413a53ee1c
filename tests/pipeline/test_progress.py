"""What a running task says of itself reaches whoever watches the run."""

from __future__ import annotations

import logging

import pytest

from pipeline.manifest import Stats
from pipeline.progress import LineProgress
from pipeline.stage import Stage
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

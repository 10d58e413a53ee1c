"""What a running task says of itself reaches whoever watches the run."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline import status
from pipeline.config import Settings
from pipeline.manifest import Stats
from pipeline.progress import LineProgress
from pipeline.stage import Attempt, Planned, Run, Stage, Task
from pipeline.stop import StopFlag

STAGE = Stage("train", (), lambda run: [], lambda attempt: Stats(), unit="samples seen")


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    """A running task of a run with one stage."""
    run = Run(tmp_path, Settings())
    run.stage_folder("train").mkdir()
    run.save_plan("train", [Planned(Task("train", 0), "f" * 64)])
    live = run.stage_folder("train") / "live" / "00000.json"
    live.parent.mkdir()
    return Attempt(run, Task("train", 0), tmp_path, StopFlag(), live)


def test_a_note_is_in_the_line_and_in_the_status(
    attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    watch = LineProgress(attempt.run, every_s=0)
    watch.begin(STAGE, 1, 0)
    attempt.progress(300, 1200, "samples", "loss 2.310, 410 samples/s")
    with caplog.at_level(logging.INFO):
        watch.tick(STAGE, None)
    assert "300 samples in hand, loss 2.310, 410 samples/s" in caplog.text
    now = status.read_stage(attempt.run, "train", "samples seen")
    assert status._now(now) == "task 0: 300 of 1,200 samples, loss 2.310, 410 samples/s"
    assert now.fraction == 0.25


def test_without_a_note_nothing_is_said(attempt: Attempt, caplog: pytest.LogCaptureFixture) -> None:
    watch = LineProgress(attempt.run, every_s=0)
    watch.begin(STAGE, 1, 0)
    attempt.progress(300, 1200, "samples")
    with caplog.at_level(logging.INFO):
        watch.tick(STAGE, None)
    assert caplog.messages[-1] == "train: 0/1 tasks, 300 samples in hand"

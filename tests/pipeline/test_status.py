"""What a run folder says of itself, in a table that a terminal can show."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from pipeline import manifest, status
from pipeline.config import Settings
from pipeline.stage import Planned, Run, Task
from pipeline.stats import Stats
from pipeline.status import StageStatus
from tests.pipeline.conftest import Watched


def _read(watched: Watched) -> StageStatus:
    return status.read_stage(watched.run, "train", "samples")


def _train_folder(watched: Watched, *steps: str) -> Path:
    folder = watched.run.stage_folder("train")
    for step in steps:
        (folder / "checkpoints" / step).mkdir(parents=True)
    return folder


def test_training_that_stopped_says_where_it_goes_on(watched: Watched) -> None:
    folder = _train_folder(watched, "step-0000000080", "step-0000000085", ".step-0000000090.x")
    described = {"seen": 64_000, "settings": {"batch": 64}}
    (folder / "training.json").write_text(json.dumps(described))
    stopped = _read(watched)
    assert stopped.word == "stopped"
    assert stopped.now() == "saved at sample 5,440 of 64,000 (step 85 of 1,000)"


def test_training_that_failed_says_both(watched: Watched) -> None:
    folder = _train_folder(watched, "step-0000000085")
    (folder / "failed").mkdir()
    (folder / "failed" / "00000.json").write_text('{"reason": "out of memory", "log": "a.log"}')
    failed = _read(watched)
    assert (failed.word, failed.now()) == ("failed", "1 failed, saved at step 85")


def test_what_is_done_or_runs_is_not_stopped(watched: Watched) -> None:
    folder = _train_folder(watched, "step-0000000085")
    watched.after(0, watched.attempt(), 90, 100)
    assert (_read(watched).word, _read(watched).now()) == ("running", "90 of 100 samples")
    private = folder / "store" / "a"
    private.mkdir(parents=True)
    fingerprint = watched.run.plan("train")[0].fingerprint
    about = {"index": 0, "fingerprint": fingerprint, "seconds": 1.0, "attempt": 1}
    manifest.publish(folder, private, stats=Stats(), **about)  # type: ignore[arg-type]
    assert (_read(watched).word, _read(watched).now()) == ("partly done", "more to come")
    (folder / "complete.json").write_text(json.dumps([fingerprint]))
    assert (_read(watched).word, _read(watched).now()) == ("done", "")


def test_before_a_task_counts_anything_it_is_starting(watched: Watched) -> None:
    watched.attempt().progress(0)
    assert _read(watched).now() == "starting"


def test_tasks_of_jobs_that_have_begun_are_starting_and_not_queued() -> None:
    stage = StageStatus("match", "pairs", 4, 1, queued=1, starting=2)
    assert (stage.word, stage.now()) == ("starting", "2 starting, 1 queued")


def test_the_time_left_is_that_of_tasks_side_by_side(watched: Watched) -> None:
    watched.plan(6)
    attempts = [watched.attempt(0), watched.attempt(1)]
    for attempt in attempts:
        watched.after(0, attempt, 0, 100)
    for seconds, attempt in zip((50, 0), attempts, strict=True):
        watched.after(seconds, attempt, 50, 100)
    now = _read(watched)
    assert now.rate == 2  # each does one a second
    assert now.seconds_left == 250  # five tasks of 100 s, two at a time
    assert now.now() == "2 tasks: 100 of 200 samples, 2/s, 4m10s left"


def test_stages_that_a_run_does_without_are_not_waited_for(tmp_path: Path) -> None:
    run = Run(tmp_path, Settings())
    rows = [{"name": name, "unit": "rows"} for name in ("queries", "pack", "train", "evaluate")]
    (tmp_path / "stages.json").write_text(json.dumps(rows))
    assert [stage.name for stage in status.read(tmp_path)] == [row["name"] for row in rows]
    (tmp_path / "train").mkdir()
    run.save_plan("train", [Planned(Task("train", 0), "f" * 64)])
    assert [stage.name for stage in status.read(tmp_path)] == ["train", "evaluate"]


def test_who_reads_no_further_than_it_wants_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(json.dumps([{"name": "pack", "unit": "pairs"}]))
    command = [sys.executable, "-m", "pipeline", "status", str(tmp_path)]
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_every_stage_is_one_line_of_140_columns(watched: Watched) -> None:
    """As where the output goes into a file, with the numbers of a long run."""
    done = Stats(rows_in=12_800_000_000, rows_out=12_800_000_000)
    built = StageStatus("sample_web", "candidates", 10_000, 10_000, stats=done, seconds=9_999_999)
    attempt = watched.attempt()
    watched.after(0, attempt, 1_234_567_000, 12_800_000_000)
    watched.after(1e5, attempt, 9_876_543_210, 12_800_000_000, "loss 12.345")
    text = io.StringIO()
    Console(file=text, width=140).print(status.table([built, _read(watched)]))
    lines = text.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[2].rstrip().endswith("9.9G of 12.8G samples, 86.4k/s, 9h23m left, loss 12.345")

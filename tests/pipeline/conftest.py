"""The toy recipe, run by the real executor; and tasks that only say how far they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import runner, stage
from pipeline.config import Settings
from pipeline.local import LocalExecutor, LocalSettings
from pipeline.runner import Advance
from pipeline.stage import Attempt, Planned, Run, Task
from pipeline.stop import StopFlag
from tests.pipeline import toy


@pytest.fixture
def advance(tmp_path: Path) -> Callable[..., tuple[Run, Advance]]:
    """Advance a toy run in processes; keyword arguments are the two sections and local settings."""

    def call(
        numbers: dict[str, object] | None = None,
        total: dict[str, object] | None = None,
        stop: StopFlag | None = None,
        watch: toy.Recorder | None = None,
        max_failed_tasks: float = 0.0,
        **local: object,
    ) -> tuple[Run, Advance]:
        config = toy.Toy.model_validate({"numbers": numbers or {}, "total": total or {}})
        run = Run(tmp_path / "run", config)
        settings = LocalSettings.model_validate({"workers": 2, **local})
        stop = StopFlag() if stop is None else stop
        command = (sys.executable, "-m", "tests.pipeline.toy")
        executor = LocalExecutor(settings, stop, command)
        watch = watch or toy.Recorder()
        return run, runner.advance(run, toy.STAGES, executor, stop, watch, max_failed_tasks)

    return call


class Watched:
    """A run in which tasks of the stage `train` are at work, under a clock of its own."""

    def __init__(self, folder: Path) -> None:
        self.run = Run(folder, Settings())
        self.seconds = 1_700_000_000.0
        (self.run.stage_folder("train") / "live").mkdir(parents=True)
        self.plan(1)

    def plan(self, tasks: int) -> None:
        """Plan so many tasks."""
        planned = [Planned(Task("train", i), f"{i:064x}") for i in range(tasks)]
        self.run.save_plan("train", planned)

    def attempt(self, index: int = 0) -> Attempt:
        """One that begins now."""
        live = self.run.stage_folder("train") / "live" / f"{index:05d}.json"
        return Attempt(self.run, Task("train", index), live.parent, StopFlag(), live)

    def after(
        self, seconds: float, attempt: Attempt, done: int, total: int, note: str = ""
    ) -> None:
        """Let an attempt say, so much later, how far it is."""
        self.seconds += seconds
        attempt.progress(done, total, "samples", note)

    def time(self) -> float:
        """In place of the module `time`."""
        return self.seconds

    monotonic = time


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A run with one planned task, at which nobody works yet."""
    made = Watched(tmp_path)
    monkeypatch.setattr(stage, "time", made)
    return made

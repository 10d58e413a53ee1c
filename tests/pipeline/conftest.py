"""The toy recipe, run by the real executor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.local import LocalExecutor, LocalSettings
from pipeline.runner import Advance
from pipeline.stage import Run
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

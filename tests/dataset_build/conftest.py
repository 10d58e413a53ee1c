"""Running one stage inside a test, without the runner: every phase, every task, in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import files
from pipeline.manifest import Manifest, publish
from pipeline.stage import Attempt, Planned, Run, Stage
from pipeline.stop import StopFlag
from tests.dataset_build.inline import InlineExecutor

RunStage = Callable[[Run, Stage], list[Manifest]]


def run_tasks(run: Run, stage: Stage) -> list[Manifest]:
    """Plan, work and publish all phases of `stage` inline; manifests in task order.

    What the stage reads must be below `run.folder` already: published by `run_tasks` of the stages
    before it, or files that its settings name.
    """
    planned: list[Planned] = []
    manifests: list[Manifest] = []
    folder = run.stage_folder(stage.name)
    for phase in range(1 + len(stage.then)):
        added = stage.planned(Run(run.folder, run.config), phase, len(planned))
        planned += added
        run.save_plan(stage.name, planned)
        for task in added:
            private = folder / "store" / files.attempt_name()
            private.mkdir(parents=True)
            start = time.monotonic()
            # As in a process of its own: a Run remembers what it found published.
            own = Run(run.folder, run.config)
            stats = stage.work(Attempt(own, task.task, private, StopFlag()))
            manifest = publish(
                folder,
                private,
                index=task.task.index,
                fingerprint=task.fingerprint,
                stats=stats,
                seconds=time.monotonic() - start,
                attempt=0,
            )
            manifests.append(manifest)
    return manifests


@pytest.fixture
def run_stage() -> RunStage:
    """`run_stage(run, stage)`: see `run_tasks`."""
    return run_tasks


@pytest.fixture
def publish_files() -> Callable[[Run, str, Callable[[Path], None]], Manifest]:
    """`publish_files(run, stage, write)`: publish what `write(folder)` makes as a stage's output.

    For tests of a stage that start from hand-made outputs of the stage before it.
    """

    def publish_as(run: Run, stage: str, write: Callable[[Path], None]) -> Manifest:
        from pipeline.stage import Task

        def work(attempt: Attempt) -> Stats:
            write(attempt.folder)
            return Stats()

        return run_tasks(run, Stage(stage, (), lambda run: [Task(stage, 0)], work))[0]

    from pipeline.stats import Stats

    return publish_as


@pytest.fixture
def inline() -> InlineExecutor:
    """Advances runs in this process; `.ran` lists the tasks."""
    return InlineExecutor()

"""Stages of a run, published as the runner publishes them."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline import manifest, runner
from pipeline.manifest import Manifest
from pipeline.stage import Planned, Run, Stage, Task
from pipeline.stats import Stats
from pipeline.stop import StopFlag


def publish_pack(run: Run, packed: Path) -> None:
    """Publish a packed folder as what the stage `pack` made."""
    stored = run.stage_folder("pack") / "store" / "one"
    shutil.copytree(packed, stored)
    run.save_plan("pack", [Planned(Task("pack", 0), "f" * 64)])
    manifest.publish(
        run.stage_folder("pack"),
        stored,
        index=0,
        fingerprint="f" * 64,
        stats=Stats(),
        seconds=0.0,
        attempt=1,
    )


def work(run: Run, stage: Stage) -> Manifest:
    """Plan a stage of one task and do it, in this process."""
    (planned,) = stage.planned(run, 0, 0)
    run.save_plan(stage.name, [planned])
    return runner.work_on(run, stage, planned, 1, StopFlag())

"""`plan` against what happened: small sample webs give rates, a larger one is planned and built.

A line a stage. `ours` is what was planned, `peer` what was measured, in wall seconds of the stage;
`busy_planned` and `busy` are the tasks' own seconds without the start of their processes.
`OPENWIT_PLAN=2000,4000,8400` sets the pictures of the webs, the one that is planned last.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_build.forecast import pilot
from dataset_build.forecast.sizes import Asked
from dataset_build.forecast.workload import Workload
from pipeline import plan, rates, recipe, runner
from pipeline.config import load
from pipeline.local import LocalExecutor
from pipeline.stage import Run, Stage
from pipeline.stop import StopFlag

CONFIG = Path(__file__).parents[1] / "configs" / "sample.yaml"
CORES = 2


def measure() -> Iterator[dict[str, Any]]:
    """Build, plan, build, compare."""
    pictures = [int(n) for n in os.environ.get("OPENWIT_PLAN", "2000,4000,8400").split(",")]
    with tempfile.TemporaryDirectory(prefix="openwit-plan-") as folder:
        pilots = []
        for count in pictures[:-1]:
            run, stages = _run(Path(folder, str(count)), count)
            _advance(run, stages)
            pilots.append(run)
        run, stages = _run(Path(folder, "planned"), pictures[-1])
        _advance(run, stages[:1])  # the web, which is what is planned from
        planned = planned_costs(run, pilots)
        began = time.time()
        _advance(run, stages[1:])
        for line in compared(run, planned, began):
            yield {"name": "plan", "pictures": pictures, "cores": CORES, **line}


def planned_costs(run: Run, pilots: list[Run]) -> list[plan.Cost]:
    """The stages' costs by the rates of finished runs."""
    known = rates.shipped()
    measured = rates.Rates()
    for one in pilots:
        measured.figures |= pilot.figures(one, "pilot")
    seen = [task for one in pilots for task in pilot.observations(one)]
    measured.kinds = rates.fit(seen, known.kinds, "pilot")
    ledger = plan.Ledger(measured.over(known))
    build = Workload(run, Asked(), ledger, pilots)
    return [plan.cost(work, ledger, CORES) for work in build.stages()]


def compared(run: Run, planned: list[plan.Cost], began: float) -> Iterator[dict[str, Any]]:
    """Planned and measured, stage by stage; `began`: Unix time at which the first one did."""
    ended = began
    for cost in planned:
        done = run.manifests(cost.stage)
        began, ended = ended, max(manifest.finished for manifest in done)
        rows = pilot.total(done).rows_out
        wall, busy = ended - began, sum(manifest.seconds for manifest in done)
        yield {
            "stage": cost.stage,
            "ours": round(cost.wall_s, 2),
            "peer": round(wall, 2),
            "ratio": round(cost.wall_s / wall, 3),
            "unit": "s",
            "busy_planned": round(cost.busy_s, 2),
            "busy": round(busy, 2),
            "rows_out_planned": round(cost.rows_out),
            "rows_out": rows,
            "kept_bytes_planned": round(cost.kept_bytes),
            "kept_bytes": sum(output.bytes for one in done for output in one.outputs),
        }


def _run(folder: Path, pictures: int) -> tuple[Run, list[Stage]]:
    config = load(recipe.Config, CONFIG, [f"sample_web.pairs={pictures}", f"local.workers={CORES}"])
    return Run(folder, config), list(recipe.build_stages(config))


def _advance(run: Run, stages: list[Stage]) -> None:
    stop = StopFlag()
    executor = LocalExecutor(run.settings("local"), stop)
    runner.advance(run, stages, executor, stop, runner.Unwatched())

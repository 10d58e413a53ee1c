"""A recipe of two small stages whose tasks misbehave on demand; also the command that runs one.

`numbers` writes one file a task, `total` has a task per number and then one that adds them up.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline import config, runner
from pipeline.config import MissingInput, Settings
from pipeline.executor import Outcome
from pipeline.local import die_with_parent
from pipeline.manifest import Manifest
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats
from pipeline.stop import EXIT_STOPPED, StopFlag, Stopped


class NumbersSettings(Settings):
    """How many numbers, from where, and which fault to show."""

    count: int = 3
    first: int = 1
    fault: str = ""
    times: int = 1
    """How often the fault shows."""
    only: int | None = None
    """The one task that shows it; None: all."""

    operational = frozenset({"fault", "times", "only"})


class TotalSettings(Settings):
    """What the numbers are multiplied by."""

    factor: int = 1


class Toy(Settings):
    """The configuration."""

    numbers: NumbersSettings = NumbersSettings()
    total: TotalSettings = TotalSettings()


def _plan_numbers(run: Run) -> list[Task]:
    settings = run.settings("numbers")
    return [Task("numbers", i, params={"n": settings.first + i}) for i in range(settings.count)]


def _make_number(attempt: Attempt) -> Stats:
    settings = attempt.settings
    tally = attempt.run.folder / f"tally-{attempt.task.index}"
    tries = len(tally.read_text()) if tally.exists() else 0
    tally.write_text("x" * (tries + 1))
    n = attempt.task.params["n"]
    (attempt.folder / f"n-{attempt.task.index:05d}.json").write_text(json.dumps(n))
    if tries < settings.times and settings.only in (None, attempt.task.index):
        _misbehave(settings.fault, attempt)
    return Stats(rows_in=2, rows_out=1, dropped=Counter(odd=1))


def _misbehave(fault: str, attempt: Attempt) -> None:
    if fault == "raise":
        raise ValueError("the fault that was asked for")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "missing":
        raise MissingInput("somewhere: not there")
    if fault == "hang":
        time.sleep(60)
    if fault == "memory":
        hog = bytearray(300 << 20)
        time.sleep(60 + len(hog) * 0)
    if fault == "wait":
        for step in range(600):
            attempt.progress(step, 600, "steps")
            attempt.stop.check()
            time.sleep(0.1)


def _plan_copies(run: Run) -> list[Task]:
    return [Task("total", i, (ref,)) for i, ref in enumerate(run.find("numbers:n-*.json"))]


def _plan_sum(run: Run) -> list[Task]:
    copies = run.find("total:copy-*.json")
    return [Task("total", len(copies), tuple(copies), {"sum": True})]


def _add(attempt: Attempt) -> Stats:
    values = [json.loads(path.read_text()) for path in attempt.inputs()]
    if not attempt.task.params:
        factor = attempt.settings.factor
        path = attempt.folder / f"copy-{attempt.task.index:05d}.json"
        path.write_text(json.dumps(values[0] * factor))
        return Stats(rows_in=1, rows_out=1)
    (attempt.folder / "sum.json").write_text(json.dumps(sum(values)))
    return Stats()


NUMBERS = Stage("numbers", (), _plan_numbers, _make_number, unit="numbers", can_lose_tasks=True)
TOTAL = Stage("total", ("numbers",), _plan_copies, _add, then=(_plan_sum,))
STAGES = (NUMBERS, TOTAL)


class Recorder:
    """A watch that remembers what it saw."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.ended: list[tuple[str, int]] = []

    def begin(self, stage: Stage, total: int, done: int) -> None: ...

    def tick(self, stage: Stage, outcome: Outcome | None) -> None:
        if outcome:
            self.outcomes.append(outcome)

    def end(self, stage: Stage, manifests: Sequence[Manifest], ran: int) -> None:
        self.ended.append((stage.name, ran))


def main(folder: str, stage: str, index: str, fingerprint: str, attempt: str) -> int:
    die_with_parent()
    stop = StopFlag().install()
    run = Run(Path(folder), config.load(Toy, Path(folder) / "config.yaml"))
    planned = run.plan(stage)[int(index)]
    assert planned.fingerprint == fingerprint
    try:
        runner.work_on(run, {s.name: s for s in STAGES}[stage], planned, int(attempt), stop)
    except Stopped:
        return EXIT_STOPPED
    except MissingInput as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

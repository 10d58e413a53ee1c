"""A recipe of two tiny stages, as a command line of its own: what jobs of these tests run.

`numbers` writes one file a task and misbehaves where it is told to, `total` adds them up.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from pipeline import config, last_command, log, runner
from pipeline.config import MissingInput, Settings, UserError
from pipeline.executor import Executor, HandedOver
from pipeline.local import LocalExecutor, LocalSettings, die_with_parent
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats
from pipeline.stop import EXIT_STOPPED, StopFlag, Stopped
from slurm import batches, job
from slurm.driver import driving
from slurm.executor import SlurmExecutor
from slurm.settings import SlurmSettings

PROGRAM = "tests.slurm.toy"


class NumbersSettings(Settings):
    """How many numbers, and which tasks show which fault, how often."""

    count: int = 3
    faults: dict[int, str] = Field(default_factory=dict)
    times: int = 1
    slow: tuple[int, ...] = ()
    """Tasks that last, but can be stopped, until there is a file RUN/hurry."""

    operational = frozenset({"faults", "times", "slow"})


class Toy(Settings):
    """The configuration."""

    numbers: NumbersSettings = NumbersSettings()
    total: Settings = Settings()
    max_failed_tasks: float = 0
    local: LocalSettings = LocalSettings(workers=2)
    slurm: SlurmSettings = SlurmSettings()


def _plan(run: Run) -> list[Task]:
    return [Task("numbers", i, params={"n": i}) for i in range(run.settings("numbers").count)]


def _make_number(attempt: Attempt) -> Stats:
    settings, index = attempt.settings, attempt.task.index
    with (attempt.run.folder / f"tally-{index}").open("a") as tally:
        tally.write("x")
    tries = len((attempt.run.folder / f"tally-{index}").read_text())
    if tries <= settings.times:
        _misbehave(settings.faults.get(index, ""))
    while index in settings.slow and not (attempt.run.folder / "hurry").exists():
        attempt.stop.check()
        time.sleep(0.1)
    (attempt.folder / f"n-{index:05d}.json").write_text(json.dumps(attempt.task.params["n"]))
    return Stats(rows_in=1, rows_out=1)


def _misbehave(fault: str) -> None:
    if fault == "raise":
        raise ValueError("the fault that was asked for")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "missing":
        raise MissingInput("somewhere: not there")
    if fault == "memory":
        hog = bytearray(400 << 20)
        time.sleep(30 + 0 * len(hog))


def _plan_sum(run: Run) -> list[Task]:
    return [Task("total", 0, tuple(run.find("numbers:n-*.json")))]


def _add(attempt: Attempt) -> Stats:
    total = sum(json.loads(path.read_text()) for path in attempt.inputs())
    (attempt.folder / "sum.json").write_text(json.dumps(total))
    return Stats()


NUMBERS = Stage("numbers", (), _plan, _make_number, unit="numbers", can_lose_tasks=True)
TOTAL = Stage("total", ("numbers",), _plan_sum, _add)
STAGES = {stage.name: stage for stage in (NUMBERS, TOTAL)}


def main(arguments: Sequence[str]) -> int:
    """`build CONFIG --run RUN --on slurm`, `chunk RUN BATCH NUMBER`, `task …`; the exit code."""
    log.configure(stamped=True)
    command, *rest = arguments
    try:
        return {"build": _build, "chunk": _chunk, "task": _task}[command](rest)
    except HandedOver as words:
        logging.info("%s", words)
        return 0
    except UserError as error:
        logging.error("%s", error)
        return error.exit_code
    except Stopped as error:
        logging.info("stopped by %s", error)
        return EXIT_STOPPED


def _build(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--on", default="local")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--continues")
    options = parser.parse_args(arguments)
    toy = config.load(Toy, options.config)
    run = Run(options.run, toy)
    stop = StopFlag().install()
    if options.on == "local":
        command = (sys.executable, "-m", PROGRAM, "task")
        _advance(run, toy, LocalExecutor(toy.local, stop, command), stop)
        return 0
    with last_command.recorded(run):
        _drive(options, run, toy, stop)
    return 0


def _drive(options: argparse.Namespace, run: Run, toy: Toy, stop: StopFlag) -> None:
    if options.continues:
        last_command.begin(run, "build", on="slurm", waits=options.wait)
    again = ("build", str(run.folder / "config.yaml"), "--run", str(run.folder), "--on", "slurm")
    with driving(
        run.folder,
        toy.slurm,
        command=again,
        waits=options.wait,
        continues=options.continues,
        program=PROGRAM,
    ) as driver:
        last_command.begin(run, "build", on="slurm", waits=options.wait)
        _advance(run, toy, SlurmExecutor(driver, stop), stop)


def _advance(run: Run, toy: Toy, executor: Executor, stop: StopFlag) -> None:
    watch = runner.Unwatched()
    runner.advance(run, tuple(STAGES.values()), executor, stop, watch, toy.max_failed_tasks)


def _chunk(arguments: Sequence[str]) -> int:
    folder, batch, number = arguments
    toy = config.load(Toy, Path(folder) / "config.yaml")
    found = batches.read(Path(batch))
    return job.work(
        Run(Path(folder), toy),
        STAGES[found.stage],
        found,
        int(number),
        settings=toy.slurm,
        local=toy.local,
        stop=StopFlag().install(),
        command=(sys.executable, "-m", PROGRAM, "task"),
    )


def _task(arguments: Sequence[str]) -> int:
    die_with_parent()
    folder, stage, index, fingerprint, attempt = arguments
    stop = StopFlag().install()
    run = Run(Path(folder), config.load(Toy, Path(folder) / "config.yaml"))
    planned = run.plan(stage)[int(index)]
    assert planned.fingerprint == fingerprint
    runner.work_on(run, STAGES[stage], planned, int(attempt), stop)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

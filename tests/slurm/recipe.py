"""Training on a packed folder, as `tests.train.recipe` has it, by jobs of a cluster.

`python -m tests.slurm.recipe train CONFIG --run FOLDER` is what a user's command does with --wait.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import config, log, runner
from pipeline.config import UserError
from pipeline.executor import HandedOver
from pipeline.local import LocalSettings
from pipeline.stage import Run
from pipeline.stop import EXIT_STOPPED, StopFlag, Stopped
from slurm import batches, following, job
from slurm.driver import driving
from slurm.executor import SlurmExecutor
from slurm.settings import Resources, SlurmSettings
from tests.train import recipe
from tests.train.recipe import ROOT, SETTINGS, STAGE
from train.settings import EvaluateSettings

PROGRAM = "tests.slurm.recipe"

# Names of the test cluster's nodes have no address.
SETUP = ("export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1",)


class Recipe(recipe.Recipe):
    """With what jobs ask for, and what checkpoints are evaluated on."""

    slurm: SlurmSettings
    evaluate: EvaluateSettings = EvaluateSettings()


def prepare(
    folder: Path,
    packed: Path,
    per_node: int,
    *,
    minutes: int = 5,
    evaluate: dict[str, str] | None = None,
    **train: object,
) -> Path:
    """Write the configuration of a run; keywords are fields of `train`, `evaluate` datasets."""
    slurm = SlurmSettings(
        default=Resources(processes_per_node=per_node, time_minutes=minutes, memory_gb=8),
        setup=SETUP,
        poll_seconds=1,
        signal_seconds=15,
        evaluate_minutes=0,
    )
    values = {"packed": str(packed), "train": SETTINGS | train, "slurm": slurm.model_dump()}
    values["evaluate"] = {"datasets": evaluate or {}, "threads": 1}
    folder.mkdir()
    (folder / "wanted.yaml").write_text(config.dump(Recipe.model_validate(values)))
    return folder


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """The user's command, with its log as standard output; it waits, or is to `--hand-over`."""
    command = [sys.executable, "-m", PROGRAM, "train", str(folder), *options]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def main(arguments: Sequence[str]) -> int:
    """`train FOLDER`, or what SlurmExecutor submits; the exit code."""
    log.configure(stamped=True)
    command, folder, *rest = arguments
    stop = StopFlag().install()
    try:
        if command == "train":
            continues = rest[-1] if "--continues" in rest else None
            return _train(Path(folder), stop, waits=not rest, continues=continues)
        settings = config.load(Recipe, Path(folder) / "config.yaml")
        if command == "evaluate-checkpoints":
            from train.evaluate.checkpoints import evaluate_new

            if rest:
                following.go_on(Path(rest[1]), [command, folder], settings.slurm, PROGRAM)
            evaluate_new(Run(Path(folder), settings), stop)
            return 0
        return job.work(
            Run(Path(folder), settings),
            STAGE,
            batches.read(Path(rest[0])),
            int(rest[1]),
            settings=settings.slurm,
            local=LocalSettings(),
            stop=stop,
            command=(),
        )
    except HandedOver as words:
        logging.info("%s", words)
        return 0
    except UserError as error:
        logging.error("%s", error)
        return error.exit_code
    except Stopped as error:
        logging.info("stopped by %s", error)
        return EXIT_STOPPED


def _train(folder: Path, stop: StopFlag, *, waits: bool, continues: str | None) -> int:
    settings = config.load(Recipe, folder / "wanted.yaml")
    run = Run(folder, settings)
    command = ("train", str(folder))
    with driving(
        folder, settings.slurm, command=command, waits=waits, continues=continues, program=PROGRAM
    ) as driver:
        runner.advance(run, [STAGE], SlurmExecutor(driver, stop), stop, runner.Unwatched())
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))

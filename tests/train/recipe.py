"""Training alone as a recipe: on a packed folder, run by the real executor as commands.

`python -m tests.train.recipe run FOLDER` is what a user's command does, `task …` what it starts.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline import config, log, runner
from pipeline.config import Settings, UserError
from pipeline.local import LocalExecutor, LocalSettings, die_with_parent
from pipeline.stage import Run, Task
from pipeline.stop import EXIT_STOPPED, StopFlag, Stopped
from tests.train.conftest import TINY_MODEL
from train import stages
from train.settings import TrainSettings
from train.watchdog import Beat, beat_path

ROOT = Path(__file__).parents[2]
VIT = {**TINY_MODEL, "tower": "vit", "layers": [1], "width": 16, "head_width": 16}


class Recipe(Settings):
    """A packed folder and what is done with it."""

    packed: str
    train: TrainSettings
    local: LocalSettings = LocalSettings()


def _plan(run: Run) -> list[Task]:
    packed = Path(run.settings("packed"))
    shards = sorted((packed / "shards").glob("*.tar"))
    reads = [packed / "index.parquet", packed / "dataset.json", *shards]
    return [Task("train", 0, tuple(map(str, reads)))]


STAGE = replace(stages.TRAIN, needs=(), plan=_plan)


SETTINGS: dict[str, object] = {
    "seed": 3,
    "samples": 8 * 60,
    "batch": 8,
    "precision": "float32",
    "threads": 1,
    "log_every_steps": 1,
    "model": VIT,
    "data": {"lanes": 4, "block_samples": 5, "margin": 2, "workers": 0},
    "lr": 1e-3,
    "warmup_steps": 3,
    "checkpoint": {"max_lost_steps": 20},
}


def prepare(
    folder: Path, packed: Path, *, local: dict[str, object] | None = None, **train: object
) -> Path:
    """Write the configuration of a run of 60 steps; keywords are fields of `train`."""
    values = {"packed": str(packed), "train": SETTINGS | train, "local": local or {}}
    folder.mkdir(exist_ok=True)
    (folder / "wanted.yaml").write_text(config.dump(Recipe.model_validate(values)))
    return folder


def start(folder: Path) -> subprocess.Popen[str]:
    """The user's command, with its log as standard output."""
    command = [sys.executable, "-m", "tests.train.recipe", "run", str(folder)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and log of the user's command."""
    said, _ = process.communicate(timeout=150)
    return process.returncode, said


def wait_for(folder: Path, rank: int, holds: Callable[[Beat], bool]) -> Beat:
    """The beat of a rank, once it says what is waited for."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        beat = Beat.read(beat_path(folder / "train" / "heartbeats", rank))
        if holds(beat):
            return beat
        time.sleep(0.002)
    raise AssertionError(f"rank {rank} never came there: {beat}")


def started_by(folder: Path) -> list[int]:
    """Processes that still work on a run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            environ = (entry / "environ").read_bytes() if words else b""
        except OSError:
            continue
        if f"OPENWIT_TEST_RUN={folder}".encode() in environ.split(b"\0"):
            found.append(int(entry.name))
    return found


def _run(folder: Path) -> int:
    os.environ["OPENWIT_TEST_RUN"] = str(folder)
    settings = config.load(Recipe, folder / "wanted.yaml")
    stop = StopFlag().install()
    command = (sys.executable, "-m", "tests.train.recipe", "task")
    executor = LocalExecutor(settings.local, stop, command)
    runner.advance(Run(folder, settings), [STAGE], executor, stop, runner.Unwatched())
    return 0


def _task(folder: Path, attempt: int) -> int:
    die_with_parent()
    stop = StopFlag().install()
    run = Run(folder, config.load(Recipe, folder / "config.yaml"))
    runner.work_on(run, STAGE, run.plan("train")[0], attempt, stop)
    assert "torch" not in sys.modules or run.settings("train").processes == 1
    return 0


def _main(arguments: list[str]) -> int:
    log.configure(stamped=True)
    try:
        if arguments[0] == "run":
            return _run(Path(arguments[1]))
        return _task(Path(arguments[1]), int(arguments[5]))
    except UserError as error:
        logging.error("%s", error)
        return error.exit_code
    except Stopped as signal:
        logging.info("stopped by %s", signal)
        return EXIT_STOPPED


if __name__ == "__main__":
    # Under its own name, by which ranks unpickle what is declared here.
    from tests.train import recipe

    sys.exit(recipe._main(sys.argv[1:]))

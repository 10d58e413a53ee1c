"""Commands that run stages: build, train, evaluate; and what executors start: task, chunk."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pipeline import config as configuration
from pipeline import files, last_command, progress, runner
from pipeline.config import ConfigError, MissingInput
from pipeline.executor import Executor
from pipeline.local import LocalExecutor, die_with_parent
from pipeline.lock import RunInUse
from pipeline.stage import Run, Stage
from pipeline.stop import StopFlag

if TYPE_CHECKING:
    from pipeline.recipe import Config


def open_run(options: argparse.Namespace) -> tuple[Run, Config]:
    """The run that a command names, and its configuration as the command has it."""
    from dataset_build.download import NO_CONTACT
    from pipeline import recipe

    overrides = list(options.overrides)
    if getattr(options, "workers", None) is not None:
        overrides.append(f"local.workers={options.workers}")
    unset: list[str] = []
    config = configuration.load(recipe.Config, options.config, overrides, unset)
    options.run = options.run or Path("runs") / options.config.stem
    if options.command == "build" and not recipe.names_inputs(config):
        alone = f"it is for training alone: `make train CONFIG={options.config} RUN={options.run}`"
        raise ConfigError(f"{options.config}: names nothing to build from in queries and extract; "
                          + (alone if config.train.data.datasets else "name it there"))  # fmt: skip
    if unset:
        raise ConfigError("\n".join(unset))
    if options.command == "build" and recipe.fetches_anonymously(config):
        raise ConfigError(f"{options.config}: {NO_CONTACT}")
    if options.command == "build":
        recipe.check_functions(config)
    return Run(options.run.absolute(), config), config


def build(options: argparse.Namespace, begins_at: str = "") -> int:
    """Run the dataset's stages; those before `begins_at` are left as they are, if they are whole.
    Their inputs need not be there any more."""
    from dataset_build import purge
    from dataset_build.extract import inputs
    from pipeline import recipe
    from train import launch

    run, config = open_run(options)
    stages = recipe.build_stages(config)
    names = [stage.name for stage in stages]
    if begins_at in names and all(_is_whole(run, name) for name in names[: names.index(begins_at)]):
        stages = stages[names.index(begins_at) :]
    if any(stage.name == "extract" for stage in stages):
        inputs.check(run)  # better now than when the queries are there
    with _recorded(options, run):
        runner.begin(run, stages[0], recipe.all_stages(config))
        # A training reads shards that another build of the same run would remove.
        launch.refuse_trainers(run.stage_folder("train"))
        while True:
            requests = purge.settle(run, stages, config.max_failed_tasks)
            code = _advance(options, run, config, stages, "dataset")
            purge.finish(run, requests)
            if purge.is_settled(run.folder):
                return code
            logging.info("more was asked to be removed meanwhile: once more")


def _is_whole(run: Run, stage: str) -> bool:
    """Whether all that is planned of a stage is there, and was when it last was complete."""
    left_out = run.left_out(stage)
    planned = [p.fingerprint for p in run.plan(stage) if p.fingerprint not in left_out]
    return planned == run.complete(stage) == [done.fingerprint for done in run.manifests(stage)]


def train(options: argparse.Namespace) -> int:
    """Train on a dataset that is built, or on others."""
    return _after_build(options, "train")


def evaluate(options: argparse.Namespace) -> int:
    """Train if need be, and measure."""
    return _after_build(options, "evaluate")


def _after_build(options: argparse.Namespace, last: str) -> int:
    """Run the training stages up to `last`; a dataset of the run's own must be built already."""
    from pipeline import recipe

    run, config = open_run(options)
    own = () if config.train.data.datasets else recipe.build_stages(config)
    if own and config.until != "pack":
        raise ConfigError(f"{options.config}: until: the dataset ends at {config.until!r}, so there"
                          " are no shards to train on; set until: pack")  # fmt: skip
    if own and not run.completed("pack"):
        raise MissingInput(f"{options.run}: not built yet: {_build_first(options)}")
    stages = [s for s in recipe.all_stages(config) if s.name in ("train", "evaluate")]
    names = [stage.name for stage in stages]
    here = options.on == "local"  # else nothing of the run is touched
    with _recorded(options, run):
        runner.begin(run, stages[0], recipe.all_stages(config))
        with training_alone(run) if here else nullcontext():
            if stage := runner.outdated(run, own, config.max_failed_tasks):
                raise MissingInput(f"{options.run}: {stage.name} is not up to date with"
                                   f" {options.config}: {_build_first(options)}")  # fmt: skip
            for stage in own:
                run.save_plan(stage.name, run.plan(stage.name))
            return _advance(options, run, config, stages[: names.index(last) + 1], last)


@contextmanager
def training_alone(run: Run) -> Iterator[None]:
    """While it lasts, no other command trains in the run, and no job of a cluster is to."""
    from train import launch

    for stage, words in _with_slurm(run):
        if stage == "train":
            end = f"make cancel RUN={files.shown(run.folder)}"
            raise RunInUse(f"{run.folder}: {words}; wait for it, or end it: {end}")
    with launch.only_training(run.stage_folder("train")):
        yield


def _with_slurm(run: Run) -> list[tuple[str, str]]:
    """Stage and state of each array of a run that SLURM has."""
    from slurm import queue, watch

    try:
        return watch.arrays(run.folder)
    except queue.QueueUnknown as error:
        logging.warning("what SLURM has of this run is not known: %s", error)
        return []


@contextmanager
def _recorded(options: argparse.Namespace, run: Run) -> Iterator[None]:
    """Have `status` know how a command ends that goes on with the run."""
    with last_command.recorded(run):
        if options.continues:  # who submitted it is gone, so this is known from here on
            _begin(options, run)
        yield


def _begin(options: argparse.Namespace, run: Run) -> None:
    last_command.begin(run, options.command, on=options.on, waits=options.wait)


def _build_first(options: argparse.Namespace) -> str:
    settings = " ".join(options.overrides)
    given = f' SET="{settings}"' if settings else ""
    return (f"run `make build-dataset CONFIG={options.config} RUN={options.run}{given}` first, or"
            " name other datasets in train.data.datasets")  # fmt: skip


def _advance(
    options: argparse.Namespace, run: Run, config: Config, stages: Sequence[Stage], what: str
) -> int:
    from pipeline import recipe

    stop = StopFlag().install()
    console = Console(stderr=True)
    with _executor(options, run, config, stop) as executor:
        runner.describe(run, recipe.all_stages(config))
        try:
            with progress.for_console(run, console) as watch:
                allowed = config.max_failed_tasks
                done = runner.advance(run, stages, executor, stop, watch, allowed)
            if not done.idle:
                runner.replan(run, recipe.all_stages(config)[_place(config, stages[-1]) :])
        finally:
            page = write_report(run, recipe.all_stages(config))
    if done.idle:
        logging.info("%s: everything is up to date, nothing to run", what)
    if stages[-1].name == "evaluate":
        for line in _accuracy(run):
            logging.info("%s", line)
    logging.info("report: %s", page)
    if (training := run.stage_folder("train") / "training.html").exists():
        logging.info("training: %s", training)
    return 0


def _place(config: Config, last: Stage) -> int:
    """How many of a configuration's stages there are up to `last`."""
    from pipeline import recipe

    return [stage.name for stage in recipe.all_stages(config)].index(last.name) + 1


def _accuracy(run: Run) -> Iterator[str]:
    """What evaluation found, a line a dataset."""
    results = json.loads(run.path("evaluate:evaluation.json").read_text())
    for name, result in sorted(results.items()):
        yield (
            f"{name}: top-1 {100 * result['top1']:.1f} %, top-5 {100 * result['top5']:.1f} %"
            f" of {result['images']:,} pictures, guessing {100 / result['classes']:.1f} %"
        )


@contextmanager
def _executor(
    options: argparse.Namespace, run: Run, config: Config, stop: StopFlag
) -> Iterator[Executor]:
    """Where the tasks run; on a cluster, this process is then the one that submits its jobs."""
    if options.on == "local":
        for _, words in _with_slurm(run):
            logging.warning("SLURM has this run too, and what both do is done twice: %s", words)
        _begin(options, run)
        yield LocalExecutor(config.local, stop)
        return
    from slurm.driver import driving
    from slurm.executor import SlurmExecutor

    command = [options.command, str(run.folder / "config.yaml"), "--run", str(run.folder)]
    command += ["--on", "slurm"]
    waits, continues = options.wait, options.continues
    with driving(
        run.folder, config.slurm, command=command, waits=waits, continues=continues
    ) as driver:
        _begin(options, run)
        yield SlurmExecutor(driver, stop)


def write_report(run: Run, stages: Sequence[Stage]) -> Path:
    """RUN/train/training.html, where there was training, and RUN/report, which links to it."""
    from dataset_build import report
    from train import page

    page.write(run.stage_folder("train"))
    return report.write(run, stages)


def task(options: argparse.Namespace) -> int:
    """One attempt at one task: what executors start."""
    die_with_parent()
    from pipeline import recipe

    stop = StopFlag().install()
    config = configuration.load(recipe.Config, options.run / "config.yaml")
    run = Run(options.run, config)
    stage = {stage.name: stage for stage in recipe.all_stages(config)}[options.stage]
    planned = run.plan(stage.name)[options.index]
    if planned.fingerprint != options.fingerprint:
        raise ConfigError(f"{options.run}: the run's configuration changed after this task was"
                          " planned; start the build again")  # fmt: skip
    logging.info("%s task %d: attempt %d", stage.name, options.index, options.attempt)
    done = runner.work_on(run, stage, planned, options.attempt, stop)
    logging.info("%s task %d: published in %.1f s", stage.name, options.index, done.seconds)
    return 0


def chunk(options: argparse.Namespace) -> int:
    """The tasks of one job of an array: what SlurmExecutor submits."""
    from pipeline import recipe
    from slurm import batches, job

    stop = StopFlag().install()
    config = configuration.load(recipe.Config, options.run / "config.yaml")
    batch = batches.read(options.batch)
    stage = {stage.name: stage for stage in recipe.all_stages(config)}[batch.stage]
    return job.work(
        Run(options.run, config),
        stage,
        batch,
        options.number,
        settings=config.slurm,
        local=config.local,
        stop=stop,
        command=(sys.executable, "-m", "pipeline", "task"),
    )

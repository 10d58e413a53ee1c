"""Commands that look at a run, a configuration or a cluster, and what else one asks of them."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from pipeline import config as configuration
from pipeline import last_command, manifest
from pipeline import status as reading
from pipeline.commands.advance import open_run, write_report
from pipeline.stage import Run
from pipeline.stop import StopFlag

EXIT_DAMAGED = 5


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """As for `print`: else it would end the process with an error."""
        raise BrokenPipeError


def report(options: argparse.Namespace) -> int:
    """Write the report and print its summary."""
    from dataset_build import report
    from pipeline import recipe

    run, config = open_run(options)
    reading.read(options.run)  # says so if there is no run
    stages = recipe.all_stages(config)
    write_report(run, stages)
    for line in report.summary_lines(run, stages):
        print(line)
    return 0


def status(options: argparse.Namespace) -> int:
    """Print how far each stage is."""
    from slurm import watch

    stages = reading.read(options.run)
    jobs, goes_on = watch.join(options.run, stages)
    _Console(width=None if sys.stdout.isatty() else 140).print(reading.table(stages))
    lines = [*jobs, *_newest_accuracy(options.run), *reading.failures(stages)]
    for line in [*lines, *last_command.lines(options.run, goes_on)]:
        print(line)
    return 0


def _newest_accuracy(folder: Path) -> Iterator[str]:
    """What the last checkpoint was worth that was evaluated while training went on."""
    from train.evaluate.by_step import BY_STEP, rows

    path = folder / "evaluate" / BY_STEP
    found = list(rows(path))
    for row in found[-1:]:
        top1 = [f"{name} {100 * r['top1']:.1f} %" for name, r in sorted(row["datasets"].items())]
        yield (f"top-1 at step {row['step']:,}: {', '.join(top1)}; all {len(found)} checkpoints"
               f" that were evaluated: {path}")  # fmt: skip


def logs(options: argparse.Namespace) -> int:
    """Print the logs of one task, or of those that failed or run."""
    for path in reading.logs(options.run, options.stage, options.task):
        print(f"== {path}")
        sys.stdout.flush()
        with path.open("rb") as stream:
            shutil.copyfileobj(stream, sys.stdout.buffer)
    return 0


def cancel(options: argparse.Namespace) -> int:
    """End a run's jobs on the cluster; what is published stays."""
    from slurm import driver

    reading.read(options.run)  # says so if there is no run
    count = driver.cancel(options.run.absolute())
    if not count:
        print("no jobs of this run are with SLURM")
        return 0
    print(f"{count} job{'s' * (count != 1)} cancelled; what is published stays")
    if said := last_command.read(options.run):
        print(f"to go on: {said.again(options.run)}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Read every published byte again; what is damaged is put aside and made again by `build`."""
    folder: Path = options.run
    run = Run(folder, configuration.Settings())
    faults = []
    checked = 0
    for stage in reading.read(folder):
        stage_folder = run.stage_folder(stage.name)
        for published in run.manifests(stage.name):
            found = manifest.damage(stage_folder, published)
            checked += len(published.outputs)
            if found:
                faults += found
                manifest.discard(stage_folder, published)
    for fault in faults:
        print(fault)
    print(f"{checked} files read, {len(faults)} damaged")
    if faults:
        print("the tasks that made them will run again with the next build")
    return EXIT_DAMAGED if faults else 0


def export(options: argparse.Namespace) -> int:
    """Write the trained model in a format that others read."""
    from pipeline import recipe
    from train.export import export

    reading.read(options.run)  # says so if there is no run
    config = configuration.load(recipe.Config, options.run / "config.yaml")
    print(export(Run(options.run, config), options.format, options.to))
    return 0


def evaluate_checkpoints(options: argparse.Namespace) -> int:
    """Measure the checkpoints of a training, finished or not, that were not measured before."""
    from pipeline import recipe
    from train import page
    from train.evaluate.checkpoints import evaluate_new

    stop = StopFlag().install()
    reading.read(options.run)  # says so if there is no run
    config = configuration.load(recipe.Config, options.run / "config.yaml")
    run = Run(options.run.absolute(), config)
    if options.follows:
        from slurm import following

        following.go_on(options.follows, [options.command, str(run.folder)], config.slurm)
    count = evaluate_new(run, stop)
    page.write(run.stage_folder("train"))
    logging.info("%d checkpoints evaluated: %s", count, run.folder / "evaluate" / "by_step.jsonl")
    return 0


def config(options: argparse.Namespace) -> int:
    """Print the resolved configuration, every key explained."""
    from pipeline import recipe

    unset: list[str] = []
    loaded = configuration.load(recipe.Config, options.config, options.overrides, unset)
    print("\n".join(configuration.explain(loaded)))
    for fault in unset:
        logging.warning("%s", fault)
    return 0


def slurm_check(options: argparse.Namespace) -> int:
    """Whether the cluster can do what a configuration asks of it."""
    from pipeline import recipe
    from slurm import check
    from slurm.settings import SlurmSettings

    settings, train_nodes = SlurmSettings(), (1, 1)
    if options.config:
        config = configuration.load(recipe.Config, options.config, options.overrides)
        settings, train_nodes = config.slurm, config.train.fewest_and_most_nodes
    place = options.run.parent if options.run else Path("runs")
    findings = check.check(settings, place.absolute(), train_nodes=train_nodes)
    Console(width=None if sys.stdout.isatty() else 140).print(check.table(findings))
    to_do = [finding for finding in findings if finding.must]
    print(f"{len(to_do)} to do" if to_do else "the cluster has all that runs need")
    return check.EXIT_UNFIT if to_do else 0

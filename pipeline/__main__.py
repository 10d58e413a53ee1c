"""The command line: build | train | evaluate | report | status | logs | cancel | verify | …"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pipeline import config as configuration
from pipeline import log, manifest, progress, runner, status
from pipeline.config import ConfigError, MissingInput, UserError
from pipeline.local import LocalExecutor, die_with_parent
from pipeline.stage import Executor, HandedOver, Run, Stage
from pipeline.stop import EXIT_STOPPED, StopFlag, Stopped

if TYPE_CHECKING:
    from pipeline.recipe import Config

EXIT_DAMAGED = 5

_EPILOG = """exit codes: 0 done; 75 stopped at a safe point, the same command goes on;
2 the configuration is wrong; 3 an input is missing; 4 tasks failed; 5 outputs are damaged;
9 another command trains in this run"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognised: {' '.join(rest)}")
    if rest:  # overrides that follow an option; argparse takes only those before the first
        options.overrides = [*options.overrides, *rest]
    log.configure(stamped=options.command in ("task", "chunk") or not sys.stderr.isatty())
    command: Callable[[argparse.Namespace], int] = options.call
    try:
        return command(options)
    except UserError as error:
        logging.error("%s", error)
        return error.exit_code
    except HandedOver as words:
        logging.info("%s", words)
        return 0
    except Stopped as stopped:
        logging.info("stopped by %s; the same command goes on from here", stopped)
        return EXIT_STOPPED


def _build(options: argparse.Namespace) -> int:
    from pipeline import recipe

    run, config = _open(options)
    stages = recipe.build_stages(config)
    runner.begin(run, stages[0])
    return _advance(options, run, config, stages, "dataset")


def _train(options: argparse.Namespace) -> int:
    return _after_build(options, "train")


def _evaluate(options: argparse.Namespace) -> int:
    return _after_build(options, "evaluate")


def _after_build(options: argparse.Namespace, last: str) -> int:
    """Run the training stages up to `last`; a dataset of the run's own must be built already."""
    from pipeline import recipe
    from train import launch

    run, config = _open(options)
    own = () if config.train.data.datasets else recipe.build_stages(config)
    if own and config.until != "pack":
        raise ConfigError(f"{options.config}: until: the dataset ends at {config.until!r}, so there"
                          " are no shards to train on; set until: pack")  # fmt: skip
    if own and not run.completed("pack"):
        raise MissingInput(f"{options.run}: not built yet: {_build_first(options)}")
    stages = [s for s in recipe.all_stages(config) if s.name in ("train", "evaluate")]
    names = [stage.name for stage in stages]
    runner.begin(run, stages[0])
    here = options.on == "local"  # else nothing of the run is touched
    with launch.only_training(run.stage_folder("train")) if here else nullcontext():
        if stage := runner.outdated(run, own, config.max_failed_tasks):
            raise MissingInput(f"{options.run}: {stage.name} is not up to date with"
                               f" {options.config}: {_build_first(options)}")  # fmt: skip
        for stage in own:
            run.save_plan(stage.name, run.plan(stage.name))
        return _advance(options, run, config, stages[: names.index(last) + 1], last)


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
        finally:
            page = _write_report(run, recipe.all_stages(config))
    if done.idle:
        logging.info("%s: everything is up to date, nothing to run", what)
    logging.info("report: %s", page)
    if (training := run.stage_folder("train") / "training.html").exists():
        logging.info("training: %s", training)
    return 0


@contextmanager
def _executor(
    options: argparse.Namespace, run: Run, config: Config, stop: StopFlag
) -> Iterator[Executor]:
    """Where the tasks run; on a cluster, this process is then the one that submits its jobs."""
    if options.on == "local":
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
        yield SlurmExecutor(driver, stop)


def _write_report(run: Run, stages: Sequence[Stage]) -> Path:
    """RUN/train/training.html, where there was training, and RUN/report, which links to it."""
    from dataset_build import report
    from train import page

    page.write(run.stage_folder("train"))
    return report.write(run, stages)


def _report(options: argparse.Namespace) -> int:
    from dataset_build import report
    from pipeline import recipe

    run, config = _open(options)
    status.read(options.run)  # says so if there is no run
    stages = recipe.all_stages(config)
    _write_report(run, stages)
    for line in report.summary_lines(run, stages):
        print(line)
    return 0


def _status(options: argparse.Namespace) -> int:
    from slurm import watch

    stages = status.read(options.run)
    jobs = watch.join(options.run, stages)
    Console(width=None if sys.stdout.isatty() else 140).print(status.table(stages))
    for line in [*jobs, *status.failures(stages)]:
        print(line)
    return 0


def _logs(options: argparse.Namespace) -> int:
    """Print the logs of one task, or of those that failed or run."""
    for path in status.logs(options.run, options.stage, options.task):
        print(f"== {path}")
        sys.stdout.flush()
        with path.open("rb") as stream:
            shutil.copyfileobj(stream, sys.stdout.buffer)
    return 0


def _cancel(options: argparse.Namespace) -> int:
    """End a run's jobs on the cluster; what is published stays."""
    from slurm import driver

    status.read(options.run)  # says so if there is no run
    count = driver.cancel(options.run.absolute())
    print(f"{count} jobs cancelled; the command that started them goes on from what is published")
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Read every published byte again; what is damaged is put aside and made again by `build`."""
    folder: Path = options.run
    run = Run(folder, configuration.Settings())
    faults = []
    checked = 0
    for stage in status.read(folder):
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


def _export(options: argparse.Namespace) -> int:
    """Write the trained model in a format that others read."""
    from pipeline import recipe
    from train.export import export

    status.read(options.run)  # says so if there is no run
    config = configuration.load(recipe.Config, options.run / "config.yaml")
    print(export(Run(options.run, config), options.format, options.to))
    return 0


def _evaluate_checkpoints(options: argparse.Namespace) -> int:
    """Measure the checkpoints of a training, finished or not, that were not measured before."""
    from pipeline import recipe
    from train import page
    from train.evaluate.checkpoints import evaluate_new

    stop = StopFlag().install()
    status.read(options.run)  # says so if there is no run
    config = configuration.load(recipe.Config, options.run / "config.yaml")
    run = Run(options.run.absolute(), config)
    if options.follows:
        from slurm import following

        following.go_on(options.follows, [options.command, str(run.folder)], config.slurm)
    count = evaluate_new(run, stop)
    page.write(run.stage_folder("train"))
    logging.info("%d checkpoints evaluated: %s", count, run.folder / "evaluate" / "by_step.jsonl")
    return 0


def _config(options: argparse.Namespace) -> int:
    """Print the resolved configuration, every key explained."""
    from pipeline import recipe

    unset: list[str] = []
    loaded = configuration.load(recipe.Config, options.config, options.overrides, unset)
    print("\n".join(configuration.explain(loaded)))
    for fault in unset:
        logging.warning("%s", fault)
    return 0


def _slurm_check(options: argparse.Namespace) -> int:
    """Whether the cluster can do what a configuration asks of it."""
    from pipeline import recipe
    from slurm import check
    from slurm.settings import SlurmSettings

    settings = SlurmSettings()
    if options.config:
        settings = configuration.load(recipe.Config, options.config, options.overrides).slurm
    place = options.run.parent if options.run else Path("runs")
    findings = check.check(settings, place.absolute())
    Console(width=None if sys.stdout.isatty() else 140).print(check.table(findings))
    to_do = [finding for finding in findings if finding.must]
    print(f"{len(to_do)} to do" if to_do else "the cluster has all that runs need")
    return check.EXIT_UNFIT if to_do else 0


def _plan(options: argparse.Namespace) -> int:
    """Print what a build and a training will cost, and what that is reckoned from."""
    from dataset_build import pilot
    from dataset_build.workload import Asked, Workload
    from pipeline import plan, rates
    from train import cost

    run, config = _open(options)
    pilots = [_existing(folder) for folder in options.pilots]
    measured = rates.Rates()
    for one in pilots:
        name = str(one.folder)
        measured.figures |= pilot.figures(one, name) | cost.figures(one, name)
    known = rates.shipped()
    seen = [task for one in pilots for task in pilot.observations(one)]
    names = ", ".join(str(one.folder) for one in pilots)
    measured.kinds = rates.fit(seen, known.kinds, f"measured in {names}")
    ledger = plan.Ledger(measured.over(known))
    cores = options.cores or os.cpu_count() or 1
    costs, facts, pairs = [], {}, None
    if not config.train.data.datasets:
        options.ratios = dict(options.ratios)
        asked = Asked(**{name: getattr(options, name) for name in Asked.__dataclass_fields__})
        build = Workload(run, asked, ledger, pilots)
        costs = [plan.cost(work, ledger, cores) for work in build.stages()]
        facts, pairs = build.facts, build.sizes.pairs
    if config.until == "pack":
        names_of = ("gpu", "gpus", "mfu", "samples_per_s")
        chosen = {name: getattr(options, name) for name in names_of}
        pair_bytes = ledger.figure("picture_bytes")
        training, more = cost.plan(run, ledger, pairs=pairs, pair_bytes=pair_bytes, **chosen)
        costs.append(training)
        facts |= more
    answer = plan.Plan(tuple(costs), cores, facts, ledger)
    if options.json:
        print(json.dumps(answer.to_json(), indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(answer.lines())
    return 0


def _existing(folder: Path) -> Run:
    """A run that is there, with the configuration it was made with."""
    from pipeline import recipe

    status.read(folder)  # says so if there is no run
    return Run(folder, configuration.load(recipe.Config, folder / "config.yaml"))


def _task(options: argparse.Namespace) -> int:
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


def _chunk(options: argparse.Namespace) -> int:
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


def _open(options: argparse.Namespace) -> tuple[Run, Config]:
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
    return Run(options.run.absolute(), config), config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Build a CLIP-style dataset from the open web and train CLIP on it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    configured = {
        "build": (_build, "run the dataset's stages, from the query list to the shards"),
        "train": (_train, "train on the shards that `build` made"),
        "evaluate": (_evaluate, "train if need be, then measure zero-shot accuracy"),
        "report": (_report, "write RUN/report and print a summary"),
        "config": (_config, "print the resolved configuration with every key explained"),
    }
    for name, (call, text) in configured.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(call=call)
        command.add_argument("config", type=Path, metavar="CONFIG.yaml")
        if name != "config":
            command.add_argument("--run", type=Path, help="run folder (runs/<name of CONFIG>)")
            where = "where tasks run: on this machine, or as jobs of a cluster"
            command.add_argument("--on", choices=["local", "slurm"], default="local", help=where)
            waits = "with --on slurm: stay until all is done, for clusters whose jobs submit none"
            command.add_argument("--wait", action="store_true", help=waits)
            command.add_argument("--continues", help=argparse.SUPPRESS)
            command.add_argument("--workers", type=int, help="tasks at the same time (one a core)")
        command.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="change one setting"
        )
    reading = {
        "status": (_status, "what of a run is done, running, failed, and where its logs are"),
        "cancel": (_cancel, "end the jobs that a run has on a cluster"),
        "verify": (_verify, "read every published file again and compare checksums"),
    }
    for name, (call, text) in reading.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(call=call)
        command.add_argument("run", type=Path, metavar="RUN")
    text = "print the log of a task; without TASK, of those that failed, or that run"
    command = commands.add_parser("logs", help=text, description=text, allow_abbrev=False)
    command.set_defaults(call=_logs)
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("stage", metavar="STAGE")
    command.add_argument("task", type=int, nargs="?", metavar="TASK")
    text = "look at the cluster, and what jobs see there: what is fine and what must be set"
    command = commands.add_parser("slurm-check", help=text, description=text, allow_abbrev=False)
    command.set_defaults(call=_slurm_check)
    command.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml")
    command.add_argument("--run", type=Path, help="where a run will be (runs/<name of CONFIG>)")
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change one setting"
    )
    _add_plan(commands)
    text = "write the trained model as open_clip or transformers read it"
    command = commands.add_parser("export", help=text, description=text, allow_abbrev=False)
    command.set_defaults(call=_export)
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--format", choices=["open_clip", "huggingface"], default="open_clip")
    command.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    text = "measure the checkpoints that are new, while training goes on or after it"
    command = commands.add_parser("evaluate-checkpoints", help=text, description=text)
    command.set_defaults(call=_evaluate_checkpoints)
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--follows", type=Path, help=argparse.SUPPRESS)
    task = commands.add_parser("task", description="one attempt at one task, for executors")
    task.set_defaults(call=_task)
    for name, kind in (("run", Path), ("stage", str), ("index", int), ("fingerprint", str)):
        task.add_argument(name, type=kind)
    task.add_argument("attempt", type=int)
    chunk = commands.add_parser("chunk", description="the tasks of one job, for SlurmExecutor")
    chunk.set_defaults(call=_chunk)
    for name, kind in (("run", Path), ("batch", Path), ("number", int)):
        chunk.add_argument(name, type=kind)
    return parser


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "what a build and a training will cost: hours, memory, bytes, jobs"
    command = commands.add_parser("plan", help=text, description=text, allow_abbrev=False)
    command.set_defaults(call=_plan)
    add = command.add_argument
    add("config", type=Path, metavar="CONFIG.yaml")
    add("overrides", nargs="*", metavar="section.key=value", help="change one setting")
    add("--run", type=Path, help="run folder, for inputs that its stages have made")
    add("--from", dest="pilots", type=Path, action="append", default=[], metavar="RUN",
        help="a run that ended, to take rates from; several are fitted together")  # fmt: skip
    numbers = {
        "candidates": "candidates that extract will find",
        "selected": "pairs that balance will select",
        "pairs": "pairs that the dataset shall have",
        "queries": "length of the query list",
        "mfu": "utilisation of a GPU in training, 0 to 1",
        "samples-per-s": "training samples a second of one GPU, as measured",
        "addresses-per-s": "most addresses that the download may ask for in a second",
    }
    for name, text in numbers.items():
        add(f"--{name}", type=_positive, metavar="N", help=text)
    whole = {
        "files": "input files, where they are not there yet",
        "snapshots": "snapshots that they belong to",
        "connections": "connections of the download, of all tasks together",
        "cores": "cores that tasks run on (those of this machine)",
    }
    for name, text in whole.items():
        add(f"--{name}", type=_count, metavar="N", help=text)
    add("--gpu", metavar="NAME", help="GPU to train on, such as H100 or A100")
    add("--gpus", type=_count, default=1, metavar="N", help="how many of it (1)")
    add("--ratio", dest="ratios", type=_ratio, action="append", default=[], metavar="STAGE=SHARE",
        help="share of rows that match, dedup, balance, download or screen lets pass")  # fmt: skip
    add("--json", action="store_true", help="print values for programs")


def _positive(text: str) -> float:
    """A number above 0, such as 400e6."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _count(text: str) -> int:
    """A whole number above 0, also as 2e3."""
    value = _positive(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(value)


def _ratio(text: str) -> tuple[str, float]:
    """`stage=share`."""
    from dataset_build.workload import RATIOS

    stage, equals, share = text.partition("=")
    if stage not in RATIOS or not equals:
        raise argparse.ArgumentTypeError(f"{text}: expected STAGE=SHARE, of {', '.join(RATIOS)}")
    value = _positive(share)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text}: a share is at most 1")
    return stage, value


if __name__ == "__main__":
    sys.exit(main())

"""The command `plan`: what a build and a training will cost, for the numbers that are given."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console

from pipeline import config as configuration
from pipeline import status
from pipeline.commands.advance import open_run
from pipeline.stage import Run


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    text = "what a build and a training will cost: hours, memory, bytes, jobs"
    command = commands.add_parser("plan", help=text, description=text, allow_abbrev=False)
    command.set_defaults(call=plan_costs)
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


def plan_costs(options: argparse.Namespace) -> int:
    """Print what a build and a training will cost, and what that is reckoned from."""
    from dataset_build.forecast import pilot
    from dataset_build.forecast.sizes import Asked
    from dataset_build.forecast.workload import Workload
    from pipeline import plan, rates
    from train import cost

    run, config = open_run(options)
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
    from dataset_build.forecast.sizes import RATIOS

    stage, equals, share = text.partition("=")
    if stage not in RATIOS or not equals:
        raise argparse.ArgumentTypeError(f"{text}: expected STAGE=SHARE, of {', '.join(RATIOS)}")
    value = _positive(share)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text}: a share is at most 1")
    return stage, value

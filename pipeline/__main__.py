"""The command line: build | train | evaluate | report | status | verify | purge | …"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline import log
from pipeline.commands import advance, look, plan, purge, verify
from pipeline.config import UserError
from pipeline.executor import HandedOver
from pipeline.stop import EXIT_STOPPED, Stopped

_EPILOG = """exit codes: 0 done; 75 stopped at a safe point, the same command goes on;
1 any other error, such as jobs that SLURM refuses, or no answer from it; 2 the configuration is
wrong; 3 an input is missing; 4 tasks failed; 5 outputs are damaged; 6 no room on the run's disk;
9 another command, or a job, trains in this run"""


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
        code = command(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read it, such as `grep -q`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        logging.error("%s", error)
        return error.exit_code
    except HandedOver as words:
        logging.info("%s", words)
        return 0
    except Stopped as stopped:
        logging.info("stopped by %s; the same command goes on from here", stopped)
        return EXIT_STOPPED


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
        "build": (advance.build, "run the dataset's stages, from the query list to the shards"),
        "train": (advance.train, "train on the shards that `build` made"),
        "evaluate": (advance.evaluate, "train if need be, then measure zero-shot accuracy"),
        "report": (look.report, "write RUN/report and print a summary"),
        "config": (look.config, "print the resolved configuration with every key explained"),
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
        "status": (look.status, "what of a run is done, running, failed, and where its logs are"),
        "cancel": (look.cancel, "end the jobs that a run has on a cluster"),
    }
    for name, (call, text) in reading.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(call=call)
        command.add_argument("run", type=Path, metavar="RUN")
    text = (
        "read every published byte again, of a run or a packed dataset's folder; say what differs"
    )
    command = commands.add_parser("verify", help=text, description=text, allow_abbrev=False)
    command.set_defaults(call=verify.verify)
    command.add_argument("run", type=Path, metavar="RUN", help="or a copy of a run's pack/out")
    text = (
        "leave the pictures undecoded, whose bytes are compared all the same: several times faster"
    )
    command.add_argument("--no-decode", action="store_true", help=text)
    command.add_argument("--workers", type=int, default=0, help="processes (one a core)")
    text = "print the log of a task; without TASK, of those that failed, or that run"
    command = commands.add_parser("logs", help=text, description=text, allow_abbrev=False)
    command.set_defaults(call=look.logs)
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("stage", metavar="STAGE")
    command.add_argument("task", type=int, nargs="?", metavar="TASK")
    text = "look at the cluster, and what jobs see there: what is fine and what must be set"
    command = commands.add_parser("slurm-check", help=text, description=text, allow_abbrev=False)
    command.set_defaults(call=look.slurm_check)
    command.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml")
    command.add_argument("--run", type=Path, help="where a run will be (runs/<name of CONFIG>)")
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change one setting"
    )
    plan.add(commands)
    purge.add(commands)
    text = "write the trained model as open_clip or transformers read it"
    command = commands.add_parser("export", help=text, description=text, allow_abbrev=False)
    command.set_defaults(call=look.export)
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--format", choices=["open_clip", "huggingface"], default="open_clip")
    command.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    text = "measure the checkpoints that are new, while training goes on or after it"
    command = commands.add_parser("evaluate-checkpoints", help=text, description=text)
    command.set_defaults(call=look.evaluate_checkpoints)
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--follows", type=Path, help=argparse.SUPPRESS)
    task = commands.add_parser("task", description="one attempt at one task, for executors")
    task.set_defaults(call=advance.task)
    for name, kind in (("run", Path), ("stage", str), ("index", int), ("fingerprint", str)):
        task.add_argument(name, type=kind)
    task.add_argument("attempt", type=int)
    chunk = commands.add_parser("chunk", description="the tasks of one job, for SlurmExecutor")
    chunk.set_defaults(call=advance.chunk)
    for name, kind in (("run", Path), ("batch", Path), ("number", int)):
        chunk.add_argument(name, type=kind)
    return parser


if __name__ == "__main__":
    sys.exit(main())

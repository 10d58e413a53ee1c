"""The command `purge`: what somebody asked to have removed goes, and does not come back."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from pipeline import config as configuration
from pipeline import status
from pipeline.commands import advance
from pipeline.config import ConfigError, MissingInput
from pipeline.lock import RunInUse, refuse_others
from pipeline.stage import Run
from pipeline.stop import EXIT_STOPPED


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    text = "remove pictures from a run: by address, domain, SHA-256 or uid"
    command = commands.add_parser("purge", help=text, description=text, allow_abbrev=False)
    command.set_defaults(call=purge)
    add = command.add_argument
    add("run", type=Path, metavar="RUN")
    add("lists", type=Path, nargs="*", metavar="LIST",
        help="text files of one entry a line; without any, what is unfinished goes on")  # fmt: skip
    add("--reason", default="", metavar="TEXT", help="who asked and why, for RUN/removed")
    add("--from", dest="other", type=Path, metavar="RUN", help="what was removed from another run")
    add("--later", action="store_true", help="change no files now; the next build does")
    add("--on", choices=["local", "slurm"], default="local", help="where shards are made again")
    add("--wait", action="store_true", help="with --on slurm: stay until all is done")
    add("--workers", type=int, help="tasks at the same time (one a core)")


def purge(options: argparse.Namespace) -> int:
    """Put a request in force, then carry it out."""
    from dataset_build import purge as purging
    from dataset_build import removal
    from pipeline import recipe

    status.read(options.run)  # says so if there is no run
    config = configuration.load(recipe.Config, options.run / "config.yaml")
    run = Run(options.run.absolute(), config)
    paths = [*options.lists, *(removal.carried(options.other) if options.other else ())]
    if paths:
        asked = removal.read(paths)
        if not any(asked.entries.values()):
            raise ConfigError(f"{', '.join(map(str, paths))}: nothing is named there to be removed")
        request = removal.ask(run, asked, options.reason)
        purging.show_uids(run.folder)
        for kind, samples in request.found.items():
            if samples:
                logging.info("%s: %s pairs", kind, f"{samples:,}")
        if request.unknown:
            some = ", ".join(request.unknown[:5]) + (", …" if len(request.unknown) > 5 else "")
            logging.info("%d entries name nothing that is here; should it come, it is left out: %s",
                         len(request.unknown), some)  # fmt: skip
        logging.info("in force: %s", run.folder / "removed" / f"{request.number:06d}")
    else:
        logging.info("no list is given: what was asked for before is carried out")
    if options.later:
        logging.info("files are changed by the next `make build-dataset` or `make purge`")
        return 0
    try:
        refuse_others(run.stage_folder("train") / "lock.json", job="")
    except RunInUse as error:
        logging.warning("%s", error)
        logging.warning("it leaves out what was removed from now on; when it has ended, `make purge"
                        " RUN=%s` removes it from the files", options.run)  # fmt: skip
        return EXIT_STOPPED
    # It is a build from here on; on a cluster jobs go on with it.
    options.command, options.config = "build", options.run / "config.yaml"
    options.overrides, options.continues = [], None
    try:
        # What comes before has no pictures, and its inputs may be gone by now.
        code = advance.build(options, begins_at="download")
    except MissingInput as error:
        raise MissingInput(
            f"{error}\n{purging.packed(run)} samples that were removed are in shards still: put it"
            f" back, then `make purge RUN={options.run}` goes on"
        ) from None
    for line in purging.remains(run):
        logging.info("%s", line)
    return code

"""RUN/command.json: the last command on a run and how it ended, for `status` to tell.

It is written when a command takes the run, and again when it ends. One that was killed leaves the
record open; one that left the rest to a cluster's jobs does so too, until the last of them ends.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.config import UserError
from pipeline.executor import HandedOver
from pipeline.lock import lives, this_process
from pipeline.stage import Run
from pipeline.stop import EXIT_STOPPED, Stopped

log = logging.getLogger(__name__)

_BYTES = 4096
"""Of every record: on a full disk a new one is written over the old."""
_MOST_WORDS = 500
_TARGETS = {"build": "build-dataset"}
"""Of the Makefile, where they are not called as the command is."""


@dataclass(frozen=True)
class LastCommand:
    """A command that makes a run go on."""

    name: str
    """build, train or evaluate."""
    on: str
    """local or slurm."""
    waits: bool
    """On a cluster: whether it stays."""
    process: dict[str, Any]
    """See `pipeline.lock.this_process`."""
    began: float
    """Unix time, seconds; for people, never compared."""
    ended: float | None = None
    exit_code: int | None = None
    """0 if it did all that it was to do; None as long as nobody has said how it ended."""
    stage: str = ""
    """Where it ended, if at a stage."""
    why: str = ""

    @property
    def is_open(self) -> bool:
        """Whether it goes on, or has ended without a word."""
        return self.exit_code is None

    def again(self, folder: Path) -> str:
        """What goes on with the run in `folder`, to be typed in the project's folder."""
        where = " ON=slurm" * (self.on == "slurm") + " WAIT=1" * self.waits
        return f"make {_TARGETS.get(self.name, self.name)} RUN={files.shown(folder)}{where}"


def begin(run: Run, name: str, *, on: str, waits: bool = False) -> None:
    """Record that this process, or what it submits, goes on with the run from here."""
    _write(run.folder, LastCommand(name, on, waits, this_process(), time.time()))


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Record how the block ends, if `begin` was called in it and the rest is not handed over.

    A full disk becomes `pipeline.files.NoRoom`.
    """
    try:
        yield
    except HandedOver:
        raise
    except BaseException as error:
        full = files.no_room(run.folder) if files.is_full(error) else None
        _end_own(run, full or error)
        if full:
            raise full from error
        raise
    else:
        _end_own(run, None)


def end(folder: Path, stage: str, why: str, exit_code: int) -> None:
    """Record from outside how the last command on a run ended, if there was one."""
    if said := read(folder):
        why = why.partition("\n")[0][:_MOST_WORDS]
        done = replace(said, ended=time.time(), exit_code=exit_code, stage=stage, why=why)
        try:
            _write(folder, done)
        except OSError as error:
            log.warning("%s: %s; status will not say why it ended", folder, error)


def read(folder: Path) -> LastCommand | None:
    """The last command on the run in `folder`; None if nothing is known of one."""
    try:
        return LastCommand(**json.loads((folder / "command.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def lines(folder: Path, goes_on: bool | None) -> list[str]:
    """How the last command ended if it did not do all; nothing while it goes on.

    `goes_on`: whether a cluster has jobs of the run or someone who submits them; None if unknown.
    """
    said = read(folder)
    if said is None or said.exit_code == 0:
        return []
    if not said.is_open:
        where = f" at {said.stage}" if said.stage else ""
        when = _clock(said.ended or 0)
        words = f"the run stopped{where} ({when}, exit code {said.exit_code}): {said.why}"
        return [words, f"to go on: {said.again(folder)}"]
    alive = lives(said.process)
    if alive or (said.on == "slurm" and goes_on is not False):
        return []
    who = f"`{said.name}`, process {said.process['pid']} on {said.process['host']}"
    since = f"begun {_clock(said.began)}"
    if said.on == "local" and alive is None:
        return [f"{who}, {since}: whether it goes on is seen there only"]
    how = "was killed"
    if said.on == "slurm":
        how += f", or its last job was; {files.shown(folder)}/slurm/driver.log may say more"
    return [
        f"the run stopped, and nobody has recorded why: {who}, {since}, {how}",
        f"to go on: {said.again(folder)}",
    ]


def _end_own(run: Run, error: BaseException | None) -> None:
    said = read(run.folder)
    if said is None or said.process != this_process():
        return
    if error is None:
        end(run.folder, "", "", 0)
    elif isinstance(error, Stopped):
        end(run.folder, run.at, f"stopped by {error}", EXIT_STOPPED)
    elif isinstance(error, UserError):
        end(run.folder, run.at, str(error), error.exit_code)
    else:
        end(run.folder, run.at, f"{type(error).__name__}: {error}", 1)


def _write(folder: Path, said: LastCommand) -> None:
    path = folder / "command.json"
    data = json.dumps(asdict(said), ensure_ascii=False).encode().ljust(_BYTES)
    try:
        files.write_atomic(path, data)
    except OSError as error:
        if not files.is_full(error) or not path.exists():
            raise
        with path.open("r+b") as stream:
            stream.write(data)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

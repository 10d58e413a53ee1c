"""The processes that train one model on this machine: started, stopped, watched, ended together.

Where torchrun or srun started this process already, it joins theirs. Nothing here loads torch.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.config import ConfigError, MissingInput, UserError
from pipeline.lock import RunInUse, RunLock, refuse_others
from pipeline.stage import Attempt
from pipeline.stats import Stats
from pipeline.stop import DUMP, EXIT_STOPPED, Stopped, shielded
from train.guard import TrainingDiverged
from train.settings import TrainSettings
from train.watchdog import Beat, Hung, Watch, beat_path

log = logging.getLogger(__name__)

_POLL_S = 0.1
_LAST_WORDS_S = 5.0
"""How long the other ranks may take to end by themselves when one has failed."""
_STACKS_S = 2.0
"""How long ranks that hang may take to write down where they are."""
_TRAINERS_BEAT_S = 15.0
"""One who writes checkpoints and does not beat for so long may be dead: the trainer makes sure."""
_BEAT_S = 1.0
"""Between beats of the lock, and so the time after which a second command is refused."""


class RankFailed(UserError):
    """One of the processes that train together ended with an error, or was killed."""


@dataclass(frozen=True)
class Place:
    """Which of the processes of a run this one is."""

    rank: int
    world: int
    local_rank: int
    """Its number on this machine."""


def place(environ: Mapping[str, str]) -> Place | None:
    """As torchrun, srun or `train` here put it into the environment; None if none of them did."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank = int(environ["RANK"])
        return Place(rank, int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", rank)))
    # SLURM_NTASKS is also set in the batch script, of which there is one; the step's is not.
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        rank, world = int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"])
        return Place(rank, world, int(environ.get("SLURM_LOCALID", 0)))
    return None


@contextmanager
def only_training(folder: Path) -> Iterator[None]:
    """While it lasts, no other command trains in the stage's `folder`, nor does one now.

    Commands that torchrun or srun started together count as one. Raises `pipeline.lock.RunInUse`.
    """
    path = folder / "lock.json"
    job = _job(os.environ)
    here = place(os.environ)
    if here is not None and here.rank > 0:
        refuse_others(path, job)
        yield
        return
    lock = RunLock(path, beat_s=_BEAT_S, job=job)
    try:
        _refuse_writers(folder)
        yield
    finally:
        lock.release()


def refuse_trainers(folder: Path) -> None:
    """Raise `pipeline.lock.RunInUse` if a command, or a job of a cluster, trains in `folder`."""
    refuse_others(folder / "lock.json", job="")
    _refuse_writers(folder)


def _refuse_writers(folder: Path) -> None:
    """Raise `RunInUse` if somebody writes checkpoints: a job of a cluster has no other lock."""
    path = folder / "checkpoints" / "lock.json"
    refuse_others(path, job="nobody's", stale_s=_TRAINERS_BEAT_S)


def _job(environ: Mapping[str, str]) -> str:
    """What the processes that torchrun or srun started together have in common."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(environ.get(name, "") for name in names)


def train(attempt: Attempt) -> Stats:
    """Train in as many processes as `train.processes` says, or in those that were started."""
    settings: TrainSettings = attempt.settings
    if place(os.environ) is None and (count := processes(settings)) > 1:
        return _Ranks(attempt, count).train()
    from train.loop import train

    return train(attempt)


def processes(settings: TrainSettings) -> int:
    """How many will train together. Raises `ConfigError` if they cannot share the batch."""
    if (here := place(os.environ)) is not None:
        count = here.world
    elif settings.processes == "auto":
        count = max(1, visible_gpus())
    else:
        count = settings.processes
    if said := settings.misfit(count):
        raise ConfigError(f"train.data.lanes: {said}")
    return count


@cache
def visible_gpus() -> int:
    """How many GPUs torch finds; asked in another process, this one needs no torch."""
    devices = ("nvidia[0-9]*", "kfd", "dxg")  # of NVIDIA, of AMD, of Windows
    if not any(next(Path("/dev").glob(name), None) for name in devices):
        return 0
    code = "import torch; print(torch.cuda.device_count())"
    command = [sys.executable, "-c", code]
    with shielded():
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def free_port() -> int:
    """A port of this machine that nobody listens on, and that no connection is given by chance."""
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
        ephemeral = int(text.split()[0])
    except OSError:
        ephemeral = 32_768
    for port in random.sample(range(10_000, max(ephemeral, 10_100)), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RankFailed("100 ports between 10000 and the ephemeral range are all taken")


def end_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves its statistics, its error, or what stopped it, as JSON."""
    return folder / f"end-{rank:05d}.json"


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path
    beat: Path
    end: Path
    told: bool = False
    """Whether it was told to stop."""


class _Ranks:
    def __init__(self, attempt: Attempt, count: int) -> None:
        self._attempt = attempt
        self._count = count
        folder = attempt.run.stage_folder("train")
        self._logs = folder / "logs"
        self._hearts = folder / "heartbeats"
        shutil.rmtree(self._hearts, ignore_errors=True)
        for path in (self._logs, self._hearts):
            path.mkdir(parents=True, exist_ok=True)
        self._ranks: list[_Rank] = []
        self._watch = Watch(self._hearts, count, attempt.settings.hang_timeout_s)

    def train(self) -> Stats:
        """Start all and see them to their end; none outlives this call."""
        port = free_port()
        try:
            for rank in range(self._count):
                self._ranks.append(self._start(rank, port))
            log.info("training in %d processes; logs: %s", self._count, self._ranks[0].log)
            while any(rank.process.poll() is None for rank in self._ranks):
                time.sleep(_POLL_S)
                if self._attempt.stop:
                    self._pass_on_the_stop()
                if failed := self._failed():
                    self._raise_first_of(failed)
                if said := self._watch.look():
                    self._dump_stacks()
                    raise Hung(f"{said}; stacks: {self._logs}/*-rank-*.log")
            if failed := self._failed():
                self._raise_first_of(failed)
        finally:
            self._end_all()
        said = json.loads(self._ranks[0].end.read_text())
        if self._ranks[0].process.returncode == EXIT_STOPPED:
            raise Stopped(said["stopped"])
        return Stats.from_json(said["stats"])

    def _start(self, rank: int, port: int) -> _Rank:
        path = self._logs / f"{self._attempt.task.index:05d}-rank-{rank}.log"
        environ = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._count),
            "LOCAL_WORLD_SIZE": str(self._count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OPENWIT_PARENT": str(os.getpid()),
        }
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it asks for the host's address
        with path.open("ab") as stream, shielded():
            # In this process's group and session: its limits and its end are theirs.
            process = subprocess.Popen(
                [sys.executable, "-m", "train.rank"],
                cwd=Path(__file__).parent.parent,
                env=environ,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
            )
        assert process.stdin is not None
        try:
            process.stdin.write(pickle.dumps(self._attempt))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it is gone already, as its exit code will tell
        beat, end = beat_path(self._hearts, rank), end_path(self._hearts, rank)
        return _Rank(rank, process, path, beat, end)

    def _pass_on_the_stop(self) -> None:
        """To the ranks alone, by process: their own children are theirs to end."""
        for rank in self._ranks:
            # One without a beat has no handler yet and would die of it.
            if not rank.told and rank.process.poll() is None and Beat.read(rank.beat).pid:
                rank.process.send_signal(signal.SIGTERM)
                rank.told = True

    def _failed(self) -> list[_Rank]:
        return [r for r in self._ranks if r.process.poll() not in (None, 0, EXIT_STOPPED)]

    def _raise_first_of(self, failed: Sequence[_Rank]) -> None:
        """Raise the error that came first; those of the others follow from it."""
        until = time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < until and len(failed) < self._count:
            time.sleep(_POLL_S)
            failed = self._failed()
        first = min(failed, key=_came_first)
        code = first.process.returncode
        if code < 0:
            error: UserError = RankFailed(_said(first, f"killed by {signal.Signals(-code).name}"))
        else:
            error = _error(first, code)
        log.error("the last lines of %s:\n%s", first.log, _tail(first.log))
        raise error

    def _dump_stacks(self) -> None:
        for rank in self._ranks:
            if rank.process.poll() is None and Beat.read(rank.beat).pid:
                rank.process.send_signal(DUMP)
        time.sleep(_STACKS_S)

    def _end_all(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()


def _came_first(rank: _Rank) -> tuple[bool, float]:
    """Who was killed could not say when; the errors of the others are then its doing."""
    return rank.process.returncode >= 0, Beat.read(rank.beat).failed_at or float("inf")


def _error(rank: _Rank, code: int) -> UserError:
    """The error that a rank ended with, so that it is treated as if it had been raised here."""
    try:
        message = str(json.loads(rank.end.read_text())["error"])
    except (OSError, ValueError, KeyError):
        message = f"exit code {code}"
    for kind in (ConfigError, MissingInput, TrainingDiverged, RunInUse):
        if kind.exit_code == code:
            return kind(message)
    return RankFailed(_said(rank, message))


def _said(rank: _Rank, what: str) -> str:
    return f"rank {rank.number}: {what}; log: {rank.log}"


def _tail(path: Path, lines: int = 20) -> str:
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 8192))
        return "\n".join(stream.read().decode(errors="replace").splitlines()[-lines:])

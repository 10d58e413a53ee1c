"""Notices that training hangs, and says which process is to blame.

Every process keeps a few bytes in a file that is mapped into memory: where its training thread is,
and a pulse that another of its threads raises. Processes that wait in a collective for one that is
stuck stand further on than it does; one that was stopped has no pulse. Nothing here loads torch.
"""

from __future__ import annotations

import faulthandler
import logging
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType

from pipeline.config import UserError
from pipeline.stop import DUMP

log = logging.getLogger(__name__)

PATIENCE = 6
"""How many times longer than a step its first one may take, which compiles, and a save or load."""
_RECORD = struct.Struct("<6qd")
_STDERR = 2


class Hung(UserError):
    """Training stood still; another attempt goes on from the last checkpoint."""

    exit_code = 7


class Phase(IntEnum):
    """Where in a step a process is, in the order in which it passes them."""

    START = 0
    DATA = 1
    COMPUTE = 2
    REDUCE = 3
    SAVE = 4
    WAIT = 5

    @property
    def label(self) -> str:
        """For people."""
        return _LABELS[self]


_LABELS = ("start", "data", "forward+backward", "reduce", "checkpoint", "waiting for the others")


@dataclass(frozen=True)
class Beat:
    """What a process last said of itself."""

    pid: int = 0
    """0 until it can receive signals."""
    lap: int = 0
    """Steps begun by this process. It only rises, while a rewind lowers `step`."""
    phase: Phase = Phase.START
    step: int = 0
    pulse: int = 0
    failed_at: float = 0.0
    """Unix time, seconds, at which an error ended its training; 0 if none did."""

    @classmethod
    def read(cls, path: Path) -> Beat:
        """The beat in a file, a fresh one if there is none."""
        try:
            values = _RECORD.unpack(path.read_bytes()[: _RECORD.size])
        except (FileNotFoundError, struct.error):
            return cls()
        pid, lap, phase, step, pulse, _, failed_at = values
        return cls(pid, lap, Phase(phase), step, pulse, failed_at)


def beat_path(folder: Path, rank: int) -> Path:
    """The file of a rank's heart."""
    return folder / f"rank-{rank:05d}"


class Heart:
    """Tells the watching process where this one is; from then on SIGUSR1 dumps all stacks."""

    def __init__(self, folder: Path, rank: int, timeout_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._timeout_s = timeout_s
        self._pulse_s = min(1.0, timeout_s / 10)
        path = beat_path(folder, rank)
        path.write_bytes(bytes(_RECORD.size))
        with path.open("r+b") as stream:
            self._memory = mmap.mmap(stream.fileno(), _RECORD.size)
        self._lap = self._phase = self._step = self._pulse = 0
        self._failed_at = 0.0
        self._watch: Watch | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heart", daemon=True)

    def __enter__(self) -> Heart:
        faulthandler.register(DUMP, file=_STDERR, all_threads=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (DUMP,))
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is not None:
            self._failed_at = time.time()
            self._write()

    def enter(self, phase: Phase, step: int) -> None:
        """The training thread begins a phase of a step. Microseconds."""
        self._lap += phase is Phase.DATA
        self._phase, self._step = phase, step
        self._write()

    def watch(self, world: int) -> None:
        """Watch all processes from here: when they hang, dump the stacks and end this one."""
        self._watch = Watch(self._folder, world, self._timeout_s)

    def _write(self) -> None:
        values = (self._lap, self._phase, self._step, self._pulse, 0, self._failed_at)
        _RECORD.pack_into(self._memory, 0, os.getpid(), *values)

    def _live(self) -> None:
        while not self._over.wait(self._pulse_s):
            self._pulse += 1
            self._write()
            self._memory.flush()  # to the shared disk, where other machines read it
            if self._watch and (said := self._watch.look()):
                faulthandler.dump_traceback(file=_STDERR, all_threads=True)
                log.error("%s", said)
                os._exit(Hung.exit_code)


class Watch:
    """Looks at all hearts of a run, again and again, and judges by its own clock alone."""

    def __init__(self, folder: Path, world: int, timeout_s: float) -> None:
        self._paths = [beat_path(folder, rank) for rank in range(world)]
        self._timeout_s = timeout_s
        now = time.monotonic()
        self._beats = [Beat()] * world
        self._moved = [now] * world
        self._pulsed = [now] * world

    def look(self) -> str | None:
        """None while training moves, else what hangs where."""
        return self.judge([Beat.read(path) for path in self._paths], time.monotonic())

    def judge(self, beats: Sequence[Beat], now: float) -> str | None:
        """As `look`, of beats that were read at `now`, seconds."""
        for rank, (old, new) in enumerate(zip(self._beats, beats, strict=True)):
            if _place(old) != _place(new):
                self._moved[rank] = now
            if old.pulse != new.pulse:
                self._pulsed[rank] = now
        self._beats = list(beats)
        slow = any(beat.lap <= 1 or beat.phase in (Phase.SAVE, Phase.WAIT) for beat in beats)
        stood_s = now - max(self._moved)
        if stood_s < self._timeout_s * (PATIENCE if slow else 1):
            return None
        ranks = range(len(beats))
        stuck = [rank for rank in ranks if now - self._pulsed[rank] > self._timeout_s / 2]
        if stuck:
            why = "its process is stopped or gone"
        else:
            behind = min(_place(beat) for beat in beats)
            stuck = [rank for rank in ranks if _place(beats[rank]) == behind]
            why = "it is behind the others" if len(stuck) < len(beats) else "no one is behind it"
        said = [f"training hangs: nothing has moved for {stood_s:.0f} s"]
        said += [f"rank {rank} is stuck in {_where(beats[rank])}: {why}" for rank in stuck]
        said += [
            f"rank {rank} waits in {_where(beats[rank])}" for rank in ranks if rank not in stuck
        ]
        return "; ".join(said)


def _place(beat: Beat) -> tuple[int, int]:
    return beat.lap, beat.phase


def _where(beat: Beat) -> str:
    return f"{beat.phase.label} of step {beat.step} (pid {beat.pid})"

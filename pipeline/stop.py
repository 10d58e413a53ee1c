"""A signal becomes a flag, read at safe points; who stops that way exits with 75."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75
"""Saved, run me again (EX_TEMPFAIL of sysexits.h)."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
DUMP = signal.SIGUSR1
"""Has training write down where it is."""


class Stopped(Exception):
    """Raised at a safe point after a stop was asked for; nothing is lost. It says by what."""


class StopFlag:
    """Truthy once SIGINT, SIGTERM or SIGUSR2 arrived in the process that installed it.

    A forked child that inherits the handlers ignores the signals: its parent decides.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._owner = os.getpid()

    def install(self) -> StopFlag:
        """Take over the three signals. A second SIGINT ends the process at once."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # where this one was started shielded
        return self

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """The signal's; where none has come, another process that works on the same has got it."""
        if self.signal is None:
            return "a signal to another process"
        return signal.Signals(self.signal).name

    def check(self) -> None:
        """Raise `Stopped` if a stop was asked for. Call where it is safe to end."""
        if self.signal is not None:
            raise Stopped(self.name)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.signal = number


@contextmanager
def shielded() -> Iterator[None]:
    """What is started in here, processes and threads, has the signals blocked, for good.

    SLURM signals every process of a job's step, a terminal every process of its group. Those
    started in here do not die of that: who started them ends them, by word or by SIGKILL. Masks
    survive exec, handlers do not. A process that installs a `StopFlag` receives signals again, also
    those that came before.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, DUMP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

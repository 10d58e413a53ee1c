"""LocalExecutor: every task in its own supervised process on this machine.

A process that exceeds its wall time or memory is killed; one that dies, of whatever, is tried
again. Nothing waits for a process that is gone: there is no pool, only children that are polled.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from pipeline.config import Settings
from pipeline.executor import NEVER_RETRIED, Ended, Outcome
from pipeline.manifest import find
from pipeline.stage import Planned, Run, Stage
from pipeline.stop import EXIT_STOPPED, StopFlag, shielded

log = logging.getLogger(__name__)

_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Tasks run where the command runs: relative paths and users' own modules mean the same in both.
_IMPORTED_FROM = str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")
_STAMP = re.compile(r"^error: \S+Z ")  # as pipeline.log writes it
_HELD = re.compile(r"^(RssAnon|RssShmem):\s*(\d+) kB", re.MULTILINE)  # proc_pid_status(5)


class LocalSettings(Settings):
    """How tasks run on this machine."""

    workers: int = Field(default=0, ge=0)
    """Tasks at the same time; 0: one a core."""
    wall_limit_s: float = Field(default=6 * 3600, gt=0)
    """A task that takes longer is killed and tried again; training may take any time."""
    memory_gb: float = Field(default=16, gt=0)
    """A task whose processes together hold more is killed and tried again, GiB; training may hold
    any."""
    attempts: int = Field(default=3, ge=1)
    """Tries of a task before it counts as failed."""
    grace_s: float = Field(default=120, gt=0)
    """After a stop was asked for, how long a task may take to reach a safe point."""


@dataclass
class _Child:
    planned: Planned
    attempt: int
    process: subprocess.Popen[bytes]
    log: Path
    deadline: float
    memory_gb: float
    killed: str = ""


class LocalExecutor:
    """Runs tasks in processes of this machine, `workers` at a time.

    `command` starts one attempt; run folder, stage, index, fingerprint and attempt number follow.
    `first_attempt` is that number for a task's first try here, if others were made elsewhere.
    `more_memory` says how to give a task more than it was killed for, if not by `local`.
    """

    def __init__(
        self,
        settings: LocalSettings,
        stop: StopFlag,
        command: Sequence[str] = (sys.executable, "-m", "pipeline", "task"),
        first_attempt: int = 1,
        more_memory: str = "",
    ) -> None:
        self.settings = settings
        self.stop = stop
        self.command = command
        self.first_attempt = first_attempt
        self.more_memory = more_memory

    def submit(self, run: Run, stage: Stage, tasks: Sequence[Planned]) -> Iterator[Outcome | None]:
        """See `pipeline.executor.Executor.submit`."""
        with stage.service(run) as environment:
            yield from self._run(run, stage, tasks, environment)

    def _run(
        self, run: Run, stage: Stage, tasks: Sequence[Planned], environment: Mapping[str, str]
    ) -> Iterator[Outcome | None]:
        waiting = deque((planned, self.first_attempt) for planned in tasks)
        children: list[_Child] = []
        workers = self.settings.workers or os.cpu_count() or 1
        stopping = False
        try:
            while waiting or children:
                if self.stop and not stopping:
                    stopping = True
                    self._ask_to_stop(children)
                while waiting and not stopping and len(children) < workers:
                    planned, attempt = waiting.popleft()
                    children.append(self._start(run, stage, planned, attempt, environment))
                if stopping and not children:
                    for planned, _ in waiting:
                        yield Outcome(planned.task, Ended.STOPPED)
                    return
                time.sleep(_POLL_S)
                for child in list(children):
                    self._hold_to_limits(child)
                    if (code := child.process.poll()) is None:
                        continue
                    children.remove(child)
                    outcome = self._judge(run, child, code)
                    may_retry = code not in NEVER_RETRIED and not stopping
                    if (
                        outcome.ended is Ended.FAILED
                        and may_retry
                        and child.attempt < self.settings.attempts
                    ):
                        log.warning(
                            "%s task %d: %s; trying again (attempt %d of %d); log: %s",
                            *(stage.name, outcome.task.index, outcome.reason),
                            *(child.attempt + 1, self.settings.attempts, child.log),
                        )
                        waiting.append((child.planned, child.attempt + 1))
                    else:
                        yield outcome
                yield None
        finally:
            for child in children:
                _kill(child.process)

    def _start(
        self,
        run: Run,
        stage: Stage,
        planned: Planned,
        attempt: int,
        environment: Mapping[str, str],
    ) -> _Child:
        task = planned.task
        path = run.stage_folder(task.stage) / "logs" / f"{task.index:05d}.log"
        command = [*self.command, str(run.folder), task.stage, str(task.index)]
        command += [planned.fingerprint, str(attempt)]
        # A signal that comes before the task's own flag is installed waits for it.
        with path.open("ab") as stream, shielded():
            process = subprocess.Popen(
                command,
                env={
                    **os.environ,
                    **environment,
                    "OPENWIT_PARENT": str(os.getpid()),
                    "PYTHONPATH": os.pathsep.join(filter(None, _IMPORTED_FROM)),
                },
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # Ctrl-C reaches this process only, which passes it on
            )
        limits = self.settings.wall_limit_s, self.settings.memory_gb
        seconds, memory_gb = limits if not stage.spans_nodes else (math.inf, math.inf)
        return _Child(planned, attempt, process, path, time.monotonic() + seconds, memory_gb)

    def _ask_to_stop(self, children: Sequence[_Child]) -> None:
        if children:
            log.info("stopping at a safe point, within %g s", self.settings.grace_s)
        for child in children:
            child.process.send_signal(signal.SIGTERM)
            child.deadline = min(child.deadline, time.monotonic() + self.settings.grace_s)

    def _hold_to_limits(self, child: _Child) -> None:
        if child.killed:
            return
        if time.monotonic() > child.deadline:
            child.killed = f"killed at its wall limit of {self.settings.wall_limit_s:g} s"
        elif (held := resident_bytes(child.process.pid)) > child.memory_gb * 2**30:
            limit = child.memory_gb
            child.killed = (
                f"killed for memory at {held / 2**30:.3g} GiB, its memory limit is {limit:.4g} GiB;"
                f" {self.more_memory or 'raise local.memory_gb'}"
            )
        if child.killed:
            _kill(child.process)

    def _judge(self, run: Run, child: _Child, code: int) -> Outcome:
        """The manifest decides, not the exit code: a process may die after it has published."""
        task = child.planned.task
        folder = run.stage_folder(task.stage)
        (folder / "live" / f"{task.index:05d}.json").unlink(missing_ok=True)
        if find(folder, child.planned.fingerprint):
            return Outcome(task, Ended.DONE)
        if code == EXIT_STOPPED or (self.stop and code < 0):
            return Outcome(task, Ended.STOPPED)
        reason = child.killed
        if not reason and code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                remedy = self.more_memory or "lower local.workers"
                reason += f", as the kernel does where memory runs out: {remedy}"
        if not reason:
            reason = _last_words(child.log) or f"exit code {code}"
        return Outcome(task, Ended.FAILED, reason, child.log, code)


def resident_bytes(pid: int) -> int:
    """Memory of a session that the kernel cannot take back: of the process that leads it and all
    its descendants there. Pages of mapped files are a cache, here as for a cgroup's limit."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == pid:  # session, field 6 of proc_pid_stat(5)
                held = dict(_HELD.findall((entry / "status").read_text()))
                total += sum(int(kib) << 10 for kib in held.values())
        except (OSError, IndexError):
            continue  # it ended while we looked
    return total


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if (parent := os.environ.get("OPENWIT_PARENT")) and os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)  # it died before the line above


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _last_words(path: Path) -> str:
    """The last line of a log, without its time: the exception, if one ended the process."""
    with path.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - 4096))
        lines = stream.read().decode(errors="replace").strip().splitlines()
    return _STAMP.sub("", lines[-1])[:300] if lines else ""

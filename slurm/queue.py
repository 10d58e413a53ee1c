"""What SLURM is asked: one squeue for all jobs of a user, and how a few jobs ended.

Neither says whether a task is done: that is on disk. Nothing asks sacct, which lags, and which a
cluster may not have.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import UserError

_FORMAT = "%F|%K|%T|%r|%j"  # job of the array, index in it, state, reason, name
_TIMEOUT_S = 120


class QueueUnknown(UserError):
    """SLURM's commands are missing, or the controller does not answer."""


@dataclass(frozen=True)
class Queued:
    """A job, or one element of an array, that has not ended."""

    job: str
    """Its number; of an array, that of the whole."""
    index: int
    """Its place in the array; 0 if it is none."""
    state: str
    """PENDING, RUNNING, COMPLETING …"""
    reason: str
    """Why it waits, in SLURM's words."""


def read() -> dict[str, list[Queued]]:
    """Everything of this user that has not ended, by job name: one call of squeue."""
    user = str(os.getuid())
    command = ["squeue", "--noheader", "--array", f"--user={user}", f"--format={_FORMAT}"]
    found: dict[str, list[Queued]] = {}
    for line in output(command).splitlines():
        job, index, state, reason, name = line.strip().split("|", 4)
        number = int(index) if index.isdigit() else 0
        found.setdefault(name, []).append(Queued(job, number, state, reason))
    return found


class Queue:
    """The queue as a driver knows it: as it was when last asked, and what was submitted since.

    A job that has left meanwhile still counts as queued, so nothing is taken for ended too soon.
    """

    def __init__(self, every_s: float, *, is_empty: bool) -> None:
        """`every_s`: seconds between two calls of squeue at least. `is_empty`: nothing is with
        SLURM yet, so there is nothing to ask."""
        self.every_s = every_s
        self._asked = time.monotonic() if is_empty else -float("inf")
        self._jobs: dict[str, list[Queued]] = {}

    @property
    def due_s(self) -> float:
        """Seconds until SLURM is asked again."""
        return self._asked + self.every_s - time.monotonic()

    def jobs(self) -> Mapping[str, Sequence[Queued]]:
        """What has not ended, by job name."""
        if self.due_s <= 0:
            self._asked = time.monotonic()
            self._jobs = read()
        return self._jobs

    def add(self, name: str, job: str, count: int = 1) -> None:
        """Know of a job that was submitted just now, or an array of `count`."""
        self._jobs[name] = [Queued(job, index, "PENDING", "") for index in range(count)]


@dataclass(frozen=True)
class End:
    """How a job, or one element of an array, ended."""

    state: str = ""
    """COMPLETED, FAILED, OUT_OF_MEMORY …; empty if SLURM has forgotten."""
    code: str = ""
    """`code:signal`."""
    memory: str = ""
    """What it might hold, in SLURM's words: `2G a node`."""


def ends(job: str) -> dict[int, End]:
    """How each element of a job ended, as far as SLURM remembers.

    It forgets them after MinJobAge, five minutes unless the cluster's administrators say otherwise.
    """
    try:
        text = output(["scontrol", "show", "job", "--oneliner", job])
    except QueueUnknown:
        return {}
    found = {}
    for line in text.splitlines():
        fields: Mapping[str, str] = dict(re.findall(r"(\w+)=(\S*)", line))
        if "JobState" not in fields:
            continue
        end = End(fields["JobState"], fields.get("ExitCode", ""), _memory(fields))
        for index in _indices(fields.get("ArrayTaskId", "0")):
            found[index] = end
    return found


def _memory(fields: Mapping[str, str]) -> str:
    for name, each in (("MinMemoryNode", "node"), ("MinMemoryCPU", "core")):
        if (asked := fields.get(name, "0")) != "0":  # 0: the whole node's
            return f"{asked} a {each}"
    return ""


def cancel(jobs: Sequence[str]) -> None:
    """End jobs, waiting or running; those that have ended already are no matter."""
    if jobs:
        _run(["scancel", "--quiet", *jobs])


def _indices(text: str) -> list[int]:
    """`7` or, of elements that never started, `0-3,9%2`."""
    found: list[int] = []
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found += range(int(first), int(last or first) + 1)
    return found


def output(command: Sequence[str]) -> str:
    """What one of SLURM's commands prints; raises `QueueUnknown` if it fails."""
    done = _run(command)
    if done.returncode:
        raise QueueUnknown(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise QueueUnknown(
            f"{command[0]} is not there: this is no machine of a SLURM cluster; run this on a login"
            " node, or with ON=local"
        ) from None
    except subprocess.TimeoutExpired:
        raise QueueUnknown(f"{command[0]} gave no answer within {_TIMEOUT_S} s") from None

"""What runs tasks, and what it tells of them: on this machine, as jobs of a cluster, in a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from pipeline.stage import Planned, Run, Stage, Task

NEVER_RETRIED = (2, 3, 5, 9)
"""Exit codes of `ConfigError`, `MissingInput` and `BadInput`, `TrainingDiverged`, `RunInUse`: one
more try cannot help."""


class Ended(Enum):
    """How a task left an executor."""

    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Outcome:
    """What became of one task, with the place to look if it failed."""

    task: Task
    ended: Ended
    reason: str = ""
    log: Path | None = None
    exit_code: int = 0


class HandedOver(Exception):
    """The rest is submitted and goes on by itself; the message says how to watch it."""


class Executor(Protocol):
    """Runs tasks somewhere; the seam where a cluster, or a test, plugs in."""

    def submit(self, run: Run, stage: Stage, tasks: Sequence[Planned]) -> Iterator[Outcome | None]:
        """Run `tasks`, yielding an outcome for each as it ends, and None now and then meanwhile.

        `stage.service` is entered where the tasks run. After a stop was asked for, the rest of the
        tasks end as `Ended.STOPPED`. Raises `HandedOver` if the tasks outlive this process.
        """
        ...

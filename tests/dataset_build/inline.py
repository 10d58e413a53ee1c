"""An executor that works in the test's own process, and remembers what it ran."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from unittest import mock

from pipeline import runner
from pipeline.executor import Ended, Outcome
from pipeline.stage import Planned, Run, Stage, Task
from pipeline.stop import StopFlag


class InlineExecutor:
    def __init__(self) -> None:
        self.ran: list[Task] = []

    def submit(self, run: Run, stage: Stage, tasks: Sequence[Planned]) -> Iterator[Outcome | None]:
        for planned in tasks:
            with stage.service(run) as environment, mock.patch.dict(os.environ, environment):
                # As in a process of its own: a Run remembers what it found published.
                runner.work_on(Run(run.folder, run.config), stage, planned, 1, StopFlag())
            self.ran.append(planned.task)
            if self._left is not None and stage.name == self._last:
                self._left -= 1
                if not self._left:
                    raise KeyboardInterrupt
            yield Outcome(planned.task, Ended.DONE)

    def advance(self, run: Run, stages: Sequence[Stage], stop_after: int | None = None) -> None:
        """`stop_after`: break off when the last stage has done so many tasks."""
        self._last, self._left = stages[-1].name, stop_after
        runner.advance(run, stages, self, StopFlag(), runner.Unwatched())

"""SlurmExecutor: what is missing becomes job arrays; what became of them is read from the disk.

It hands over once all that can be submitted is: a small job, the continuation, starts when the
arrays have ended and calls the same command again. Or, with `waits`, it looks at disk and queue now
and then until the stage is done.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from pipeline import files
from pipeline.executor import NEVER_RETRIED, Ended, HandedOver, Outcome
from pipeline.manifest import everything, find
from pipeline.stage import Planned, Run, Stage
from pipeline.stop import StopFlag, Stopped
from slurm import batches, following, training
from slurm.batches import Batch, Entry, Failure
from slurm.driver import Driver
from slurm.submission import parameters_of, submit

log = logging.getLogger(__name__)


class SlurmExecutor:
    """Runs tasks as jobs of a SLURM cluster, for the driver that holds the run."""

    def __init__(self, driver: Driver, stop: StopFlag) -> None:
        self.driver = driver
        self.settings = driver.settings
        self.stop = stop

    def submit(self, run: Run, stage: Stage, tasks: Sequence[Planned]) -> Iterator[Outcome | None]:
        """See `pipeline.executor.Executor.submit`."""
        left = list(tasks)
        resources = self.settings.resources(stage.name)
        stage.nodes(run, training.processes_per_node(resources))  # raises if they will not do
        while True:
            queued = self.driver.queue.jobs()  # before the disk: who has left it has published
            settled = list(batches.settle(run.folder, queued))
            for planned in list(left):
                if find(run.stage_folder(stage.name), planned.fingerprint):
                    left.remove(planned)
                    yield Outcome(planned.task, Ended.DONE)
            live = [batch for batch in settled if not batch.has_ended]
            for batch in live:
                self._adopt(batch)
            history = _History(self.driver.drive, settled)
            running = {e.fingerprint for batch in live for chunk in batch.chunks for e in chunk}
            ready: list[tuple[Planned, int]] = []
            for planned in list(left):
                if planned.fingerprint in running:
                    continue
                attempt, failure = history.of(planned.fingerprint)
                if failure and (attempt > self.settings.attempts or is_final(failure)):
                    left.remove(planned)
                    yield _failed(planned, failure)
                else:
                    ready.append((planned, attempt))
            if history.cancelled and not live:
                raise Stopped(f"scancel, which ended jobs of {', '.join(history.cancelled)}")
            if not history.cancelled:
                elements = sum(len(queued[batch.name]) for batch in live)
                live += self._submit(run, stage, ready, history, elements)
            if not left or not live:
                return
            if command := stage.follower(run):
                self._have_followed(live[-1], command)
            if not self.driver.waits:
                job = self.driver.go_on_after([b.job for b in live if b.job], queued)
                raise HandedOver(_words(run, stage, live, job))
            yield from self._pause(run.stage_folder(stage.name), left)

    def _have_followed(self, batch: Batch, command: Sequence[str]) -> None:
        submitted = following.see_to_it(
            batch,
            command,
            settings=self.settings,
            program=self.driver.program,
            code=self.driver.code,
            queued=self.driver.queue.jobs(),
            goes_on=not self.driver.waits,
        )
        if submitted:
            self.driver.queue.add(*submitted)

    def _adopt(self, batch: Batch) -> None:
        """Count what becomes of an earlier command's jobs among this one's."""
        if batch.drive != self.driver.drive:
            batch.drive = self.driver.drive
            batch.write()

    def _submit(
        self,
        run: Run,
        stage: Stage,
        ready: Sequence[tuple[Planned, int]],
        history: _History,
        elements: int,
    ) -> list[Batch]:
        """Submit what the queue has room for, as arrays."""
        room = self.settings.max_submitted - elements
        chunks = islice(self._chunks(run, stage, ready, history), max(0, room))
        submitted = []
        while part := list(islice(chunks, self.settings.max_array)):
            self.stop.check()
            folder = run.folder / "slurm"
            batch = batches.intend(folder, stage.name, self.driver.drive, part)
            arguments = ["chunk", str(run.folder), str(batch.path)]
            resources, options = self.settings.resources(stage.name), {}
            if stage.spans_nodes:
                parameters = parameters_of(self.settings, resources)
                options = training.options(parameters, resources, run, stage, batch)
            try:
                batch.job = submit(
                    [[*arguments, str(number)] for number in range(len(part))],
                    settings=self.settings,
                    resources=resources,
                    program=self.driver.program,
                    name=batch.name,
                    folder=batch.folder,
                    code=self.driver.code,
                    **options,
                )
            finally:
                if batch.job is None:  # unless it is there nevertheless, which the queue will tell
                    log.error("%s: %d jobs are not submitted", stage.name, len(part))
            batch.write()
            self.driver.queue.add(batch.name, batch.job, len(part))
            submitted.append(batch)
            count = sum(len(chunk) for chunk in part)
            tasks, parts = _count(count, "task"), _count(len(part), "part")
            log.info("%s: job %s has %s in %s", stage.name, batch.job, tasks, parts)
        return submitted

    def _chunks(
        self,
        run: Run,
        stage: Stage,
        ready: Sequence[tuple[Planned, int]],
        history: _History,
    ) -> Iterator[list[Entry]]:
        """Tasks that go into one job. One that took its job along is alone in the next."""
        together: dict[int, list[Entry]] = defaultdict(list)
        for planned, attempt in ready:
            entry = Entry(planned.task.index, planned.fingerprint, attempt)
            _, failure = history.of(planned.fingerprint)
            if failure and failure.exit_code < 0:
                yield [entry]
            else:
                together[attempt].append(entry)
        for entries in together.values():
            size = self._tasks_per_job(run, stage, len(entries))
            for first in range(0, len(entries), size):
                yield entries[first : first + size]

    def _tasks_per_job(self, run: Run, stage: Stage, count: int) -> int:
        if stage.spans_nodes:
            return 1
        if self.settings.tasks_per_job != "auto":
            return self.settings.tasks_per_job
        taken = [m.seconds for m in everything(run.stage_folder(stage.name))]
        cores = self.settings.resources(stage.name).cpus or 1
        fit = 1
        if taken:
            mean_s = max(sum(taken) / len(taken), 0.1)
            fit = max(1, int(self.settings.job_minutes * 60 * cores / mean_s))
        # Not so many that jobs are left idle, nor so few that there are more than the queue takes.
        return max(
            min(fit, math.ceil(count / cores)), math.ceil(count / self.settings.max_submitted)
        )

    def _pause(self, folder: Path, left: Sequence[Planned]) -> Iterator[None]:
        """Wait until SLURM is to be asked again, or the disk shows that all is done."""
        unseen = list(left)
        while (left_s := self.driver.queue.due_s) > 0:
            if self.stop:
                log.info("the jobs go on; the same command watches them again")
                self.stop.check()
            time.sleep(min(left_s, 0.5))
            yield None
            while unseen and find(folder, unseen[-1].fingerprint):
                unseen.pop()
            if not unseen:
                return


class _History:
    """What became of tasks in the batches of one drive that have ended."""

    def __init__(self, drive: str, settled: Sequence[Batch]) -> None:
        ended = [batch for batch in settled if batch.drive == drive and batch.has_ended]
        self.cancelled = sorted({batch.stage for batch in ended if batch.cancelled})
        """Stages of which somebody has cancelled jobs."""
        self._failed: dict[str, tuple[int, Failure]] = {}
        for batch in ended:
            for entry in (entry for chunk in batch.chunks for entry in chunk):
                if entry.fingerprint in batch.failed:
                    before = self._failed.get(entry.fingerprint, (0, None))[0]
                    if entry.attempt > before:
                        failure = batch.failed[entry.fingerprint]
                        self._failed[entry.fingerprint] = (entry.attempt, failure)

    def of(self, fingerprint: str) -> tuple[int, Failure | None]:
        """Number of a task's next attempt, and how the one before it failed, if there was one."""
        attempt, failure = self._failed.get(fingerprint, (0, None))
        return attempt + 1, failure


def is_final(failure: Failure) -> bool:
    """Whether another attempt cannot help."""
    return failure.exit_code in NEVER_RETRIED


def _failed(planned: Planned, failure: Failure) -> Outcome:
    log = Path(failure.log)
    return Outcome(planned.task, Ended.FAILED, failure.reason, log, failure.exit_code)


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _words(run: Run, stage: Stage, live: Sequence[Batch], job: str) -> str:
    tasks = sum(len(chunk) for batch in live for chunk in batch.chunks)
    arrays = ", ".join(str(batch.job) for batch in live)
    are = "is" if tasks == 1 else "are"
    folder = files.shown(run.folder)
    return (
        f"{stage.name}: {_count(tasks, 'task')} {are} with SLURM in job {arrays};"
        f" job {job} goes on from there."
        f"\nwatch it: make status RUN={folder}"
        f"\nend it:   make cancel RUN={folder}"
    )

"""Watching a run: bars with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from pipeline import status
from pipeline.log import duration
from pipeline.manifest import Manifest
from pipeline.stage import Ended, Outcome, Run, Stage

log = logging.getLogger(__name__)


class _Pace:
    """Rate and time left of one stage, from the share of it that was done since it began."""

    def __init__(self, run: Run, stage: Stage) -> None:
        self.run = run
        self.stage = stage
        self.began = time.monotonic()
        self.first = self._read().fraction

    def _read(self) -> status.StageStatus:
        return status.read_stage(self.run, self.stage.name, self.stage.unit)

    def line(self) -> tuple[float, str]:
        """Share done, and what to say of it."""
        now = self._read()
        elapsed = time.monotonic() - self.began
        gained = now.fraction - self.first
        words = [f"{now.done}/{now.total} tasks"]
        if now.running:
            done = sum(int(beat.get("done") or 0) for beat in now.running)
            unit = now.running[0].get("unit")
            words.append(f"{done:,} {unit} in hand")
            if note := now.running[0].get("note"):
                words.append(str(note))
        if (rows := now.stats.rows_out) and now.seconds:
            words.append(f"{rows / now.seconds:,.0f} {now.unit}/s a task")
        if gained > 0 and elapsed > 2:
            words.append(f"{duration(elapsed * (1 - now.fraction) / gained)} left")
        return now.fraction, ", ".join(words)


class LineProgress:
    """Plain lines: a stage's beginning and end, and at most one line in `every_s` between."""

    def __init__(self, run: Run, every_s: float = 15.0) -> None:
        self.run = run
        self.every_s = every_s
        self._pace: _Pace | None = None
        self._said = 0.0

    def begin(self, stage: Stage, total: int, done: int) -> None:
        """See `pipeline.runner.Watch`."""
        if done < total:
            self._pace = _Pace(self.run, stage)
            self._said = time.monotonic()
            resumed = f", {done} done before" if done else ""
            log.info("%s: %d task%s%s", stage.name, total, "s" * (total != 1), resumed)

    def tick(self, stage: Stage, outcome: Outcome | None) -> None:
        """See `pipeline.runner.Watch`."""
        _say_failure(stage, outcome)
        if self._pace and time.monotonic() - self._said >= self.every_s:
            self._said = time.monotonic()
            log.info("%s: %s", stage.name, self._pace.line()[1])

    def end(self, stage: Stage, manifests: Sequence[Manifest], ran: int) -> None:
        """See `pipeline.runner.Watch`."""
        log.info("%s", _closing(stage, manifests, ran))

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        return None


class BarProgress:
    """A bar a stage, on a terminal."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run = run
        self._bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[words]}"),
            console=console,
        )
        self._ids: dict[str, TaskID] = {}
        self._pace: _Pace | None = None
        self._said = 0.0

    def begin(self, stage: Stage, total: int, done: int) -> None:
        """See `pipeline.runner.Watch`."""
        if stage.name not in self._ids:
            name = f"{stage.name:<11}"
            self._ids[stage.name] = self._bars.add_task(name, total=1.0, words="")
        if done < total:
            self._pace = _Pace(self.run, stage)

    def tick(self, stage: Stage, outcome: Outcome | None) -> None:
        """See `pipeline.runner.Watch`."""
        _say_failure(stage, outcome)
        if self._pace and time.monotonic() - self._said >= 0.5:
            self._said = time.monotonic()
            share, words = self._pace.line()
            self._bars.update(self._ids[stage.name], completed=min(share, 0.99), words=words)

    def end(self, stage: Stage, manifests: Sequence[Manifest], ran: int) -> None:
        """See `pipeline.runner.Watch`."""
        words = _closing(stage, manifests, ran).partition(": ")[2]
        self._bars.update(self._ids[stage.name], completed=1.0, words=words)

    def __enter__(self) -> BarProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bars.stop()


def for_console(run: Run, console: Console) -> LineProgress | BarProgress:
    """Bars if somebody looks at a terminal, else lines."""
    return BarProgress(run, console) if console.is_terminal else LineProgress(run)


def _closing(stage: Stage, manifests: Sequence[Manifest], ran: int) -> str:
    stats = status.total(manifests)
    if not ran:
        return f"{stage.name}: up to date, {stats.rows_out:,} {stage.unit}"
    lost = ", ".join(f"{n:,} {reason}" for reason, n in stats.dropped.most_common(4))
    words = f"{stage.name}: {stats.rows_in:,} in, {stats.rows_out:,} {stage.unit} out"
    return words + (f" (dropped: {lost})" if lost else "")


def _say_failure(stage: Stage, outcome: Outcome | None) -> None:
    if outcome and outcome.ended is Ended.FAILED:
        log.error(
            "%s task %d failed: %s; log: %s",
            *(stage.name, outcome.task.index, outcome.reason, outcome.log),
        )

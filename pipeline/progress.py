"""Watching a run: bars on a terminal, plain lines elsewhere; both say rate and time left."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from pipeline import status
from pipeline.executor import Ended, Outcome
from pipeline.manifest import Manifest
from pipeline.stage import Run, Stage

log = logging.getLogger(__name__)

_WARNINGS = 5  # said at a stage's end
_REASONS = 4  # named in a stage's closing line; the rest are counted together


def _line(run: Run, stage: Stage) -> tuple[float, str]:
    """Share of a stage that is done, and what to say of it."""
    now = status.read_stage(run, stage.name, stage.unit)
    words = [f"{now.done}/{now.total} tasks"] if now.total > 1 else []
    words += [said] if (said := now.now()) else []
    return now.fraction, ", ".join(words)


class LineProgress:
    """Plain lines: a stage's beginning and end, and at most one line in `every_s` between."""

    def __init__(self, run: Run, every_s: float = 15.0) -> None:
        self.run = run
        self.every_s = every_s
        self._said: float | None = None
        """When a line was last said of the stage at work; None while none is."""

    def begin(self, stage: Stage, total: int, done: int) -> None:
        """See `pipeline.runner.Watch`."""
        if done < total:
            self._said = time.monotonic()
            left = total - done
            already = f" ({done} of {total} done)" if done else ""
            log.info("%s: %d task%s%s", stage.name, left, "s" * (left != 1), already)

    def tick(self, stage: Stage, outcome: Outcome | None) -> None:
        """See `pipeline.runner.Watch`."""
        _say_failure(stage, outcome)
        if self._said is not None and time.monotonic() - self._said >= self.every_s:
            self._said = time.monotonic()
            if words := _line(self.run, stage)[1]:
                log.info("%s: %s", stage.name, words)

    def end(self, stage: Stage, manifests: Sequence[Manifest], ran: int) -> None:
        """See `pipeline.runner.Watch`."""
        log.info("%s", _closing(stage, manifests, ran))
        _say_warnings(manifests, ran)

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
        self._said: float | None = None

    def begin(self, stage: Stage, total: int, done: int) -> None:
        """See `pipeline.runner.Watch`."""
        if stage.name not in self._ids:
            name = f"{stage.name:<11}"
            self._ids[stage.name] = self._bars.add_task(name, total=1.0, words="")
        if done < total:
            self._said = 0.0

    def tick(self, stage: Stage, outcome: Outcome | None) -> None:
        """See `pipeline.runner.Watch`."""
        _say_failure(stage, outcome)
        if self._said is not None and time.monotonic() - self._said >= 0.5:
            self._said = time.monotonic()
            share, words = _line(self.run, stage)
            self._bars.update(self._ids[stage.name], completed=min(share, 0.99), words=words)

    def end(self, stage: Stage, manifests: Sequence[Manifest], ran: int) -> None:
        """See `pipeline.runner.Watch`."""
        words = _closing(stage, manifests, ran).partition(": ")[2]
        self._bars.update(self._ids[stage.name], completed=1.0, words=words)
        _say_warnings(manifests, ran)

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
    reasons = stats.dropped.most_common()
    lost = [f"{n:,} {reason}" for reason, n in reasons[:_REASONS]]
    if rest := [n for _, n in reasons[_REASONS:]]:
        lost += [f"and {len(rest)} more: {sum(rest):,} rows"]
    words = f"{stage.name}: {stats.rows_in:,} in, {stats.rows_out:,} {stage.unit} out"
    return words + (f" (dropped: {', '.join(lost)})" if lost else "")


def _say_warnings(manifests: Sequence[Manifest], ran: int) -> None:
    warnings = sorted(status.total(manifests).warnings.items()) if ran else []
    for name, what in warnings[:_WARNINGS]:
        log.warning("%s: %s", name, what)
    if len(warnings) > _WARNINGS:
        log.warning("and %d more inputs; the report names them", len(warnings) - _WARNINGS)


def _say_failure(stage: Stage, outcome: Outcome | None) -> None:
    if outcome and outcome.ended is Ended.FAILED:
        log.error(
            "%s task %d failed: %s; log: %s",
            *(stage.name, outcome.task.index, outcome.reason, outcome.log),
        )

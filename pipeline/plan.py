"""What a build will cost: tasks of known kinds and sizes, times measured rates.

What tasks a stage will have is said by who knows the stages (`dataset_build.workload`,
`train.cost`); here it becomes hours, memory, bytes and jobs, and a table with every assumption
under it.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.config import ConfigError
from pipeline.rates import Figure, Numbers, Rate, Rates

JOB_S = (600, 3600)
"""A job of an array should last ten minutes to an hour: longer ones lose more when they are ended,
shorter ones load the scheduler."""


@dataclass(frozen=True)
class Batch:
    """Tasks of one kind that may run at the same time."""

    kind: str
    units: Numbers
    """Size of each task."""
    least_s: float = 0.0
    """Seconds a unit that a task takes at least: the network's, not the processor's."""
    more_s: float = 0.0
    """Seconds that each task takes besides what its rate says."""
    more_bytes: float = 0.0
    """Bytes that it publishes besides."""
    memory_up_to: float = float("inf")
    """Size from which on its memory no longer grows: the stage works in ranges."""
    workers: int | None = None
    """Tasks at the same time, where something other than the cores bounds them."""


@dataclass(frozen=True)
class Work:
    """What a stage will do."""

    stage: str
    unit: str
    rows_in: float
    rows_out: float
    phases: tuple[tuple[Batch, ...], ...]
    """Batches that wait for each other, each of batches that do not."""
    read_bytes: float
    data_bytes: float = 0.0
    """Kept besides what the rates say: pictures, candidates."""
    least_s: float = 0.0
    """The whole stage takes at least so long, however many cores there are."""


@dataclass(frozen=True)
class Jobs:
    """How a kind of task is best cut into the jobs of an array."""

    kind: str
    tasks: int
    task_s: float
    tasks_per_job: int
    jobs: int
    job_s: float


@dataclass(frozen=True)
class Cost:
    """What a stage will cost."""

    stage: str
    unit: str
    tasks: int
    rows_in: float
    rows_out: float
    core_hours: float
    wall_s: float
    memory_mb: float
    """Of the largest task's process; 0 where it is not known."""
    read_bytes: float
    kept_bytes: float
    files: float
    busy_s: float
    """Sum of the tasks' seconds as manifests have them: without the start of their processes."""
    jobs: tuple[Jobs, ...] = ()
    gpu_hours: float = 0.0


@dataclass
class Ledger:
    """The rates, and what was taken from them or asked for: the origin of every number."""

    rates: Rates
    used: dict[str, Figure] = field(default_factory=dict)
    kinds: dict[str, Rate] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figure(self, name: str) -> float:
        """A number by name. Raises `ConfigError` where nobody has measured it."""
        if name not in self.rates.figures:
            raise ConfigError(
                f"plan: nothing is known of {name}; give --from a run that went so far"
            )
        self.used[name] = self.rates.figures[name]
        return self.used[name].value

    def rate(self, kind: str) -> Rate:
        """What a kind of task costs. Raises `ConfigError` where nobody has measured it."""
        if kind not in self.rates.kinds:
            raise ConfigError(
                f"plan: no {kind} task was ever measured; give --from a run that has some"
            )
        self.kinds[kind] = self.rates.kinds[kind]
        return self.kinds[kind]

    def given(self, name: str, value: float, source: str) -> float:
        """Record a number that somebody gave or that was worked out; returns it."""
        self.used[name] = Figure(value, source)
        return value

    def note(self, text: str) -> None:
        """Something the reader must know."""
        if text not in self.notes:
            self.notes.append(text)


def kept_bytes(batch: Batch, ledger: Ledger) -> float:
    """Bytes that a batch's tasks publish, pictures aside."""
    each = np.maximum(ledger.rate(batch.kind).kept_bytes.at(batch.units), 0) + batch.more_bytes
    return float(each.sum())


def cost(work: Work, ledger: Ledger, cores: int) -> Cost:
    """A stage's cost on so many cores, a task a core."""
    own = f"{work.stage}.stage_s"  # of a run that had this stage; else of any stage
    stage_s = ledger.figure(own if own in ledger.rates.figures else "stage_s")
    start_s = ledger.figure("start_s")
    busy = core_s = wall = memory = kept = files = 0.0
    tasks, jobs = 0, []
    for phase in work.phases:
        seconds: list[Numbers] = []
        workers = cores
        for batch in phase:
            if not batch.units.size:
                continue
            rate = ledger.rate(batch.kind)
            _warn(batch, rate, ledger)
            took = np.maximum(rate.seconds.at(batch.units), batch.least_s * batch.units)
            took = took + batch.more_s
            seconds.append(took + start_s)
            workers = min(workers, batch.workers or cores)
            busy += float(took.sum())
            held = min(float(batch.units.max()), batch.memory_up_to)
            memory = max(memory, float(rate.memory_mb.at(held)))
            kept += kept_bytes(batch, ledger)
            files += batch.units.size * (rate.files + 2)  # its manifest and its log
            jobs.append(jobs_of(batch.kind, took + start_s, workers))
        if seconds:
            together = np.concatenate(seconds)
            tasks += together.size
            core_s += float(together.sum())
            wall += wall_s(together, workers)
    return Cost(
        *(work.stage, work.unit, tasks, work.rows_in, work.rows_out, core_s / 3600),
        max(wall + stage_s, work.least_s),
        *(memory, work.read_bytes, kept + work.data_bytes, files, busy, tuple(jobs)),
    )


def wall_s(seconds: Numbers, workers: int) -> float:
    """Seconds until all tasks are done, each begun as soon as a worker is free, in this order."""
    if seconds.size <= workers:
        return float(seconds.max())
    if seconds.max() - seconds.min() < 1e-6 * seconds.max():
        return math.ceil(seconds.size / workers) * float(seconds[0])
    free = [0.0] * workers
    for took in seconds.tolist():
        heapq.heapreplace(free, free[0] + took)
    return max(free)


def jobs_of(kind: str, seconds: Numbers, workers: int) -> Jobs:
    """As many jobs as can run at the same time, if they then last as long as jobs should."""
    mean = float(seconds.mean())
    shortest, longest = (max(1, int(bound / mean)) for bound in JOB_S)
    per_job = min(max(-(-seconds.size // workers), shortest), longest, seconds.size)
    jobs = -(-seconds.size // per_job)
    return Jobs(kind, seconds.size, mean, per_job, jobs, mean * per_job)


def _warn(batch: Batch, rate: Rate, ledger: Ledger) -> None:
    most = float(batch.units.max())
    if rate.most_units and most > 3 * rate.most_units:
        ledger.note(
            f"{batch.kind}: tasks of {number(most)} {rate.unit}, {number(most / rate.most_units)} "
            f"times the largest measured ({number(rate.most_units)}): their time and memory are "
            "extrapolated"
        )


@dataclass(frozen=True)
class Plan:
    """The answer."""

    costs: tuple[Cost, ...]
    cores: int
    facts: dict[str, float]
    """What belongs to no column: requests, bytes over the network, FLOPs, …"""
    ledger: Ledger

    def to_json(self) -> dict[str, Any]:
        """Plain values for programs."""
        total = {
            name: sum(getattr(cost, name) for cost in self.costs)
            for name in ("core_hours", "gpu_hours", "wall_s", "kept_bytes", "files", "tasks")
        }
        return {
            "cores": self.cores,
            "stages": [asdict(cost) for cost in self.costs],
            "total": total,
            "facts": self.facts,
            "figures": {name: asdict(figure) for name, figure in self.ledger.used.items()},
            "rates": {name: asdict(rate) for name, rate in self.ledger.kinds.items()},
            "notes": self.ledger.notes,
        }

    def lines(self) -> RenderableType:
        """For a terminal: costs, jobs, facts, and where every number is from."""
        return Group(
            self._stages(), Text(), self._jobs(), Text(), self._facts(), Text(), *self._origins()
        )

    def _stages(self) -> Table:
        table = _table("stage", "tasks", "rows in", "rows out", "core-h", "GPU-h", "wall time")
        for heading in ("MB a task", "reads", "keeps", "files"):
            table.add_column(heading, justify="right")
        for c in self.costs:
            table.add_row(
                *(c.stage, number(c.tasks), number(c.rows_in), number(c.rows_out)),
                *(number(c.core_hours), number(c.gpu_hours), duration(c.wall_s)),
                *(number(c.memory_mb), size(c.read_bytes), size(c.kept_bytes), number(c.files)),
            )
        total = self.to_json()["total"]
        table.add_section()
        table.add_row(
            *("total", number(total["tasks"]), "", "", number(total["core_hours"])),
            *(number(total["gpu_hours"]), duration(total["wall_s"]), "", ""),
            *(size(total["kept_bytes"]), number(total["files"])),
        )
        return table

    def _jobs(self) -> Table:
        table = _table("array of", "tasks", "s a task", "tasks a job", "jobs", "a job lasts")
        for one in (jobs for c in self.costs for jobs in c.jobs if jobs.tasks > 1):
            table.add_row(
                *(one.kind, number(one.tasks), number(one.task_s), number(one.tasks_per_job)),
                *(number(one.jobs), duration(one.job_s)),
            )
        return table

    def _facts(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, value in self.facts.items():
            shown = size(value) if name.endswith("bytes") else number(value)
            table.add_row(name, shown)
        return table

    def _origins(self) -> list[RenderableType]:
        table = _table("assumed", "value")
        table.add_column("origin", overflow="fold")
        for name, figure in self.ledger.used.items():
            shown = number(figure.value) if figure.value >= 1e4 else f"{figure.value:,.4g}"
            table.add_row(name, shown, figure.source)
        sources: dict[str, list[str]] = {}
        for kind, rate in self.ledger.kinds.items():
            sources.setdefault(rate.source, []).append(kind)
        for source, kinds in sources.items():
            table.add_row(f"time, memory, bytes of {', '.join(kinds)}", "", source)
        return [table, *(Text(f"note: {text}") for text in self.ledger.notes)]


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    return table


def number(value: float) -> str:
    """A number as people say it: 0, 0.3, 1,234, 56.1 k, 1.2 G."""
    for above, unit, name in (
        *((1e18, 1e18, "E"), (1e15, 1e15, "P"), (1e12, 1e12, "T"), (1e9, 1e9, "G")),
        *((1e6, 1e6, "M"), (1e4, 1e3, "k")),
    ):
        if value >= above:
            return f"{_three(value / unit)} {name}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


def size(value: float) -> str:
    """Bytes in decimal units."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{_three(value / unit)} {name}"
    return f"{value:.0f} B"


def _three(value: float) -> str:
    """Three digits that count, never in powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for above, unit, name in ((172_800, 86_400, "d"), (7200, 3600, "h"), (120, 60, "min")):
        if seconds >= above:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"

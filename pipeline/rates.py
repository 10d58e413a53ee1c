"""What tasks cost, as measured: seconds, memory and bytes of each kind of task, by its size.

A kind of task is a part of a stage that does one thing (`match.matcher`, `match.match`), and its
size a number of rows, bytes or whatever its time grows with. Rates come from the manifests of runs
that ended (`fit`), or from `rates.json` beside this module, which `python -m benchmarks rates`
measured on our machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SHIPPED = Path(__file__).with_name("rates.json")
Numbers = npt.NDArray[np.float64]

_SPREAD = 2.0  # sizes must differ by this factor for a fixed part to be told from the rest
_REACH = 0.1  # and come so near to the largest known: among small tasks, noise outweighs the rest


@dataclass(frozen=True)
class Line:
    """A quantity that is `fixed + per_unit * units` for a task of that many units."""

    fixed: float = 0.0
    per_unit: float = 0.0

    def at(self, units: Any) -> Any:
        """Its value for a task; elementwise for an array of tasks."""
        return self.fixed + self.per_unit * units


@dataclass(frozen=True)
class Rate:
    """What a task of one kind costs."""

    unit: str
    """What its size counts."""
    seconds: Line
    """From the start of its work to the publication of its results; not the process's start."""
    memory_mb: Line
    kept_bytes: Line
    """Published bytes, without pictures where their number decides."""
    files: float
    """Published files of a task, on average."""
    tasks: int
    """Tasks that it was measured on."""
    most_units: float
    """Size of the largest of them."""
    source: str
    """Who measured it, on what."""


@dataclass(frozen=True)
class Figure:
    """A number that depends on the data or on the world, and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class Observation:
    """A finished task: its kind and size, and what it cost."""

    kind: str
    unit: str
    units: float
    seconds: float
    memory_mb: float
    kept_bytes: float
    files: int


@dataclass
class Rates:
    """All that a plan reckons with."""

    kinds: dict[str, Rate] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    """By name: shares of rows that pass a stage, bytes of a picture, seconds that a process takes
    to start, …"""

    def over(self, below: Rates) -> Rates:
        """These, and where they know nothing, those of `below`."""
        kinds, figures = {**below.kinds, **self.kinds}, {**below.figures, **self.figures}
        return Rates(kinds, figures)

    def to_json(self) -> str:
        """The text of a file of rates."""
        kinds = {name: asdict(rate) for name, rate in sorted(self.kinds.items())}
        figures = {name: asdict(figure) for name, figure in sorted(self.figures.items())}
        return json.dumps({"figures": figures, "kinds": kinds}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Rates:
        """Inverse of `to_json`."""
        values = json.loads(text)
        kinds = {}
        for name, rate in values["kinds"].items():
            for line in ("seconds", "memory_mb", "kept_bytes"):
                rate[line] = Line(**rate[line])
            kinds[name] = Rate(**rate)
        return cls(kinds, {name: Figure(**figure) for name, figure in values["figures"].items()})


def shipped() -> Rates:
    """What we measured."""
    return Rates.from_json(SHIPPED.read_text())


def fit(seen: Sequence[Observation], known: Mapping[str, Rate], source: str) -> dict[str, Rate]:
    """Rates of the kinds of task in `seen`.

    A fixed part and a part that grows with the size are fitted where the sizes differ enough and
    are not tiny beside those that are known. Where not, the two parts are in the proportion that
    `known` gives for this size; where nothing is known, all grows.
    """
    kinds = dict.fromkeys(task.kind for task in seen)
    return {
        kind: _rate([task for task in seen if task.kind == kind], known.get(kind), source)
        for kind in kinds
    }


def _rate(tasks: Sequence[Observation], known: Rate | None, source: str) -> Rate:
    units = np.array([task.units for task in tasks], np.float64)
    reach = known.most_units * _REACH if known else 0.0

    def line(name: str) -> Line:
        values = np.array([getattr(task, name) for task in tasks], np.float64)
        return _line(units, values, getattr(known, name) if known else None, reach)

    return Rate(
        tasks[0].unit,
        line("seconds"),
        line("memory_mb"),
        line("kept_bytes"),
        files=sum(task.files for task in tasks) / len(tasks),
        tasks=len(tasks),
        most_units=float(units.max()),
        source=source,
    )


def _line(units: Numbers, values: Numbers, known: Line | None, reach: float) -> Line:
    """Least squares, both parts at least 0; its sum over the tasks is always the measured one."""
    mean_units, mean = float(units.mean()), float(values.mean())
    if mean_units == 0:
        return Line(mean)
    if units.max() >= max(_SPREAD * units.min(), reach, 1):
        apart = units - mean_units
        slope = float((apart * values).sum() / (apart**2).sum())
        slope = min(max(slope, 0.0), mean / mean_units)
        return Line(mean - slope * mean_units, slope)
    expected = known.at(mean_units) if known else 0.0
    if known is None or expected <= 0:
        return Line(0.0, mean / mean_units)
    return Line(known.fixed * mean / expected, known.per_unit * mean / expected)

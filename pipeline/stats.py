"""What a task counts: rows in and out, why the rest ended, and what was wrong with its inputs."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class Stats:
    """Counts that add: a report is the sum of the manifests, at any moment of a build.

    `rows_in == rows_out + sum(dropped)` always holds: every row that went in is accounted for.
    """

    rows_in: int = 0
    rows_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that ended here, by reason."""
    counts: Counter[str] = field(default_factory=Counter)
    """Anything else worth counting."""
    histograms: dict[str, Counter[str]] = field(default_factory=dict)
    """Distributions: histogram name -> bin label -> count."""
    warnings: dict[str, str] = field(default_factory=dict)
    """Inputs that were read and are not as they should be: name -> what is wrong with it."""

    def drop(self, reason: str, rows: int = 1) -> None:
        """Count rows that end here."""
        self.dropped[reason] += rows

    def observe(self, histogram: str, label: object, rows: int = 1) -> None:
        """Add `rows` to one bin of a histogram."""
        self.histograms.setdefault(histogram, Counter())[str(label)] += rows

    def warn(self, name: str, what: str) -> None:
        """Note, and log, that something is wrong with an input that is read all the same."""
        log.warning("%s: %s", name, what)
        self.warnings[name] = what

    def __add__(self, other: Stats) -> Stats:
        histograms = {name: Counter(bins) for name, bins in self.histograms.items()}
        for name, bins in other.histograms.items():
            histograms.setdefault(name, Counter()).update(bins)
        return Stats(
            self.rows_in + other.rows_in,
            self.rows_out + other.rows_out,
            self.dropped + other.dropped,
            self.counts + other.counts,
            histograms,
            self.warnings | {name: _joined(self, name, other) for name in other.warnings},
        )

    def balanced(self) -> bool:
        """Whether every row that went in came out or was dropped for a named reason."""
        return self.rows_in == self.rows_out + sum(self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values; `dataclasses.asdict` cannot copy a Counter."""
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "dropped": dict(self.dropped),
            "counts": dict(self.counts),
            "histograms": {name: dict(bins) for name, bins in self.histograms.items()},
            "warnings": self.warnings,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Stats:
        """Inverse of `to_json`."""
        return cls(
            values["rows_in"],
            values["rows_out"],
            Counter(values["dropped"]),
            Counter(values["counts"]),
            {name: Counter(bins) for name, bins in values["histograms"].items()},
            values.get("warnings", {}),
        )


def _joined(one: Stats, name: str, other: Stats) -> str:
    """What is wrong with an input of which several tasks say something."""
    known, what = one.warnings.get(name), other.warnings[name]
    return what if known in (None, what) else f"{known}; {what}"

"""How many rows will leave each stage of a build, before any of its data is there.

They follow from the inputs on the disk or from what the user gives, through the shares that pass
each stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dataset_build import dedup, extract
from dataset_build.balance import BalanceSettings
from dataset_build.forecast import pilot
from pipeline.config import ConfigError, MissingInput
from pipeline.plan import Ledger
from pipeline.rates import Numbers
from pipeline.remote import is_remote
from pipeline.stage import Run, Task

RATIOS = ("match", "dedup", "balance", "download", "screen")
"""Stages whose share of rows that pass can be given."""
_NO_INPUTS = "the inputs of extract are not there"


@dataclass(frozen=True)
class Asked:
    """What the user says of a build; None: to be found out."""

    candidates: float | None = None
    selected: float | None = None
    pairs: float | None = None
    queries: float | None = None
    files: int | None = None
    snapshots: int | None = None
    connections: int | None = None
    addresses_per_s: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """Rows that leave each stage."""

    queries: float
    candidates: float
    matched: float
    unique: float
    """Pairs that leave `dedup`."""
    selected: float
    fetched: float
    pairs: float
    entries: float
    """Sketch entries of `balance`."""
    snapshots: int


@dataclass(frozen=True)
class Inputs:
    """The files that `extract` will read."""

    kinds: dict[str, Numbers]
    """`wat`, `warc`, `parquet` -> bytes of each file."""
    snapshots: int

    @property
    def bytes(self) -> float:
        """Of all files."""
        return float(sum(sizes.sum() for sizes in self.kinds.values()))


def reckon(run: Run, asked: Asked, ledger: Ledger, pilots: Sequence[Run]) -> tuple[Inputs, Sizes]:
    """The files that a build will read, and its rows. Raises `ConfigError` for what is missing."""
    for name, value in asked.ratios.items():
        ledger.given(f"{name}.share", value, "given")
    reckoning = _Reckoning(run, asked, ledger, pilots)
    sizes = reckoning.sizes()
    assert reckoning.inputs is not None
    return reckoning.inputs, sizes


def input_bytes(run: Run, task: Task) -> float:
    """Bytes that a task reads."""
    return float(sum(run.path(reference).stat().st_size for reference in task.reads))


class _Reckoning:
    def __init__(self, run: Run, asked: Asked, ledger: Ledger, pilots: Sequence[Run]) -> None:
        self.run = run
        self.asked = asked
        self.ledger = ledger
        self.pilots = pilots
        self.inputs = self._inputs()

    def sizes(self) -> Sizes:
        """Of every stage."""
        ledger = self.ledger
        number = self._query_number()
        candidates = self._candidates()
        matched = candidates * self._share("match")
        unique = matched * self._share("dedup")
        cap = self._cap(unique)
        selected = self._asked_selected()
        if selected is None:
            selected = unique * (cap.share if cap else self._share("balance"))
        elif selected > unique:
            raise ConfigError(
                f"plan: {selected:,.0f} selected pairs are asked for, but {candidates:,.0f} "
                f"candidates leave only {unique:,.0f} to select from; give more --candidates, or "
                "say with --ratio match=… dedup=… that more pass"
            )
        if cap is None:
            limit = self.run.settings("balance").limit.pairs
            bound = ledger.figure("balance.capped_queries") * number
            entries = min(bound * limit * 1.04, matched * 20)
        else:
            entries = cap.entries
        ledger.given(
            "balance: selected of unique pairs", selected / unique, "follows from the rest"
        )
        fetched = selected * self._share("download")
        pairs = fetched * self._share("screen")
        assert self.inputs is not None
        snapshots = self.inputs.snapshots
        return Sizes(
            *(number, candidates, matched, unique, selected, fetched, pairs, entries, snapshots)
        )

    def _share(self, name: str) -> float:
        given = self.asked.ratios.get(name)
        return given if given is not None else self.ledger.figure(f"{name}.share")

    def _inputs(self) -> Inputs | None:
        """Files that are configured, or as many as the candidates that were asked for take."""
        settings: extract.ExtractSettings = self.run.settings("extract")
        configured = [kind for kind in ("wat", "warc", "pool") if getattr(settings, kind)]
        if self.asked.candidates is None:
            try:
                tasks = extract.plan(self.run)
                kinds = {
                    kind: np.array(
                        [self._bytes(task) for task in tasks if task.params["kind"] == kind],
                        np.float64,
                    )
                    for kind in configured
                }
            except (MissingInput, ConfigError):
                return None
            snapshots = len({task.params["snapshot"] for task in tasks})
            self.ledger.given("input files", len(tasks), "as configured")
            return Inputs(kinds, self.asked.snapshots or snapshots)
        return self._made_up(configured[0] if configured else "wat", self.asked.candidates)

    def _bytes(self, task: Task) -> float:
        """Of a task's files; nobody is asked for the sizes of those that are elsewhere."""
        if (part := task.params.get("bytes")) is not None:
            return float(part)
        here = [reference for reference in task.reads if not is_remote(reference)]
        size = input_bytes(self.run, replace(task, reads=tuple(here)))
        if elsewhere := len(task.reads) - len(here):
            size += elsewhere * self.ledger.figure(f"extract.{task.params['kind']}.file_bytes")
        return size

    def _made_up(self, kind: str, candidates: float) -> Inputs:
        size = candidates / self.ledger.figure(f"extract.{kind}.rows_per_byte")
        if (files := self.asked.files) is None:
            files = max(1, round(size / self.ledger.figure(f"extract.{kind}.file_bytes")))
        self.ledger.given("input files", files, "given" if self.asked.files else "bytes / file")
        snapshots = self.asked.snapshots or 1
        self.ledger.given("snapshots", snapshots, "given" if self.asked.snapshots else "assumed")
        return Inputs({kind: np.full(files, size / files)}, snapshots)

    def _candidates(self) -> float:
        if self.asked.candidates is not None:
            return self.ledger.given("candidates", self.asked.candidates, "given")
        if self.inputs is not None:
            return sum(
                float(sizes.sum()) * self.ledger.figure(f"extract.{kind}.rows_per_byte")
                for kind, sizes in self.inputs.kinds.items()
                if sizes.size
            )
        selected = self._asked_selected()
        if selected is None:
            raise ConfigError(
                f"plan: {_NO_INPUTS}; say how many candidates they will give (--candidates 12e9), "
                "or how many pairs the dataset shall have (--pairs 400e6)"
            )
        passing = self._share("match") * self._share("dedup") * self._share("balance")
        found = self.ledger.given("candidates", selected / passing, "what the pairs take")
        settings: extract.ExtractSettings = self.run.settings("extract")
        kinds = [kind for kind in ("wat", "warc", "pool") if getattr(settings, kind)]
        self.inputs = self._made_up(kinds[0] if kinds else "wat", found)
        return found

    def _asked_selected(self) -> float | None:
        """Pairs that `balance` must select, where that or the dataset's size was asked for."""
        if self.asked.selected is not None:
            return self.ledger.given("selected", self.asked.selected, "given")
        if self.asked.pairs is None:
            return None
        self.ledger.given("pairs", self.asked.pairs, "given")
        return self.asked.pairs / (self._share("download") * self._share("screen"))

    def _query_number(self) -> float:
        """Length of the query list: as given, as it is there, as the pilot's, or as configured."""
        if self.asked.queries is not None:
            return self.ledger.given("queries", self.asked.queries, "given")
        for run in (self.run, *reversed(self.pilots)):
            if number := pilot.queries(run):
                return self.ledger.given("queries", number, f"as in {run.folder}")
        limit: int = self.run.settings("queries").limit
        return self.ledger.given("queries", limit, "queries.limit, if it is reached")

    def _cap(self, unique: float) -> pilot.Cap | None:
        """What the cap leaves, by the queries of the pilot with the most pairs."""
        if "balance" in self.asked.ratios:
            return None
        settings: BalanceSettings = self.run.settings("balance")
        known = [(pilot.total(run.manifests("dedup")).rows_out, run) for run in self.pilots]
        if not known:
            return None
        rows, run = max(known, key=lambda one: one[0])
        files = len(dedup.groups(self.run))
        if not rows or (cap := pilot.under_cap(run, unique / rows, settings, files)) is None:
            return None
        how = f"1 - Π(1 - cap / count), counts of {run.folder} times {unique / rows:.3g}"
        self.ledger.given("balance.share by the cap", cap.share, how)
        self.ledger.given("queries over the cap", cap.bound, how.partition(", ")[2])
        return cap

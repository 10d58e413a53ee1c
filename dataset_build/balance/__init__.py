"""At most `cap` pairs a query, exactly and reproducibly.

Every query selects its `cap` pairs of smallest priority h = hash(uid, query, seed), or all that it
has; the dataset is the union. Five phases: add up what `dedup` counted, sketch per file,
thresholds, select per file, check. No result depends on the files' number or order, and none reads
a text.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from dataset_build import domains, selection
from dataset_build.hashing import halves
from dataset_build.thresholds import (
    Bool,
    Entries,
    Hash,
    Limit,
    Thresholds,
    entries,
    likely_bound,
    merge,
    missing,
    priority,
    smallest,
)
from pipeline.config import Settings
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats

Mode = Literal["quota", "attributed", "metaclip"]


class BalanceSettings(Settings):
    """How many pairs a query may bring into the dataset."""

    cap: int = Field(default=20_000, ge=1)
    """Pairs that one query selects at most. CLIP took 20,000."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Another seed selects other pairs, equally good."""
    mode: Mode = "quota"
    """`quota`: every query that occurs in a pair may select it. A pair is in the dataset if any
    query selects it, so frequent queries occur in more pairs than the cap (those that rarer queries
    selected), as in CLIP. `attributed`: a pair is charged to the rarest of its queries, and only
    that one may select it. `metaclip`: each query draws each of its pairs with probability
    cap / count, as MetaCLIP does, so that the cap holds on average and for no query exactly; for
    comparison."""
    spare: float = Field(default=0.0, ge=0, le=10)
    """Share by which more than `cap` is selected, for the downloads that will fail; `screen` brings
    every query back to `cap`. 0.8 suits crawls of which 60 % still answers."""
    max_cap: int | None = Field(default=None, ge=1)
    """Largest cap, `spare` included, to which a run may be changed without scanning its pairs
    again; by default the cap is changed by another scan. Sketches then hold every query's pairs up
    to this number, 28 bytes each."""
    domain_share: float | None = Field(default=None, gt=0, le=1)
    """Largest share of the cap that a query may take from one registered domain, at least one pair;
    unlimited by default. Against a site that floods a query with one kind of picture."""

    @property
    def limit(self) -> Limit:
        """What one query may select here, spare included."""
        return self._limit(self.cap + math.ceil(self.cap * Fraction(str(self.spare))))

    @property
    def final(self) -> Limit:
        """What `screen` leaves of it."""
        return self._limit(self.cap)

    def _limit(self, pairs: int) -> Limit:
        if self.domain_share is None:
            return Limit(pairs)
        return Limit(pairs, max(1, math.floor(pairs * Fraction(str(self.domain_share)))))

    @property
    def depth(self) -> Limit:
        """The limit that sketches are made for: any smaller one can be read off them."""
        return self.limit if self.max_cap is None else Limit(self.max_cap)

    @model_validator(mode="after")
    def _consistent(self) -> BalanceSettings:
        if self.max_cap is not None:
            if self.max_cap < (pairs := self.limit.pairs):
                raise ValueError(f"max_cap {self.max_cap} is below cap with spare, {pairs}")
            if self.domain_share is not None:
                raise ValueError("max_cap does not go with domain_share: its limit follows the cap")
        if self.mode == "metaclip" and (self.domain_share or self.max_cap or self.spare):
            raise ValueError("mode metaclip draws: domain_share, max_cap and spare are not for it")
        return self


def choose(
    uids: pa.Array,
    query_ids: pa.Array,
    queries: int,
    settings: BalanceSettings,
    hash_of: Hash | None = None,
    domain: pa.DictionaryArray | None = None,
) -> pa.Array:
    """`selected_by` of pairs that fit into memory: `list<uint32>`, empty where none selects.

    `query_ids`: `list<uint32>` below `queries`; `domain` is needed with `domain_share`. The same as
    the stage gives for these pairs.
    """
    limit = settings.limit
    high, low = halves(uids)
    row, query = selection.matches(query_ids)
    counts = selection.count(query, queries)
    if settings.mode == "attributed":
        row, query = selection.rarest(row, query, counts)
        counts = selection.count(query, queries)
    high, low = high[row], low[row]
    h = (hash_of or priority(settings.seed))(high, low, query)
    place = None
    if limit.per_domain is not None:
        assert domain is not None, "domain_share needs the pairs' domains"
        place = domains.hashed(domain)[row]

    def sketch_of(within: Bool) -> Entries:
        at = np.flatnonzero(within)
        of = None if place is None else place[at]
        return smallest(entries(high[at], low[at], query[at], h[at], of), limit)

    if settings.mode == "metaclip":
        thresholds = Thresholds.independent(counts, limit.pairs)
    else:
        sketch = sketch_of(h <= likely_bound(counts, limit)[query])
        if (lacking := missing(sketch, counts, limit)).size:
            sketch = merge([sketch, sketch_of(np.isin(query, lacking))], limit)
        thresholds = Thresholds.join([Thresholds.of(sketch, counts, limit)])
    chosen = thresholds.admit(high, low, query, h, place)
    return selection.lists(row[chosen], query[chosen], len(uids))


# The phases' plans. A phase sees the plan of those before it, and its tasks count on from there.

_PAIRS = "dedup:pairs-*.parquet"
_COUNTS = "balance:counts.npy"
_CHARGED = "balance:charged.npy"
_THRESHOLDS = ("balance:tau.npy", "balance:last.npy", "balance:full.npy")
_ALL = tuple(BalanceSettings.model_fields)


def plan(run: Run) -> list[Task]:
    """Add up how many pairs each query occurs in."""
    return [Task("balance", 0, tuple(run.find("dedup:count-*.npy")), {"phase": "total"}, _ALL)]


def _plan_sketch(run: Run) -> list[Task]:
    settings: BalanceSettings = run.settings("balance")
    if settings.mode == "metaclip":
        return []  # draws need no sketch
    # With max_cap the sketches are the same for every smaller cap.
    ignores = () if settings.max_cap is None else ("cap", "spare")
    return _per_file(run, "sketch", [_COUNTS], ignores=ignores)


def _plan_thresholds(run: Run) -> list[Task]:
    mode: Mode = run.settings("balance").mode
    reads = [_COUNTS]
    if mode != "metaclip":
        # The pairs are for the queries of which the sketches lack entries: hardly ever read.
        reads += [*run.find("balance:sketch-*.npy"), *run.find(_PAIRS)]
    if mode == "attributed":
        reads += run.find("balance:charged-*.npy")
    return [_single(run, "thresholds", reads)]


def _plan_select(run: Run) -> list[Task]:
    return _per_file(run, "select", [_COUNTS, _CHARGED, *_THRESHOLDS])


def _plan_check(run: Run) -> list[Task]:
    reads = [_COUNTS, _CHARGED, "balance:due.npy"]
    for pattern in ("balance:chosen-*.npy", "balance:domains-*.parquet", "dedup:raw-*.npy"):
        reads += run.find(pattern)
    return [_single(run, "check", reads)]


def _single(run: Run, phase: str, reads: list[str], **options: Any) -> Task:
    return Task("balance", len(run.plan("balance")), tuple(reads), {"phase": phase}, **options)


def _per_file(run: Run, phase: str, reads: list[str], **options: Any) -> list[Task]:
    first = len(run.plan("balance"))
    return [
        Task("balance", first + part, (pairs, *reads), {"phase": phase, "part": part}, **options)
        for part, pairs in enumerate(run.find(_PAIRS))
    ]


def work(attempt: Attempt) -> Stats:
    """Do one task of the phase that its parameters name."""
    from dataset_build.balance import phases

    return phases.PHASES[attempt.task.params["phase"]](attempt)


STAGE = Stage(
    name="balance",
    needs=("dedup",),
    plan=plan,
    work=work,
    then=(_plan_sketch, _plan_thresholds, _plan_select, _plan_check),
    unit="pairs",
    version=3,
)

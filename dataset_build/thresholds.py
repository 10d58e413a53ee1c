"""Bottom-k sketches: the `cap` pairs of smallest priority of every query, exactly.

A pair's priority for a query is a hash of both, so "the k smallest" is a fair sample that nobody
has to agree on: sketches of parts merge into the sketch of the whole, in any order, and the k-th
smallest priority is the threshold τ under which the query selects a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataset_build.hashing import U64, mix64
from dataset_build.neighbours import changes, place_in_run

U32 = npt.NDArray[np.uint32]
Entries = npt.NDArray[np.void]
Bool = npt.NDArray[np.bool_]
Hash = Callable[[U64, U64, U32], U64]
"""(upper and lower halves of uids, query ids) -> priorities, all of one length."""

_PIECE = 32_768  # entries of a saved sketch that are read at once

NO_LIMIT = np.uint64(2**64 - 1)
"""The threshold of a query with no more pairs than the cap: it selects all of them."""

ENTRY = np.dtype([("query_id", "<u4"), ("h", "<u8"), ("high", "<u8"), ("low", "<u8")])
"""A pair as a query sees it: its priority, then its uid, which decides between equal ones."""

DOMAIN_ENTRY = np.dtype([*ENTRY.descr, ("domain", "<u8")])
"""The same where domains are limited, with a hash of the pair's."""


@dataclass(frozen=True)
class Limit:
    """How many pairs a query selects at most."""

    pairs: int
    per_domain: int | None = None
    """And of these, how many that come from one registered domain."""

    @property
    def entry(self) -> np.dtype[np.void]:
        """What sketches under this limit consist of."""
        return ENTRY if self.per_domain is None else DOMAIN_ENTRY

    def may_bind(self, counts: U64) -> Bool:
        """Queries with so many pairs that they may not select all of them."""
        binds: Bool = counts > min(self.pairs, self.per_domain or self.pairs)
        return binds


def priority(seed: int) -> Hash:
    """h = mix64(low half of the uid ^ mix64(query id ^ mix64(seed))).

    The uid is a hash already, so its low half is 64 random bits; mixing the query id in makes the
    priorities of one pair for different queries independent.
    """
    # 0x6F70656E776974: "openwit"; keeps seed 0 away from mix64's fixed point.
    base = mix64(np.array([seed ^ 0x6F70656E776974], np.uint64))

    def h(high: U64, low: U64, query_id: U32) -> U64:
        return mix64(low ^ mix64(query_id.astype(np.uint64) ^ base))

    return h


def entries(high: U64, low: U64, query_id: U32, h: U64, domain: U64 | None = None) -> Entries:
    """Sketch entries of (pair, query) matches, unsorted."""
    result = np.empty(h.size, ENTRY if domain is None else DOMAIN_ENTRY)
    result["query_id"], result["h"], result["high"], result["low"] = query_id, h, high, low
    if domain is not None:
        result["domain"] = domain
    return result


def smallest(found: Entries, limit: Limit) -> Entries:
    """The first entries of every query by (h, uid) that the limit admits, sorted by query.

    Entries that occur twice count once. An entry behind `per_domain` others of its query and domain
    is passed over; of the rest each query keeps `pairs`.
    """
    if not found.size:
        return found
    # One number orders nearly all: the query id, then as many bits of h as there is room for.
    query_id = found["query_id"].astype(np.uint64)
    bits = np.uint64(int(query_id.max()).bit_length())
    key = found["h"] >> bits
    if bits:
        key |= query_id << (np.uint64(64) - bits)
    order = np.argsort(key)
    key = key[order]
    (twin,) = np.nonzero(key[1:] == key[:-1])
    repeated = np.zeros(0, np.int64)
    if twin.size:
        at = np.union1d(twin, twin + 1)
        tied = found[order[at]]
        rank = np.lexsort((tied["low"], tied["high"], tied["h"], tied["query_id"]))
        order[at] = order[at][rank]
        tied = tied[rank]
        repeated = at[1:][~changes(*(tied[name] for name in ENTRY.names or ()))[1:]]
    if repeated.size:
        order = np.delete(order, repeated)
    found = found[order]
    if limit.per_domain is not None:
        by_domain = np.lexsort((found["domain"], found["query_id"]))  # stable: in each, by (h, uid)
        place = place_in_run(found["query_id"][by_domain], found["domain"][by_domain])
        found = found[np.sort(by_domain[place < limit.per_domain])]
    return found[place_in_run(found["query_id"]) < limit.pairs]


def merge(sketches: Iterable[Entries], limit: Limit) -> Entries:
    """The sketch of a union from the sketches of its parts.

    Associative, commutative and exact, also for parts that overlap. Whom the limit admits in the
    union, it admits in a part: no domain has more entries before it there than in the union, so
    neither have all domains together, each counted up to `per_domain`.
    """
    return smallest(np.concatenate([np.zeros(0, limit.entry), *sketches]), limit)


def wanted(pairs: int) -> int:
    """Entries that bounded sketches hold of a query on average, to hold `pairs` almost surely."""
    return pairs + 6 * math.isqrt(pairs) + 38


def likely_bound(counts: U64, limit: Limit) -> U64:
    """Per query a priority under which its `limit.pairs` smallest almost surely lie.

    A uniform priority is below x·2⁶⁴ with probability x. With x = (k + 6√k + 38) / count the number
    below has mean k + 6√k + 38 and deviation at most its root, so fewer than k happens about once
    in 10⁹; `missing` tells. Of a capped query the sketches then hold about 1.04 k entries in all
    files together (k = 20,000), not k of each file. Queries that select all need none: 0.
    """
    share = np.minimum(wanted(limit.pairs) / np.maximum(counts, 1), 1.0)
    whole = share > 0.999
    bound = (np.where(whole, 0.0, share) * 2.0**64).astype(np.uint64)
    bound[whole] = NO_LIMIT
    bound[~limit.may_bind(counts)] = 0
    return bound


def missing(sketch: Entries, counts: U64, limit: Limit, first: int = 0) -> npt.NDArray[np.intp]:
    """Queries, from `first` on, that could select more than a bounded sketch holds of them."""
    held = _held(sketch, counts, first)
    return first + np.flatnonzero((held < limit.pairs) & (counts > limit.pairs))


def _held(sketch: Entries, counts: U64, first: int) -> npt.NDArray[np.int64]:
    return np.bincount(sketch["query_id"].astype(np.int64) - first, minlength=counts.size)


@dataclass(frozen=True)
class Thresholds:
    """What decides whether a query selects a pair: (h, uid) ≤ (τ, last uid).

    Where domains are limited, also (h, uid) ≤ the last pair of its query and domain, for those that
    reached their limit.
    """

    tau: U64
    """Per query, the priority of its last selected pair; `NO_LIMIT` if it selects all."""
    last: U64
    """[queries, 2]: the upper and lower half of that pair's uid; NO_LIMIT twice if all."""
    full: Entries
    """The last pair of every query and domain at its limit (`DOMAIN_ENTRY`), sorted by `_place`."""

    @classmethod
    def of(cls, sketch: Entries, counts: U64, limit: Limit, first: int = 0) -> Thresholds:
        """From the sketch of the queries from `first` on; it must be complete, see `missing`.

        `join` makes the thresholds of all queries of it.
        """
        held = _held(sketch, counts, first)
        tau = np.full(counts.size, NO_LIMIT)
        last = np.full((counts.size, 2), NO_LIMIT)
        capped = np.flatnonzero((held == limit.pairs) & (counts > limit.pairs))
        end = np.searchsorted(sketch["query_id"], capped + first, side="right") - 1
        tau[capped] = sketch["h"][end]
        last[capped, 0], last[capped, 1] = sketch["high"][end], sketch["low"][end]
        full = np.zeros(0, DOMAIN_ENTRY)
        if limit.per_domain is None:
            assert not missing(sketch, counts, limit, first).size, "the sketch lacks entries"
        else:
            sketch = sketch[np.lexsort((sketch["domain"], sketch["query_id"]))]
            place = place_in_run(sketch["query_id"], sketch["domain"])
            full = sketch[place == limit.per_domain - 1]
        return cls(tau, last, full)

    @classmethod
    def independent(cls, counts: U64, pairs: int) -> Thresholds:
        """Draws with probability pairs / count instead: right on average, exact for no query."""
        half = np.minimum(pairs / np.maximum(counts, 1), 1.0) * 2.0**63  # 2⁶⁴ itself does not fit
        certain = counts <= pairs
        tau = np.where(certain, 0.0, half).astype(np.uint64) << np.uint64(1)
        tau[certain] = NO_LIMIT
        last = np.where(certain[:, None], NO_LIMIT, np.zeros((counts.size, 2), np.uint64))
        return cls(tau, last, np.zeros(0, DOMAIN_ENTRY))

    @classmethod
    def join(cls, ranges: Sequence[Thresholds]) -> Thresholds:
        """Of neighbouring ranges of queries, in order."""
        full = np.concatenate([part.full for part in ranges])
        full = full[np.argsort(_place(full["query_id"], full["domain"]))]
        tau = np.concatenate([part.tau for part in ranges])
        joined = cls(tau, np.concatenate([part.last for part in ranges]), full)
        assert (np.diff(joined._places) != 0).all(), "two (query, domain) share a hash"
        return joined

    @cached_property
    def _places(self) -> U64:
        return _place(self.full["query_id"], self.full["domain"])

    def admit(self, high: U64, low: U64, query_id: U32, h: U64, domain: U64 | None = None) -> Bool:
        """Whether each match is among the first of its query, and of its domain there."""
        chosen = _within(high, low, h, self.tau[query_id], self.last, query_id)
        if self.full.size:
            assert domain is not None, "domains are limited, but not given"
            (at,) = np.nonzero(chosen)
            met, entry = self._limits_met(query_id[at], domain[at])
            at = at[met]
            last = np.stack([entry["high"], entry["low"]], axis=1)
            chosen[at] = _within(
                high[at], low[at], h[at], entry["h"], last, np.arange(at.size, dtype=np.uint32)
            )
        return chosen

    def chance(
        self, query_id: U32, domain: U64 | None, limit: Limit, counts: U64
    ) -> npt.NDArray[np.float64]:
        """Over the seeds, the probability that a match is admitted: pairs / count of its query.

        Where domains are limited it is what the thresholds, as they are, admit of all priorities.
        """
        if limit.per_domain is None:
            return np.minimum(1.0, limit.pairs / np.maximum(counts[query_id], 1))
        tau = self.tau[query_id]
        if domain is not None and self.full.size:
            at, entry = self._limits_met(query_id, domain)
            tau[at] = np.minimum(tau[at], entry["h"])
        return (tau.astype(np.float64) + 1.0) / 2.0**64

    def _limits_met(self, query_id: U32, domain: U64) -> tuple[npt.NDArray[np.int64], Entries]:
        """Which matches are of a query and domain at its limit, and the last pair of each."""
        place = np.searchsorted(self._places, _place(query_id, domain))
        place[place == self.full.size] = 0
        entry = self.full[place]
        met = np.flatnonzero((entry["query_id"] == query_id) & (entry["domain"] == domain))
        return met, entry[met]


def _within(high: U64, low: U64, h: U64, tau: U64, last: U64, index: U32) -> Bool:
    """(h, high, low) ≤ (tau, *last[index])."""
    chosen: Bool = h < tau
    (tied,) = np.nonzero(h == tau)
    if tied.size:  # each capped query's last pair at least
        limit = last[index[tied]]
        chosen[tied] = (high[tied] < limit[:, 0]) | (
            (high[tied] == limit[:, 0]) & (low[tied] <= limit[:, 1])
        )
    return chosen


def _place(query_id: U32, domain: U64) -> U64:
    """Where (query, domain) stands among those at their limit."""
    return mix64(domain ^ mix64(query_id.astype(np.uint64)))


class SavedSketch:
    """A sketch saved by `np.save`, read query after query; little of it is in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            assert np.lib.format.read_magic(file) == (1, 0), path
            shape, _, self._entry = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        (self._entries,) = shape
        self._next = 0
        self._held: Entries = np.zeros(0, self._entry)

    def counts(self, queries: int) -> npt.NDArray[np.int64]:
        """Entries of every query."""
        total = np.zeros(queries, np.int64)
        for first in range(0, self._entries, _PIECE):
            total += np.bincount(self._read(first)["query_id"], minlength=queries)
        return total

    def below(self, query: int) -> Entries:
        """The next entries, those of queries below `query`."""
        taken = [self._held]
        while taken[-1].size == 0 or taken[-1]["query_id"][-1] < query:
            if self._next >= self._entries:
                break
            taken.append(self._read(self._next))
            self._next += taken[-1].size
        last = taken[-1]
        stop = int(np.searchsorted(last["query_id"], query))
        taken[-1], self._held = last[:stop], last[stop:]
        return np.concatenate(taken)

    def _read(self, first: int) -> Entries:
        count = min(_PIECE, self._entries - first)
        offset = self._start + first * self._entry.itemsize
        piece: Entries = np.fromfile(self._path, self._entry, count, offset=offset)
        return piece


def by_ranges(
    sketches: Sequence[SavedSketch], queries: int, most: int
) -> Iterator[tuple[int, int, list[Entries]]]:
    """Cut sketches into ranges of queries with at most `most` entries in all of them.

    Yields (first query, one past the last, that part of every sketch); a single query may exceed
    `most`.
    """
    counts = sum((sketch.counts(queries) for sketch in sketches), np.zeros(queries, np.int64))
    total = np.concatenate([[0], np.cumsum(counts)])
    first = 0
    while first < queries:
        reach = int(np.searchsorted(total, total[first] + most, side="right")) - 1
        stop = min(max(first + 1, reach), queries)
        yield first, stop, [sketch.below(stop) for sketch in sketches]
        first = stop

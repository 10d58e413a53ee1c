"""Bottom-k sketches: the `cap` pairs of smallest priority of every query, exactly.

A pair's priority for a query is a hash of both, so "the k smallest" is a fair sample that nobody
has to agree on: sketches of parts merge into the sketch of the whole, in any order, and the k-th
smallest priority is the threshold τ under which the query selects a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataset_build.hashing import U64, mix64

U32 = npt.NDArray[np.uint32]
Entries = npt.NDArray[np.void]
Bool = npt.NDArray[np.bool_]
Hash = Callable[[U64, U64, U32], U64]
"""(upper and lower halves of uids, query ids) -> priorities, all of one length."""

NO_LIMIT = np.uint64(2**64 - 1)
"""The threshold of a query with no more pairs than the cap: it selects all of them."""

ENTRY = np.dtype([("query_id", "<u4"), ("h", "<u8"), ("high", "<u8"), ("low", "<u8")])
"""A pair as a query sees it: its priority, then its uid, which decides between equal ones."""


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


def entries(high: U64, low: U64, query_id: U32, h: U64) -> Entries:
    """Sketch entries of (pair, query) matches, unsorted."""
    result = np.empty(h.size, ENTRY)
    result["query_id"], result["h"], result["high"], result["low"] = query_id, h, high, low
    return result


def smallest(found: Entries, cap: int) -> Entries:
    """The `cap` first entries of every query by (h, uid), sorted by query; repeats count once."""
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
        repeated = at[1:][tied[rank][1:] == tied[rank][:-1]]
    if repeated.size:
        order = np.delete(order, repeated)
    found = found[order]
    query_id = found["query_id"]
    start = np.flatnonzero(np.concatenate([[True], query_id[1:] != query_id[:-1]]))
    place = np.arange(found.size) - np.repeat(start, np.diff(np.append(start, found.size)))
    return found[place < cap]


def merge(sketches: Iterable[Entries], cap: int) -> Entries:
    """The sketch of a union from the sketches of its parts.

    Associative and commutative, and exact: whoever is among the `cap` first of all is among the
    `cap` first of its part. That also holds for parts that overlap.
    """
    return smallest(np.concatenate([np.zeros(0, ENTRY), *sketches]), cap)


def wanted(cap: int) -> int:
    """Entries that bounded sketches hold of a query on average, to hold `cap` almost surely."""
    return cap + 6 * math.isqrt(cap) + 38


def likely_bound(counts: U64, cap: int) -> U64:
    """Per query a priority under which the `cap` smallest of its `counts` almost surely lie.

    A uniform priority is below x·2⁶⁴ with probability x. With x = (k + 6√k + 38) / count the number
    below has mean k + 6√k + 38 and deviation at most its root, so fewer than k happens about once
    in 10⁹; `missing` tells. Of a capped query the sketches then hold about 1.04 k entries in all
    files together (k = 20,000), not k of each file. Queries that are not capped need none: 0.
    """
    share = np.minimum(wanted(cap) / np.maximum(counts, 1), 1.0)
    whole = share > 0.999
    bound = (np.where(whole, 0.0, share) * 2.0**64).astype(np.uint64)
    bound[whole] = NO_LIMIT
    bound[counts <= cap] = 0
    return bound


def missing(sketch: Entries, counts: U64, cap: int, first: int = 0) -> npt.NDArray[np.intp]:
    """Capped queries, from `first` on, of which the sketch holds fewer than `cap` entries."""
    held = np.bincount(sketch["query_id"].astype(np.int64) - first, minlength=counts.size)
    return first + np.flatnonzero((held < cap) & (counts > cap))


@dataclass(frozen=True)
class Thresholds:
    """What decides whether a query selects a pair: (h, uid) ≤ (τ, last uid)."""

    tau: U64
    """Per query, the priority of its last selected pair; `NO_LIMIT` if it selects all."""
    last: U64
    """[queries, 2]: the upper and lower half of that pair's uid; NO_LIMIT twice if all."""

    @classmethod
    def of(cls, sketch: Entries, counts: U64, cap: int, first: int = 0) -> Thresholds:
        """From what `smallest` gave for the capped ones of the queries from `first` on."""
        assert not missing(sketch, counts, cap, first).size, "the sketch lacks entries"
        tau = np.full(counts.size, NO_LIMIT)
        last = np.full((counts.size, 2), NO_LIMIT)
        capped = np.flatnonzero(counts > cap)
        end = np.searchsorted(sketch["query_id"], capped + first, side="right") - 1
        tau[capped] = sketch["h"][end]
        last[capped, 0], last[capped, 1] = sketch["high"][end], sketch["low"][end]
        return cls(tau, last)

    def admit(self, high: U64, low: U64, query_id: U32, h: U64) -> Bool:
        """Whether each match is among the `cap` first of its query."""
        tau = self.tau[query_id]
        chosen: Bool = h < tau
        (tied,) = np.nonzero(h == tau)
        if tied.size:  # each capped query's last pair at least
            last = self.last[query_id[tied]]
            chosen[tied] = (high[tied] < last[:, 0]) | (
                (high[tied] == last[:, 0]) & (low[tied] <= last[:, 1])
            )
        return chosen


def by_ranges(
    sketches: Sequence[Entries], expected: U64, most: int
) -> Iterator[tuple[int, int, list[Entries]]]:
    """Cut sorted sketches into ranges of queries with about `most` entries in all of them.

    Yields (first query, one past the last, that part of every sketch); a single query may exceed
    `most`. `expected`: entries per query, roughly.
    """
    total = np.cumsum(expected)
    edges = [0]
    while edges[-1] < expected.size:
        before = int(total[edges[-1] - 1]) if edges[-1] else 0
        edges.append(max(edges[-1] + 1, int(np.searchsorted(total, before + most, side="right"))))
    # Each sketch's query column is read once, whatever the number of ranges.
    bounds = [np.searchsorted(sketch["query_id"], edges) for sketch in sketches]
    for number in range(len(edges) - 1):
        parts = [s[b[number] : b[number + 1]] for s, b in zip(sketches, bounds, strict=True)]
        yield edges[number], edges[number + 1], parts

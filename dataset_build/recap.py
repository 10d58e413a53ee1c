"""The cap once more, over the pairs whose pictures are there.

`balance` selects some more pairs than the cap where `balance.spare` says so. Of those that survive,
every query keeps the first by priority: exactly min(survivors, cap), and never a pair that it had
not selected. No text, and no pair that was not selected, is looked at again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dataset_build import selection
from dataset_build.hashing import U64
from dataset_build.thresholds import (
    U32,
    Limit,
    Thresholds,
    entries,
    likely_bound,
    merge,
    missing,
    priority,
    wanted,
)

_RANGE_ENTRIES = 32_000_000  # of 28 bytes (36 with domains) held at once, and as much to sort them


@dataclass(frozen=True)
class Survivors:
    """Selections of kept pairs, of one file; arrays of one length."""

    row: selection.Rows
    query: U32
    high: U64
    low: U64
    domain: U64 | None


def recap(
    survivors: Callable[[], Iterator[Survivors]],
    counts: U64,
    limit: Limit,
    seed: int,
    range_entries: int = _RANGE_ENTRIES,
) -> Thresholds:
    """The thresholds under which the queries keep their survivors.

    `survivors` reads all of them, once for every `range_entries` that the capped queries hold;
    `counts`: how many each query has.
    """
    binds = limit.may_bind(counts)
    expected = np.where(binds, np.minimum(counts, wanted(limit.pairs)), 0).cumsum()
    edges = [0]
    while edges[-1] < counts.size:
        before = expected[edges[-1] - 1] if edges[-1] else 0
        reach = int(np.searchsorted(expected, before + range_entries, side="right"))
        edges.append(max(edges[-1] + 1, reach))
    bound = likely_bound(counts, limit)
    found = []
    for first, stop in itertools.pairwise(edges):
        sketch = np.zeros(0, limit.entry)
        wanted_here = binds.copy()
        wanted_here[:first] = wanted_here[stop:] = False
        for bounded in (True, False):
            if not wanted_here.any():
                break
            for part in survivors():
                at = np.flatnonzero(wanted_here[part.query])
                h = priority(seed)(part.high[at], part.low[at], part.query[at])
                if bounded:
                    near = h <= bound[part.query[at]]
                    at, h = at[near], h[near]
                domain = None if part.domain is None else part.domain[at]
                more = entries(part.high[at], part.low[at], part.query[at], h, domain)
                sketch = merge([sketch, more], limit)
            # Those of which the bound left too few, once in 10⁹, are read again without it.
            wanted_here[:] = False
            wanted_here[missing(sketch, counts[first:stop], limit, first)] = bounded
        found.append(Thresholds.of(sketch, counts[first:stop], limit, first))
    return Thresholds.join(found)

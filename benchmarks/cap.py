"""What "at most `cap` pairs a query" means, ours and MetaCLIP's way, on the same candidates.

MetaCLIP keeps a pair if any of its queries, one after the other, draws a random number below
cap / count. The numbers come from one generator a process, so what is drawn depends on the seed, on
the order of the pairs and on how they were cut into jobs. Ours hashes pair and query instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import balance
from dataset_build import selection
from dataset_build.balance import BalanceSettings, Mode, choose
from dataset_build.hashing import U64

Mask = npt.NDArray[np.bool_]
PARTS = 7

UIDS, QUERY_IDS = balance.pairs()
ROW, QUERY = selection.matches(QUERY_IDS)
COUNTS = selection.count(QUERY, balance.QUERIES)
CHARGED = selection.count(selection.rarest(ROW, QUERY, COUNTS)[1], balance.QUERIES)

# Figure -> its unit.
UNITS = {
    "pairs kept": "pairs",
    "queries that select more than min(count, cap)": "queries",
    "queries that select less": "queries",
    "most that one query selects": "pairs",
    "queries above the cap in the dataset": "queries",
    "overlap of two seeds": "Jaccard",
    "overlap of two partitionings": "Jaccard",
}


def _drawn(seed: int, parts: int) -> Mask:
    """MetaCLIP's draws: which matches let their query keep the pair."""
    chance = balance.CAP / np.maximum(COUNTS, balance.CAP)
    chosen = np.zeros(ROW.size, bool)
    for part in np.array_split(np.arange(ROW.size), parts):
        rng = np.random.default_rng(seed)  # every job starts its own generator
        chosen[part] = rng.random(part.size) < chance[QUERY[part]]
    return chosen


def _exact(mode: Mode, seed: int, parts: int) -> Mask:
    """Ours; `parts` is the order in which the pairs are looked at, as other jobs would."""
    order = np.concatenate([np.arange(n, balance.PAIRS, parts) for n in range(parts)])
    settings = BalanceSettings(cap=balance.CAP, seed=seed, mode=mode)
    found = choose(UIDS.take(order), QUERY_IDS.take(order), balance.QUERIES, settings)
    row, query = selection.matches(found)
    keys = order[row] * balance.QUERIES + query
    return np.isin(ROW * balance.QUERIES + QUERY, keys)


def _kept(chosen: Mask) -> Mask:
    kept = np.zeros(balance.PAIRS, bool)
    kept[ROW[chosen]] = True
    return kept


def _figures(choice: Callable[[int, int], Mask], counts: U64) -> list[float]:
    """The values of `UNITS`; `counts`: pairs that each query may select."""
    chosen = choice(0, 1)
    kept = _kept(chosen)
    selected = selection.count(QUERY[chosen], balance.QUERIES)
    in_dataset = selection.count(QUERY[kept[ROW]], balance.QUERIES)

    def overlap(other: Mask) -> float:
        also = _kept(other)
        return round(float((kept & also).sum() / (kept | also).sum()), 4)

    due = np.minimum(counts, balance.CAP)
    return [
        int(kept.sum()),
        int((selected > due).sum()),
        int((selected < due).sum()),
        int(selected.max()),
        int((in_dataset > balance.CAP).sum()),
        overlap(choice(1, 1)),
        overlap(choice(0, PARTS)),
    ]


def measure() -> Iterator[dict[str, Any]]:
    """A line for each figure: ours by quota, ours attributed, and MetaCLIP's."""
    quota = _figures(lambda seed, parts: _exact("quota", seed, parts), COUNTS)
    attributed = _figures(lambda seed, parts: _exact("attributed", seed, parts), CHARGED)
    drawn = _figures(_drawn, COUNTS)
    for figure, ours, charged, peer in zip(UNITS, quota, attributed, drawn, strict=True):
        yield {
            "name": f"cap: {figure}",
            "peer_name": "MetaCLIP's draws",
            "ours": ours,
            "ours_attributed": charged,
            "peer": peer,
            "ratio": round(ours / peer, 3) if peer else None,
            "unit": UNITS[figure],
            "pairs": balance.PAIRS,
            "queries": balance.QUERIES,
            "cap": balance.CAP,
            "capped_queries": int((COUNTS > balance.CAP).sum()),
        }

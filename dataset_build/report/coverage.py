"""How the queries are covered, from head to tail: candidates, selected pairs, packed pairs.

Everything is a count per query, gathered by streaming the columns of lists that hold query ids;
memory is a few arrays as long as the query list, whatever the number of pairs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build.report.published import Absent, Build

Counts = npt.NDArray[np.int64]

TOP = 30
CURVE_POINTS = 240
ZERO_EXAMPLES = 12
_BATCH = 1 << 16


@dataclass
class Packed:
    """Sums over `pack:index.parquet`; the first two hold one number a query."""

    chosen_by: Counts
    """Packed pairs that a query selected."""
    containing: Counts
    """Packed pairs in which a query occurs, whoever selected them."""
    pairs: int = 0
    caption_bytes: Counter[int] = field(default_factory=Counter)
    """Lower edge of a bin that doubles -> pairs."""
    shorter_side: Counter[int] = field(default_factory=Counter)
    """As above, of the stored picture's shorter side in pixels."""
    queries_a_pair: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Balanced:
    """What the balance stage knows of each query, as far as it got."""

    candidates: Counts | None = None
    """Pairs that contain it."""
    charged: Counts | None = None
    """Those of them that it may select; the cap is held against this."""
    selected: Counts | None = None
    containing: Counts | None = None
    """Selected pairs that contain it, whoever selected them."""


def doubling(values: npt.NDArray[Any]) -> Counter[int]:
    """A histogram over bins [2^k, 2^(k+1)), known by their lower edge; 0 has its own."""
    values = values.astype(np.int64)
    exponents = np.frexp(values.astype(np.float64))[1]  # 0 -> 0, else floor(log2) + 1
    counted = np.bincount(exponents) if len(values) else np.zeros(0, np.int64)
    return Counter({(1 << e >> 1): int(count) for e, count in enumerate(counted.tolist()) if count})


def read_packed(index: Path, queries: int) -> Packed:
    """One pass over the index, reading five of its columns."""
    sums = Packed(np.zeros(queries, np.int64), np.zeros(queries, np.int64))
    columns = ["query_ids", "selected_by", "text_bytes", "width", "height"]
    with pq.ParquetFile(index) as parquet:
        for batch in parquet.iter_batches(batch_size=_BATCH, columns=columns):
            sums.pairs += batch.num_rows
            sums.chosen_by += _per_query(batch.column("selected_by"), queries)
            sums.containing += _per_query(batch.column("query_ids"), queries)
            lengths = pc.list_value_length(batch.column("selected_by"))
            values, counted = np.unique(lengths.to_numpy(False), return_counts=True)
            sums.queries_a_pair.update(dict(zip(values.tolist(), counted.tolist(), strict=True)))
            sums.caption_bytes.update(doubling(batch.column("text_bytes").to_numpy(False)))
            sides = np.minimum(
                batch.column("width").to_numpy(False), batch.column("height").to_numpy(False)
            )
            sums.shorter_side.update(doubling(sides))
    return sums


def coverage(build: Build, packed: Packed | None) -> dict[str, Any]:
    """The report's `queries` section; see `gather` for its keys."""
    table = pq.read_table(build.need("queries", "queries.parquet")[0], columns=["sources", "text"])
    total = table.num_rows
    balanced = _balanced(build, total)
    candidates, selected = balanced.candidates, balanced.selected
    chosen = packed.chosen_by if packed else None
    cap = getattr(getattr(build.run.config, "balance", None), "cap", None)
    section: dict[str, Any] = {
        "total": total,
        "by_source": _by_source(table.column("sources"), candidates, selected, chosen),
        "cap": cap,
        "mode": getattr(getattr(build.run.config, "balance", None), "mode", None),
        "curves": {
            name: curve(counts)
            for name, counts in [
                ("candidates", candidates),
                ("selected", selected),
                ("packed", chosen),
            ]
            if counts is not None
        },
        "matches": {
            "candidates": _total(candidates),
            "selected": _total(selected),
            "packed": _total(chosen),
        },
        "effective": {
            "candidates": _effective(candidates),
            "selected": _effective(selected),
            "packed": _effective(chosen),
        },
        "zero_hit": None,
        "zero_examples": [],
        "capped": None,
        "bands": [],
        "top": [],
    }
    if candidates is None or balanced.charged is None:
        return section
    zero = np.flatnonzero(candidates == 0)
    section["zero_hit"] = len(zero)
    spread = zero[np.linspace(0, len(zero) - 1, min(ZERO_EXAMPLES, len(zero))).astype(int)]
    section["zero_examples"] = table.column("text").take(pa.array(spread, pa.int64())).to_pylist()
    section["bands"] = _bands(candidates, selected, chosen)
    if cap is not None:
        capped = balanced.charged > cap
        section["capped"] = {
            "queries": int(capped.sum()),
            "share_of_candidates": _share(candidates, capped),
            "share_of_selected": _share(selected, capped),
            "share_of_packed": _share(chosen, capped),
        }
    # A stable sort: queries with equal counts stay in order of admission.
    head = np.argsort(-candidates, kind="stable")[:TOP]
    head = head[candidates[head] > 0]
    rows = table.take(head).to_pylist()
    for query, row in zip(head.tolist(), rows, strict=True):
        section["top"].append(
            {
                "query_id": query,
                "text": row["text"],
                "sources": row["sources"],
                "candidates": int(candidates[query]),
                "selected": _at(selected, query),
                "packed": _at(chosen, query),
                "in_selected": _at(balanced.containing, query),
                "in_packed": _at(packed.containing if packed else None, query),
                "capped": cap is not None and bool(balanced.charged[query] > cap),
            }
        )
    return section


def curve(counts: Counts) -> list[list[int]]:
    """Counts in falling order as [rank, count], ranks from 1, thinned evenly in log rank.

    Queries without a pair are left out: a logarithmic axis has no place for them.
    """
    falling = np.sort(counts[counts > 0])[::-1]
    if not len(falling):
        return []
    ranks = np.unique(np.geomspace(1, len(falling), CURVE_POINTS).round().astype(np.int64))
    return [[rank, int(falling[rank - 1])] for rank in ranks.tolist()]


def texts(build: Build, query_ids: Sequence[int]) -> dict[int, str]:
    """The text of some queries."""
    paths = build.paths("queries", "queries.parquet")
    if not paths or not query_ids:
        return {}
    wanted = sorted(set(query_ids))
    column = pq.read_table(paths[0], columns=["text"]).column("text")
    known = [query for query in wanted if query < len(column)]
    found = column.take(pa.array(known, pa.int64())).to_pylist()
    return {query: text or "" for query, text in zip(known, found, strict=True)}


def _per_query(lists: Any, queries: int) -> Counts:
    ids = lists.flatten().to_numpy(zero_copy_only=False)
    counted: Counts = np.bincount(ids, minlength=queries)
    if len(counted) != queries:
        raise Absent("made from another query list than the present one; build again")
    return counted


def _balanced(build: Build, queries: int) -> Balanced:
    if not (counts := build.paths("balance", "counts.npy")):
        return Balanced()
    candidates: Counts = np.load(counts[0]).astype(np.int64)
    if len(candidates) != queries:
        raise Absent("balanced with another query list than the present one; build again")
    if checked := build.paths(
        "balance", "coverage.parquet"
    ):  # the stage's own sums, once it is done
        table = pq.read_table(checked[0], columns=["charged", "selected", "in_union"])
        return Balanced(candidates, *(c.to_numpy().astype(np.int64) for c in table.columns))
    selected, containing = np.zeros(queries, np.int64), np.zeros(queries, np.int64)
    paths = build.paths("balance", "selected-*.parquet")
    for path in paths:
        with pq.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(_BATCH, columns=["selected_by", "query_ids"]):
                selected += _per_query(batch.column("selected_by"), queries)
                containing += _per_query(batch.column("query_ids"), queries)
    if not paths:
        return Balanced(candidates, candidates)
    return Balanced(candidates, candidates, selected, containing)


def _by_source(
    sources: Any,
    candidates: Counts | None,
    selected: Counts | None,
    packed: Counts | None,
) -> dict[str, dict[str, int | None]]:
    lists = sources.combine_chunks()
    parents = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    names = pc.dictionary_encode(lists.flatten())
    codes = names.indices.to_numpy(zero_copy_only=False)
    result: dict[str, dict[str, int | None]] = {}
    for code, name in enumerate(names.dictionary.to_pylist()):
        queries = parents[codes == code]
        result[name] = {
            "queries": len(queries),
            "zero_hit": None if candidates is None else int((candidates[queries] == 0).sum()),
            "candidates": _total(candidates, queries),
            "selected": _total(selected, queries),
            "packed": _total(packed, queries),
        }
    return dict(sorted(result.items(), key=lambda item: (-(item[1]["queries"] or 0), item[0])))


def _bands(
    candidates: Counts, selected: Counts | None, packed: Counts | None
) -> list[dict[str, Any]]:
    """Queries by powers of ten of their candidates, and what part of all matches a band holds."""
    edges = [0, 1]
    while edges[-1] <= candidates.max(initial=0):
        edges.append(edges[-1] * 10)
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = (candidates >= low) & (candidates < high)
        rows.append(
            {
                "from": low,
                "to": high - 1,
                "queries": int(inside.sum()),
                "share_of_candidates": _share(candidates, inside),
                "share_of_selected": _share(selected, inside),
                "share_of_packed": _share(packed, inside),
            }
        )
    return rows[::-1]


def _share(counts: Counts | None, inside: npt.NDArray[np.bool_]) -> float | None:
    if counts is None or not (total := counts.sum()):
        return None
    return float(counts[inside].sum() / total)


def _total(counts: Counts | None, queries: npt.NDArray[Any] | None = None) -> int | None:
    if counts is None:
        return None
    return int(counts.sum() if queries is None else counts[queries].sum())


def _at(counts: Counts | None, query: int) -> int | None:
    return None if counts is None else int(counts[query])


def _effective(counts: Counts | None) -> float | None:
    """exp(entropy): how many equally frequent queries would be as diverse."""
    if counts is None or not (total := counts.sum()):
        return None
    shares = counts[counts > 0] / total
    return round(float(np.exp(-(shares * np.log(shares)).sum())), 1)

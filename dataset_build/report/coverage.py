"""How the queries are covered, from head to tail, at every step of a build."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build.report import per_query
from dataset_build.report.per_query import STEPS, Counts, Packed, PerQuery
from dataset_build.report.published import Absent, Build

TOP = 30
CURVE_POINTS = 240
ZERO_EXAMPLES = 12
FIRST = 5


def coverage(build: Build, packed: Packed | None) -> tuple[dict[str, Any], pa.Table]:
    """The report's `queries` section (see `gather` for its keys), and `per_query.table`."""
    path = build.need("queries", "queries.parquet")[0]
    queries = pq.read_table(path, columns=["sources", "text"])
    counts = per_query.read(build, queries.num_rows, packed)
    steps = counts.steps()
    balance = getattr(build.run.config, "balance", None)
    section: dict[str, Any] = {
        "total": queries.num_rows,
        "by_source": _by_source(
            queries, steps, build["queries"].stats.histograms.get("cut_off", {})
        ),
        **{key: getattr(balance, key, None) for key in ("cap", "mode", "spare", "domain_share")},
        "pending": _pending(build, steps),
        "curves": {step: curve(values) for step, values in steps.items() if values is not None},
        "matches": {step: _total(values) for step, values in steps.items()},
        "covered": {step: _covered(values) for step, values in steps.items()},
        "effective": {step: _effective(values) for step, values in steps.items()},
        "delta": None if counts.selected is None else _delta(build),
        "zero_hit": None,
        "zero_examples": [],
        "capped": None,
        "bands": [],
        "top": [],
    }
    if counts.deduplicated is not None:
        zero = np.flatnonzero(counts.deduplicated == 0)
        spread = zero[np.linspace(0, len(zero) - 1, min(ZERO_EXAMPLES, len(zero))).astype(int)]
        section["zero_hit"] = len(zero)
        section["zero_examples"] = _texts(queries, spread)
        section["bands"] = _bands(counts.deduplicated, steps)
        section["top"] = _top(build, queries, counts, section["cap"])
    if counts.charged is not None and section["cap"] is not None:
        capped = counts.charged > section["cap"]
        section["capped"] = {"queries": int(capped.sum()), **_shares(steps, capped)}
    return section, per_query.table(queries, counts)


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
    queries = pq.read_table(paths[0], columns=["text"])
    known = [query for query in sorted(set(query_ids)) if query < queries.num_rows]
    return dict(zip(known, _texts(queries, known), strict=True))


def _texts(queries: pa.Table, query_ids: Sequence[int] | npt.NDArray[np.int64]) -> list[str]:
    found = queries.column("text").take(pa.array(query_ids, pa.int64()))
    return [text or "" for text in found.to_pylist()]


def _pending(build: Build, steps: Mapping[str, Counts | None]) -> dict[str, str]:
    """Why a step has no counts yet."""
    reasons = {}
    for step, stage in STEPS.items():
        if steps[step] is None:
            try:
                state = build[stage].state
            except Absent as reason:
                reasons[step] = str(reason)
            else:
                reasons[step] = f"{stage}: {state}" + ", without them" * (state == "done")
    return reasons


def _delta(build: Build) -> dict[str, int] | None:
    """What differs from the selection before; None where balance compared with none."""
    if "balance" not in build:
        return None
    # Manifest by manifest: sums of counters forget a zero, which is an answer here.
    compared = [m.stats.counts for m in build["balance"].manifests]
    compared = [counts for counts in compared if "came" in counts or "went" in counts]
    if not compared:
        return None
    return {key: sum(counts[key] for counts in compared) for key in ("came", "went")}


def _top(
    build: Build, queries: pa.Table, counts: PerQuery, cap: int | None
) -> list[dict[str, Any]]:
    """The queries that most pairs contain."""
    assert counts.deduplicated is not None
    # A stable sort: queries with equal counts stay in order of admission.
    head = np.argsort(-counts.deduplicated, kind="stable")[:TOP]
    head = head[counts.deduplicated[head] > 0]
    domains = _domains(build, head.tolist())
    charged = counts.charged
    return [
        {
            "query_id": query,
            "text": row["text"],
            "sources": row["sources"],
            **{step: _at(values, query) for step, values in counts.steps().items()},
            "in_union": _at(counts.in_union, query),
            "in_packed": _at(counts.in_packed, query),
            "capped": cap is not None and charged is not None and bool(charged[query] > cap),
            "domains": domains[query] if domains is not None else None,
        }
        for query, row in zip(head.tolist(), queries.take(head).to_pylist(), strict=True)
    ]


def _domains(build: Build, wanted: Sequence[int]) -> dict[int, list[list[Any]]] | None:
    """Query -> [[domain, pairs that it selected from it]], largest first; None if unknown."""
    paths = build.paths("balance", "domains.parquet")
    if not paths:
        return None
    found: dict[int, list[list[Any]]] = {query: [] for query in wanted}
    for row in pq.read_table(paths[0]).to_pylist():  # ten rows for each of some queries
        if row["query_id"] in found:
            found[row["query_id"]].append([row["domain"], row["selected"]])
    return found


def _by_source(
    queries: pa.Table, steps: Mapping[str, Counts | None], cut_off: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    lists = queries.column("sources").combine_chunks()
    alone = pc.list_value_length(lists).to_numpy(zero_copy_only=False) == 1
    parents = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    names = pc.dictionary_encode(lists.flatten())
    codes = names.indices.to_numpy(zero_copy_only=False)
    first = np.flatnonzero(np.diff(parents, prepend=-1))  # of its sources, the one that brought it
    pairs = steps["deduplicated"]
    result: dict[str, dict[str, Any]] = {}
    for code, name in enumerate(names.dictionary.to_pylist()):
        own = parents[codes == code]
        result[name] = {
            "queries": len(own),
            "alone": int(alone[own].sum()),
            "brought": int((codes[first] == code).sum()),
            "first": _texts(queries, own[:FIRST]),
            "last": _texts(queries, own[FIRST:][-FIRST:]),
            "cut_off": cut_off.get(name, 0),
            "zero_hit": None if pairs is None else int((pairs[own] == 0).sum()),
            **{
                step: _total(None if values is None else values[own])
                for step, values in steps.items()
            },
        }
    return dict(sorted(result.items(), key=lambda item: (-item[1]["queries"], item[0])))


def _bands(pairs: Counts, steps: Mapping[str, Counts | None]) -> list[dict[str, Any]]:
    """Queries by powers of ten of their pairs, and what part of each step a band holds."""
    edges = [0, 1]
    while edges[-1] <= pairs.max(initial=0):
        edges.append(edges[-1] * 10)
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = (pairs >= low) & (pairs < high)
        queries = int(inside.sum())
        rows.append({"from": low, "to": high - 1, "queries": queries, **_shares(steps, inside)})
    return rows[::-1]


def _shares(
    steps: Mapping[str, Counts | None], inside: npt.NDArray[np.bool_]
) -> dict[str, float | None]:
    return {f"share_of_{step}": _share(values, inside) for step, values in steps.items()}


def _share(counts: Counts | None, inside: npt.NDArray[np.bool_]) -> float | None:
    if counts is None or not (total := counts.sum()):
        return None
    return float(counts[inside].sum() / total)


def _total(counts: Counts | None) -> int | None:
    return None if counts is None else int(counts.sum())


def _covered(counts: Counts | None) -> int | None:
    return None if counts is None else int(np.count_nonzero(counts))


def _at(counts: Counts | None, query: int) -> int | None:
    return None if counts is None else int(counts[query])


def _effective(counts: Counts | None) -> float | None:
    """exp(entropy): how many equally frequent queries would be as diverse."""
    if counts is None or not (total := counts.sum()):
        return None
    shares = counts[counts > 0] / total
    return round(float(np.exp(-(shares * np.log(shares)).sum())), 1)

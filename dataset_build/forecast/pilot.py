"""What a finished run tells about a larger one: what its tasks cost, and what passes each stage.

How many pairs a cap leaves does not follow from a ratio: queries that the pilot's few pairs leave
below the cap are over it in a larger build. `under_cap` works that out from the pilot's queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq

from dataset_build import selection
from dataset_build.balance import BalanceSettings
from dataset_build.hashing import U64
from dataset_build.thresholds import likely_bound
from pipeline.files import open_parquet
from pipeline.manifest import Manifest
from pipeline.rates import Figure, Observation
from pipeline.remote import is_remote
from pipeline.stage import Run, Task
from pipeline.stats import Stats

STAGES = ("queries", "extract", "match", "dedup", "balance", "download", "screen", "pack")
_SAMPLE_PAIRS = 1_000_000  # looked at for the cap; the share is then known to 0.1 %
_LONGEST_GAP_S = 60  # between two stages of one build; longer ones are a person's


def kind_of(task: Task) -> str:
    """The kind of a task: its stage and what its parameters say that it does."""
    params = task.params
    names = {
        "queries": params.get("step"),
        "extract": params.get("kind"),
        "match": params.get("phase"),
        "dedup": params.get("phase"),
        "balance": params.get("phase"),
        "screen": params.get("phase"),
        "pack": "gather" if params.get("gather") else "shard",
    }
    return f"{task.stage}.{names.get(task.stage) or 'all'}"


def observations(run: Run) -> list[Observation]:
    """What every task of a run's dataset stages cost, those that are done."""
    return [one for stage in STAGES for one in _observed(run, stage)]


def _observed(run: Run, stage: str) -> Iterator[Observation]:
    manifests = {manifest.index: manifest for manifest in run.manifests(stage)}
    stats = total(manifests.values())
    picture = picture_bytes(run)
    for planned in run.plan(stage):
        if (done := manifests.get(planned.task.index)) is None:
            continue
        kind = kind_of(planned.task)
        unit, units = _size(run, planned.task, done, kind, stats)
        kept = float(sum(output.bytes for output in done.outputs))
        if stage == "extract":
            kept = 0.0  # its rows are reckoned by themselves, `candidate_bytes`
        elif kind in ("download.all", "pack.shard"):
            kept -= done.stats.rows_out * picture
        yield Observation(kind, unit, units, done.seconds, done.memory_mb, kept, len(done.outputs))


def _size(run: Run, task: Task, done: Manifest, kind: str, stage: Stats) -> tuple[str, float]:
    """What the time of a task grows with, and how much of it there was."""
    if kind == "queries.assemble":
        return "queries", done.stats.rows_out
    if task.stage in ("queries", "extract"):
        return "bytes", _bytes_read(run, task, done)
    if kind == "match.matcher":
        return "queries", done.stats.counts["queries"]
    if kind == "dedup.snapshot":
        return "pairs", done.stats.counts["pairs_of_snapshots"]
    if kind in ("balance.total", "balance.check"):
        arrays = sum(reference.startswith("dedup:") for reference in task.reads)
        return "counts", queries(run) * arrays
    if kind == "balance.sketch":
        return "pairs", pq.read_metadata(run.path(task.reads[0])).num_rows
    if kind == "balance.thresholds":
        return "sketch entries", stage.counts["sketch_entries"]
    if task.stage == "screen":
        return _size_of_screening(run, task, done, stage)
    if kind == "pack.gather":
        return "pairs", stage.rows_out
    return "rows", done.stats.rows_in


def _bytes_read(run: Run, task: Task, done: Manifest) -> int:
    """Of files that are here or a part of one, and of those that were fetched."""
    if "bytes" in task.params and task.stage == "extract":
        return int(task.params["bytes"])
    here = [run.path(reference) for reference in task.reads if not is_remote(reference)]
    return done.stats.counts["bytes_fetched"] + sum(path.stat().st_size for path in here)


def _size_of_screening(run: Run, task: Task, done: Manifest, stage: Stats) -> tuple[str, float]:
    params, pictures = task.params, stage.counts["pictures_looked_at"]
    match params["phase"]:
        case "look":
            return "pictures", done.stats.counts["pictures_looked_at"]
        case "evaluation":
            return "pictures", done.stats.counts["evaluation_pictures"]
        case "collect":
            return "pictures", pictures
        case "near":  # all pictures for every part, or a share of them
            return "pictures and parts", pictures * sum(
                1 / ranges for *_, ranges in params["slots"]
            )
        case "compare":
            first, last = params["rows"]
            return "pictures", last - first
    return "pairs", total(run.manifests("download")).rows_in


def figures(run: Run, name: str) -> dict[str, Figure]:
    """Shares of rows that pass each stage, and bytes and requests of a picture."""
    found: dict[str, float] = {}
    stats = {stage: total(run.manifests(stage)) for stage in STAGES}
    for stage in ("match", "dedup", "balance", "download", "screen"):
        if stats[stage].rows_in:
            found[f"{stage}.share"] = stats[stage].rows_out / stats[stage].rows_in
    for kind in ("wat", "warc", "pool"):
        size = rows = 0
        manifests = {manifest.index: manifest for manifest in run.manifests("extract")}
        for planned in run.plan("extract"):
            done = manifests.get(planned.task.index)
            if done and planned.task.params["kind"] == kind:
                size += _bytes_read(run, planned.task, done)
                rows += done.stats.rows_out
        if rows:
            found[f"extract.{kind}.rows_per_byte"] = rows / size
    if rows := stats["extract"].rows_out:
        outputs = (output for done in run.manifests("extract") for output in done.outputs)
        found["candidate_bytes"] = sum(output.bytes for output in outputs) / rows
    if stats["match"].rows_out:
        pairs = stats["dedup"].counts["pairs_of_snapshots"]
        found["dedup.snapshot_share"] = pairs / stats["match"].rows_out
    if addresses := stats["download"].rows_in:
        counts = stats["download"].counts
        found["download.requests"] = counts["requests"] / addresses
        found["download.received_bytes"] = counts["bytes_received"] / addresses
        found["download.network_s"] = 0.0  # the run's own seconds hold it
    if picture := picture_bytes(run):
        found["picture_bytes"] = picture
    within, between = _gaps(run)
    if within and between:
        start_s = found["start_s"] = fmean(within)
        found["stage_s"] = max(0.0, fmean(between.values()) - start_s)
        for stage, gap in between.items():
            found[f"{stage}.stage_s"] = max(0.0, gap - start_s)
    return {key: Figure(value, f"measured in {name}") for key, value in found.items()}


def picture_bytes(run: Run) -> float:
    """Bytes of a stored picture, on average; 0 where none is packed."""
    stats = total(run.manifests("pack"))
    return stats.counts["picture_bytes"] / stats.rows_out if stats.rows_out else 0.0


def queries(run: Run) -> int:
    """Length of the run's query list; 0 where there is none."""
    outputs = (output for done in run.manifests("queries") for output in done.outputs)
    return sum(output.rows or 0 for output in outputs if output.name == "queries.parquet")


def _gaps(run: Run) -> tuple[list[float], dict[str, float]]:
    """Seconds in which no task was at work: between phases of a stage, and before each stage.

    In the first a process ends, plans are made and the next process starts; in the second the stage
    is put in order as well.
    """
    within: list[float] = []
    between: dict[str, float] = {}
    ended: float | None = None
    for stage in STAGES:
        done = sorted(run.manifests(stage), key=lambda one: one.finished - one.seconds)
        for place, manifest in enumerate(done):
            gap = 0.0 if ended is None else manifest.finished - manifest.seconds - ended
            if 0 < gap < _LONGEST_GAP_S:
                if place:
                    within.append(gap)
                else:
                    between[stage] = gap
            ended = max(ended or 0.0, manifest.finished)
    return within, between


@dataclass(frozen=True)
class Cap:
    """What a cap leaves of a build's pairs."""

    share: float
    """Selected pairs per pair."""
    entries: float
    """Sketch entries in all: what the thresholds are found from."""
    bound: int
    """Queries that have more pairs than they may select."""


def under_cap(run: Run, growth: float, settings: BalanceSettings, files: int) -> Cap | None:
    """The cap's effect on `growth` times the pairs of a run; None where `dedup` is not done.

    `files`: how many files of pairs there will be, each with a sketch of its own.

    Each query then has `growth` times its pairs and selects one with probability
    p = min(1, cap / count), and a pair is in the dataset with probability 1 - Π(1 - p).
    Queries that the run has not met stay without pairs, and `domain_share` is not reckoned with, so
    a larger build may differ to either side.
    """
    paths = [
        run.path(f"dedup:{output.name}")
        for done in run.manifests("dedup")
        for output in done.outputs
        if output.name.startswith(("pairs-", "count-"))
    ]
    count_paths = [path for path in paths if path.name.startswith("count-")]
    if not count_paths:
        return None
    counts: U64 = np.sum([np.load(path) for path in count_paths], axis=0)
    grown = np.maximum(counts * growth, 1)
    limit = settings.limit
    chance = np.minimum(1.0, limit.pairs / grown)
    selected = rows = 0.0
    for path in (path for path in paths if path.name.startswith("pairs-")):
        with open_parquet(path) as pairs:
            for batch in pairs.iter_batches(65_536, columns=["query_ids"]):
                row, query = selection.matches(batch["query_ids"])
                if settings.mode == "attributed":
                    row, query = selection.rarest(row, query, counts)
                selected += float(selection.probability(row, chance[query], len(batch)).sum())
                rows += len(batch)
                if rows >= _SAMPLE_PAIRS:
                    break
        if rows >= _SAMPLE_PAIRS:
            break
    # A sketch takes in the pairs below a bound that hardly ever fails, but no more than the cap.
    whole = grown.astype(np.uint64)
    within = likely_bound(whole, settings.depth) / 2.0**64 * grown
    entries = np.minimum(within, float(files) * settings.depth.pairs).sum()
    bound = int(limit.may_bind(whole).sum())
    return Cap(selected / rows if rows else 0.0, float(entries), bound)


def total(manifests: Iterable[Manifest]) -> Stats:
    """The sum of some manifests' statistics."""
    return sum((manifest.stats for manifest in manifests), Stats())

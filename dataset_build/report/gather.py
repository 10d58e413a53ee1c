"""Everything the report knows, as one dictionary of JSON values; RUN/report/report.json is it.

Keys (a section that cannot be written yet is null, and `absent` says why):

- `run`, `updated` (Unix time of the newest manifest), `fingerprint` (of the packed dataset)
- `stages`: name, unit, state, tasks_done, tasks_planned,
  tasks_left_out [reasons], rows_in, rows_out, dropped {reason: rows},
  counts, histograms, warnings {input: what is wrong}, bytes (published), seconds (task time),
  balanced
- `funnel`: the stages that pairs pass, of `stages`: name, rows_in, rows_out, dropped
- `accounting`: balanced (every row of every stage is out or dropped), handovers [from, to,
  rows_out, rows_in, equal: null while a stage is unfinished]
- `queries`: total, zero_hit (queries that no pair contains), zero_examples, cap, mode, spare and
  domain_share as configured, pending {step: why it has no counts yet}, delta {came, went} (pairs,
  against the selection before; null if there is none). A STEP is one of raw (candidates that
  contain a query, repeats counted), deduplicated (pairs that contain it), selected (those that it
  chose), downloaded, packed. For each there is, null where the build has not come so far:
  - matches {STEP: sum over queries}, covered {STEP: queries with a pair}, effective {STEP:
    exponential of the entropy}, curves {STEP: [[rank, pairs]]}
  - by_source {source: queries (that it names), alone (that no other does), brought (that none
    before it does), first, last (some texts, in order of admission), cut_off (by queries.limit),
    zero_hit, STEP}
  - bands [from, to (deduplicated pairs of a query), queries, share_of_STEP]
  - capped: queries (that may select more than the cap), share_of_STEP
  - top [query_id, text, sources, STEP, in_union and in_packed (pairs of the selection and of the
    dataset that contain it, whoever selected them), capped, domains [[registered domain, pairs that
    the query selected from it]], the largest first]
- `downloads`: total (pairs), outcomes {status: pairs}, http_status, shorter_side {pixels: pairs},
  addresses (several pairs may share one), staged_bytes, received_bytes
- `screening`: pictures, kept, dropped {reason: pairs}, captions_merged, evaluation {set:
  {pictures, undecodable, too_plain} (of the set), {exact, near} (pairs, whatever they were dropped
  for)}, lists {reason: {address, file, picture, uid}},
  scores {name: {dropped, values {score to one digit: pairs}}}
- `dataset`: pairs, bytes, shards [name, samples, bytes, sha256], caption_bytes, shorter_side,
  queries_a_pair
- `pictures`: uid, shard, caption, width, height, selected_by, query_ids (texts of the queries)
- `training`: steps, samples (seen so far), of_samples (to be seen), model (its name), parameters,
  dataset (fingerprint of what it is trained on), pairs (in that), device, processes, last (line of
  metrics.jsonl), curves {loss, accuracy: [[step, value]]}, lines_a_point (lines of metrics.jsonl
  that a point is the mean of), page (of all curves, relative to this report's folder; null without
  one)
- `evaluation`: {dataset: {top1, top5, classes, images, chance}}
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build import removed
from dataset_build.report import coverage, per_query, pictures, training
from dataset_build.report.published import Absent, Build, Published
from dataset_build.report.screening import screening
from pipeline import files
from pipeline.stage import Run, Stage

PAIRS_PASS = ("extract", "match", "dedup", "balance", "download", "screen", "pack")
_BATCH = 1 << 16

T = TypeVar("T")


class Gathered(NamedTuple):
    """A report, and what is too large for JSON."""

    report: dict[str, Any]
    sampled: list[pictures.Picture]
    """The pictures with their bytes, which only the page carries."""
    queries: pa.Table | None
    """`per_query.table`; None where the report has no `queries` either."""


def gather(run: Run, stages: Sequence[Stage]) -> Gathered:
    """Read what the stages have published so far."""
    build = Build(run, stages)
    absent: dict[str, str] = {}
    packed = _section(absent, "dataset", lambda: _read_packed(build))
    sampled = _section(absent, "pictures", lambda: _pictures(build)) or []
    queries, table = _section(absent, "queries", lambda: coverage.coverage(build, packed)) or (
        None,
        None,
    )
    overview = [_stage(published) for published in build.values()]
    finished = [manifest.finished for p in build.values() for manifest in p.manifests]
    report = {
        "run": str(run.folder),
        "updated": max(finished, default=None),
        "fingerprint": None,
        "stages": overview,
        "funnel": [stage for stage in overview if stage["name"] in PAIRS_PASS],
        "accounting": _accounting(overview),
        "queries": queries,
        "downloads": _section(absent, "downloads", lambda: _downloads(build)),
        "screening": _section(absent, "screening", lambda: screening(build)),
        "dataset": None,
        "pictures": _described(build, sampled) if sampled else None,
        "training": _section(absent, "training", lambda: training.curves(build)),
        "evaluation": _section(absent, "evaluation", lambda: training.evaluation(build)),
        "absent": absent,
    }
    if packed is not None:
        report["dataset"] = dataset = _dataset(build["pack"], packed)
        report["fingerprint"] = dataset["fingerprint"]
    plain: dict[str, Any] = strict(report)
    return Gathered(plain, sampled, table)


def strict(value: Any) -> Any:
    """`value` with only what JSON allows: no NaN or infinity, names as strings, plain numbers."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def ranked(counts: Mapping[str, int]) -> dict[str, int]:
    """Largest first, ties by name; nothing that is 0."""
    return dict(sorted(((k, v) for k, v in counts.items() if v), key=lambda kv: (-kv[1], kv[0])))


def _section(absent: dict[str, str], name: str, make: Callable[[], T]) -> T | None:
    """A section, or None with the reason noted: a report never fails for want of an input."""
    try:
        return make()
    except Absent as reason:
        absent[name] = str(reason)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        absent[name] = f"could not be read: {error}"
    return None


def _stage(published: Published) -> dict[str, Any]:
    stats = published.stats
    return {
        "name": published.name,
        "unit": published.unit,
        "state": published.state,
        "tasks_done": len(published.manifests),
        "tasks_planned": published.planned,
        "tasks_left_out": list(published.left_out),
        "rows_in": stats.rows_in,
        "rows_out": stats.rows_out,
        "dropped": ranked(stats.dropped),
        "counts": dict(sorted(stats.counts.items())),
        "warnings": dict(sorted(stats.warnings.items())),
        "histograms": {name: _bins(bins) for name, bins in sorted(stats.histograms.items())},
        "bytes": sum(output.bytes for _, output in _outputs(published)),
        "seconds": round(sum(manifest.seconds for manifest in published.manifests), 3),
        "balanced": stats.balanced(),
    }


def _outputs(published: Published) -> list[tuple[str, Any]]:
    return [(output.name, output) for m in published.manifests for output in m.outputs]


def _bins(bins: Mapping[str, int]) -> dict[str, int]:
    """Bins in the order of the number that their label begins with, the others after, by name."""

    def order(label: str) -> tuple[float, str]:
        digits = label.lstrip("<>=~ ")
        length = next((i for i, c in enumerate(digits) if c not in "0123456789.-"), len(digits))
        try:
            return float(digits[:length].rstrip("-.")), label
        except ValueError:
            return math.inf, label

    return {label: bins[label] for label in sorted(bins, key=order)}


def _accounting(overview: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    chain = [stage for stage in overview if stage["name"] in PAIRS_PASS]
    handovers = []
    for before, after in itertools.pairwise(chain):
        done = before["state"] == after["state"] == "done"
        equal = before["rows_out"] == after["rows_in"]
        handovers.append(
            {
                "from": before["name"],
                "to": after["name"],
                "rows_out": before["rows_out"],
                "rows_in": after["rows_in"],
                "equal": equal if done else None,
            }
        )
    return {"balanced": all(stage["balanced"] for stage in overview), "handovers": handovers}


def _downloads(build: Build) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    http: Counter[str] = Counter()
    shorter_side: Counter[int] = Counter()
    columns = ["status", "http_status", "original_width", "original_height"]
    for path in build.need("download", "fetched-*.parquet"):
        with files.open_parquet(path) as parquet:
            for batch in parquet.iter_batches(batch_size=_BATCH, columns=columns):
                outcomes.update(_values(batch.column("status")))
                http.update(_values(batch.column("http_status").cast(pa.string())))
                good = batch.filter(pc.equal(batch.column("status"), pa.scalar("ok")))
                sides = [
                    good.column(name).fill_null(0).to_numpy(False)
                    for name in ("original_width", "original_height")
                ]
                shorter_side.update(per_query.doubling(np.minimum(*sides)))
    stage = build["download"]
    return {
        "total": outcomes.total(),
        "outcomes": ranked(outcomes),
        "http_status": ranked(http),
        "shorter_side": dict(sorted(shorter_side.items())),
        "staged_bytes": sum(output.bytes for output, _ in stage.outputs("staged-*.tar")),
        "received_bytes": stage.stats.counts.get("bytes_received"),
        "addresses": stage.stats.counts.get("addresses"),
    }


def _values(column: Any) -> dict[str, int]:
    counted: list[dict[str, Any]] = pc.value_counts(column).to_pylist()
    return {str(row["values"]): row["counts"] for row in counted if row["values"] is not None}


def _read_packed(build: Build) -> per_query.Packed:
    index = build.need("pack", "index.parquet")[0]
    queries = build.need("queries", "queries.parquet")[0]
    return per_query.read_packed(index, pq.read_metadata(queries).num_rows)


def _dataset(pack: Published, packed: per_query.Packed) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for path in pack.paths("dataset.json"):
        described = json.loads(path.read_bytes())
    samples = {
        shard["name"].rpartition("/")[2]: shard.get("samples")
        for shard in described.get("pairs_by_shard", ())
    }
    shards = []
    for output, _ in pack.outputs("shards/*.tar"):
        name = output.name.rpartition("/")[2]
        shards.append(
            {
                "name": name,
                "samples": samples.get(name, (output.rows or 0) // 3),  # jpg, txt and json each
                "bytes": output.bytes,
                "sha256": output.sha256,
            }
        )
    return {
        "fingerprint": described.get("fingerprint"),
        "pairs": packed.pairs,
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
        "caption_bytes": dict(sorted(packed.caption_bytes.items())),
        "shorter_side": dict(sorted(packed.shorter_side.items())),
        "queries_a_pair": dict(sorted(packed.queries_a_pair.items())),
    }


def _pictures(build: Build) -> list[pictures.Picture]:
    index = build.need("pack", "index.parquet")[0]
    shards: dict[str, Path] = {
        output.name.rpartition("/")[2]: path
        for output, path in build["pack"].outputs("shards/*.tar")
    }
    gone = set(removed.uids(build.run.folder))  # from the shards, perhaps, only by the next build
    sampled = pictures.sample(index, shards, gone=gone)
    if not sampled:
        raise Absent("the dataset holds no pair")
    return sampled


def _described(build: Build, sampled: Sequence[pictures.Picture]) -> list[dict[str, Any]]:
    ids = [query for picture in sampled for query in (*picture.selected_by, *picture.query_ids)]
    texts = coverage.texts(build, ids)

    def names(queries: Sequence[int]) -> list[str]:
        return [texts.get(query, f"#{query}") for query in queries]

    return [
        {
            "uid": picture.uid,
            "shard": picture.shard,
            "caption": picture.caption,
            "width": picture.width,
            "height": picture.height,
            "selected_by": names(picture.selected_by),
            "query_ids": names(picture.query_ids),
        }
        for picture in sampled
    ]

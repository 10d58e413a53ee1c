"""The report of a run: RUN/report/report.json for programs, RUN/report/index.html for people.

It is the sum of the manifests, so it may be written at any moment of a build; what is not there
yet is left out, with a line that says why. The keys of report.json are listed in `gather`.
RUN/report/queries.parquet has one row a query with its pairs at every step, null where the build
has not come so far; the columns are those of `per_query.PerQuery`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.files import write_atomic
from pipeline.stage import Run, Stage

_TOP_REASONS = 3


def write(run: Run, stages: Sequence[Stage]) -> Path:
    """Write all files anew and return the page's path. Reads published outputs, changes none."""
    from dataset_build.report.gather import gather
    from dataset_build.report.page import page
    from dataset_build.report.per_query import parquet

    report, sampled, queries = gather(run, stages)
    folder = run.folder / "report"
    if queries is None:
        (folder / "queries.parquet").unlink(missing_ok=True)  # of an earlier query list
    else:
        write_atomic(folder / "queries.parquet", parquet(queries))
    text = json.dumps(report, ensure_ascii=False, allow_nan=False, indent=1)
    write_atomic(folder / "report.json", text + "\n")
    write_atomic(folder / "index.html", page(report, sampled))
    return folder / "index.html"


def summary_lines(run: Run, stages: Sequence[Stage]) -> list[str]:
    """How a run ended, as plain lines for a terminal: stages, accuracy, and what to open."""
    from dataset_build.report.published import Absent, Build
    from dataset_build.report.training import evaluation

    build = Build(run, stages)
    rows = [("stage", "tasks", "in", "out", "dropped", "most of it")]
    for stage in build.values():
        stats = stage.stats
        reasons = stats.dropped.most_common()
        reasons.sort(key=lambda item: (-item[1], item[0]))
        named = [f"{reason} {rows:,}" for reason, rows in reasons[:_TOP_REASONS]]
        more = len(reasons) - len(named)
        done = bool(stage.manifests)
        left_out = f" ({len(stage.left_out)} left out)" if stage.left_out else ""
        rows.append(
            (
                stage.name,
                f"{len(stage.manifests)}/{stage.planned or '?'}{left_out}",
                f"{stats.rows_in:,}" if done else "",
                f"{stats.rows_out:,} {stage.unit}" if done else stage.state,
                f"{sum(stats.dropped.values()):,}" if done else "",
                " · ".join(named) + (f" · {more} more" if more > 0 else ""),
            )
        )
    lines = _aligned(rows, left=(0, 5))
    try:
        results = evaluation(build)
    except Absent as reason:
        lines += ["", f"accuracy: {reason}"]
    else:
        scores = [("zero-shot accuracy", "top-1", "top-5", "chance", "classes", "pictures")]
        for name, result in results.items():
            top1, top5, chance = (_percent(result[key]) for key in ("top1", "top5", "chance"))
            classes, images = (_number(result[key]) for key in ("classes", "images"))
            scores.append((name, top1, top5, chance, classes, images))
        lines += ["", *_aligned(scores, left=(0,))]
    lines.append("")
    for name, path in (
        ("report", run.folder / "report" / "index.html"),
        ("training", run.stage_folder("train") / "training.html"),
        ("dataset", run.stage_folder("pack") / "out" / "dataset.json"),
        ("shards", run.stage_folder("pack") / "out" / "shards"),
        ("model", run.stage_folder("train") / "out"),
    ):
        if path.exists():
            lines.append(f"{name:<8} {path}")
    return lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

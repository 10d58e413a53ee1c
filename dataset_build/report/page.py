"""The report as one self-contained page: a template, inline style and SVG, no script, no request.

Captions, queries and names come from strangers: the template escapes everything, and the page's
own content policy forbids scripts and requests besides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dataset_build.report.per_query import STEPS
from dataset_build.report.pictures import Picture
from dataset_build.report.published import NOT_PART
from pipeline import charts, pages
from pipeline.pages import number

SECTIONS = {
    name: name.capitalize()
    for name in (
        *("stages", "funnel", "queries", "downloads", "screening", "dataset", "pictures"),
        *("training", "evaluation"),
    )
}
"""Keys of the report that the page shows, if there is something to show, with their headings."""
REFUSALS = {
    "duplicate": "named before, by another source or in another spelling",
    "below_min_count": "distinct words rarer than queries.min_word_count",
    "below_min_bigram_count": "bigrams rarer than queries.min_bigram_count",
    "below_min_bigram_pmi": "bigrams whose words meet hardly more often than by chance",
    "over_max_bigrams": "bigrams after the first queries.max_bigrams",
    "below_min_views": "articles viewed less than queries.min_views",
    "not_an_article": "titles viewed that are no article of the dump, nor lead to one",
    "disambiguation_page": "titles of pages that only tell homonyms apart",
    "over_max_titles": "titles after the first queries.max_titles",
    "no_letter_or_number": "nothing is left of them once they are normalised",
    "over_limit": "there are queries.limit queries; the table above has them by source",
}
"""Why terms became no queries, in words."""
_LISTED_SHARDS = 40
_LISTED_DOMAINS = 3
_HALF, _THIRD = 380, 250  # widths of charts that stand in two or three columns, pixels


def page(report: Mapping[str, Any], sampled: Sequence[Picture]) -> str:
    """HTML of a report that `gather` made; `sampled` brings the bytes of its pictures."""
    return (
        pages.environment(Path(__file__).parent)
        .get_template("page.html.j2")
        .render(
            r=report,
            name=Path(report["run"]).resolve().name,
            shown={name: SECTIONS[name] for name in SECTIONS if _has_something(report, name)},
            missing={
                SECTIONS[name]: reason
                for name in SECTIONS
                if not (reason := report["absent"].get(name, NOT_PART)).endswith(NOT_PART)
            },
            updated=_date(report["updated"]),
            built_up_to=_built_up_to(report["stages"]),
            funnel=funnel(report["funnel"]),
            charts=_charts(report),
            thumbnails=[picture.data for picture in sampled],
            listed_shards=_LISTED_SHARDS,
            listed_domains=_LISTED_DOMAINS,
            steps=list(STEPS),
            refusals=REFUSALS,
        )
    )


def _built_up_to(stages: Sequence[Mapping[str, Any]]) -> str:
    """The last stage of a build that ends before the dataset, if all are done; else ""."""
    names = [stage["name"] for stage in stages]
    is_done = all(stage["state"] == "done" for stage in stages)
    return names[-1] if names and is_done and not {"pack", "train"} & set(names) else ""


def _has_something(report: Mapping[str, Any], section: str) -> bool:
    if section == "funnel":
        return any(stage["tasks_done"] for stage in report["funnel"])
    return bool(report[section])


def funnel(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bar lengths in percent: linear while the smallest bar can still be seen, else logarithmic."""
    values = [v for s in stages for v in (s["rows_in"], s["rows_out"]) if v]
    largest = max(values, default=1)
    log = min(values, default=1) < largest / 100

    def length(value: int) -> float:
        share = math.log1p(value) / math.log1p(largest) if log else value / largest
        return round(100 * share, 2)

    rows = [
        {
            **stage,
            "in_length": length(stage["rows_in"]),
            "out_length": length(stage["rows_out"]),
        }
        for stage in stages
    ]
    return {"scale": "logarithmic" if log else "linear", "rows": rows}


def _charts(report: Mapping[str, Any]) -> dict[str, Markup]:
    made: dict[str, Markup] = {}
    if queries := report["queries"]:
        made["coverage"] = charts.lines(
            # Empty ones too: a step keeps its colour whatever else is there.
            [charts.Series(step, queries["curves"].get(step, [])) for step in STEPS],
            title="Pairs per query, from the most to the least frequent query",
            x_label="queries, most frequent first (rank)",
            y_label="pairs per query",
            log=True,
            mark=queries["cap"],
            mark_label=f"cap {number(queries['cap'])}",
        )
    if downloads := report["downloads"]:
        made["original_side"] = _sides(downloads["shorter_side"], "as fetched", _HALF)
    for name, score in (report["screening"] or {}).get("scores", {}).items():
        made[f"score:{name}"] = charts.columns(
            score["values"],
            title=f"Pictures by their score {name}",
            x_label=name,
            width=_HALF,
        )
    if dataset := report["dataset"]:
        made["stored_side"] = _sides(dataset["shorter_side"], "as stored", _THIRD)
        made["captions"] = charts.columns(
            _between(dataset["caption_bytes"]),
            title="Pairs by the length of the caption",
            x_label="caption, bytes",
            width=_THIRD,
        )
        made["queries_a_pair"] = charts.columns(
            _tail(dataset["queries_a_pair"]),
            title="Pairs by the number of queries that selected them",
            x_label="queries that selected the pair",
            width=_THIRD,
        )
    if training := report["training"]:
        for name, y_range in (("loss", None), ("accuracy", (0.0, 1.0))):
            made[name] = charts.lines(
                [charts.Series(name, training["curves"][name])],
                title=f"{name} over training steps",
                x_label="step",
                y_label="loss" if name == "loss" else "in-batch accuracy",
                y_range=y_range,
                width=_HALF,
                height=240,
            )
    return made


def _sides(bins: Mapping[str, int], state: str, width: int) -> Markup:
    return charts.columns(
        _between(bins),
        title=f"Pictures by their shorter side, {state}",
        x_label=f"shorter side {state}, pixels",
        width=width,
    )


def _between(bins: Mapping[str, int]) -> dict[str, int]:
    """Doubling bins under their range, the empty ones between them included."""
    edges = sorted(int(edge) for edge in bins)
    labelled: dict[str, int] = {}
    edge = edges[0] if edges else 0
    while edges and edge <= edges[-1]:
        last = max(2 * edge - 1, 0)
        label = str(edge) if last <= edge else f"{edge}\u2013{last}"
        labelled[label] = bins.get(str(edge), 0)
        edge = 2 * edge or 1
    return labelled


def _tail(bins: Mapping[str, int], limit: int = 8) -> dict[str, int]:
    """Bins 0, 1, 2, …, with everything from `limit` on in the last."""
    kept = {int(key): count for key, count in bins.items()}
    last = min(max(kept, default=0), limit)
    first = min(min(kept, default=0), last)
    labelled = {str(i): kept.get(i, 0) for i in range(first, last + 1)}
    if more := sum(count for key, count in kept.items() if key > last):
        labelled[f"≥{last}"] = labelled.pop(str(last)) + more
    return labelled


def _date(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)) if seconds else ""

"""What screening found: duplicates, pictures of evaluation sets, what lists name, scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataset_build.report.published import Build


def screening(build: Build) -> dict[str, Any]:
    """The section `screening` of report.json; raises `Absent` before the stage's last task."""
    build.need("screen", "downloaded.npy")
    stats = build["screen"].stats
    files, hits = _of("evaluation_set", stats.histograms), _of("evaluation", stats.histograms)
    return {
        "pictures": stats.rows_in,
        "kept": stats.rows_out,
        "dropped": {reason: stats.dropped[reason] for reason in sorted(stats.dropped)},
        "captions_merged": stats.counts["captions_merged"],
        "evaluation": {
            name: {
                **{label: bins.get(label, 0) for label in ("pictures", "undecodable", "too_plain")},
                "exact": hits.get(name, {}).get("exact", 0),
                "near": sum(n for label, n in hits.get(name, {}).items() if label != "exact"),
            }
            for name, bins in files.items()
        },
        "lists": _of("list", stats.histograms),
        "scores": {
            name: {
                "dropped": stats.dropped[f"score:{name}"],
                "values": dict(sorted(bins.items(), key=lambda item: float(item[0]))),
            }
            for name, bins in _of("score", stats.histograms).items()
        },
    }


def _of(kind: str, histograms: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The histograms called `KIND:NAME`, by name."""
    found = {}
    for title, bins in sorted(histograms.items()):
        before, colon, name = title.partition(":")
        if colon and before == kind:
            found[name] = dict(bins)
    return found

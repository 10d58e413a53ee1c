"""RUN/train/training.html: how a training went, as one self-contained page without a script.

It is made from metrics.jsonl, with what training.json and incidents.jsonl beside it say, so it can
be written again at any time.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from markupsafe import Markup

from pipeline import charts, files, pages
from train.evaluate import by_step
from train.metrics import read

log = logging.getLogger(__name__)

_LISTED_INCIDENTS = 100
_BOTH = ("image to text", "text to image")
_SHOWN_ABOVE = (
    *("step", "samples", "time", "loss", "accuracy_image_to_text", "samples_per_s", "mfu"),
    *("skipped", "substituted"),
)


class _Chart(NamedTuple):
    """A chart: the columns of metrics.jsonl that it shows, and the names of their lines."""

    title: str
    unit: str
    columns: Sequence[str]
    names: Sequence[str] = ("",)
    begins: Literal["anywhere", "at zero"] = "anywhere"
    ends: float | None = None
    """End of the y axis; None where the data end."""


_CHARTS: dict[str, Sequence[_Chart]] = {
    "learning": (
        _Chart(
            *("Loss", "nats", ("loss", "loss_image_to_text", "loss_text_to_image")),
            names=("mean of both", *_BOTH),
        ),
        _Chart(
            "Accuracy within the batch",
            "share",
            ("accuracy_image_to_text", "accuracy_text_to_image"),
            *(_BOTH, "at zero", 1.0),
        ),
    ),
    "optimisation": (
        _Chart("Learning rate", "", ("lr",)),
        _Chart("Temperature", "", ("temperature",)),
        _Chart("Norm of the gradient", "", ("grad_norm",), begins="at zero"),
    ),
    "speed": (
        _Chart("Pairs a second", "", ("samples_per_s",), begins="at zero"),
        _Chart("Share of the time spent waiting for data", "", ("data_wait",), ("",), "at zero", 1),
        _Chart("Share of the hardware's peak arithmetic", "", ("mfu",), ("",), "at zero", 1),
        _Chart("Peak memory, bytes", "", ("memory_bytes",), begins="at zero"),
    ),
}


def write(folder: Path) -> Path | None:
    """Write `training.html` into RUN/train; None if nothing is recorded there yet.

    A page that cannot be written is a warning: it must not take a training with it.
    """
    path = folder / "training.html"
    try:
        rows = list(read(folder / "metrics.jsonl"))
        if not rows:
            return None
        incidents = _incidents(rows, folder / "incidents.jsonl")
        run = folder.resolve().parent
        accuracy = by_step.curves(run / "evaluate" / by_step.BY_STEP)
        text = page(run.name, rows, incidents, _training(folder), accuracy)
        files.write_atomic(path, text)
    except Exception:
        log.warning("%s could not be written; training is not affected", path, exc_info=True)
        return None
    return path


def page(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    incidents: Sequence[tuple[int, str]],
    training: Mapping[str, Any],
    accuracy: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> str:
    """HTML of a record's rows, at least one; `incidents` are (step, what happened), `accuracy`
    what checkpoints were worth: dataset -> (step, share)."""
    settings = training.get("settings", {})
    seen, batch = training.get("seen"), settings.get("batch")
    last = {**dict.fromkeys(_SHOWN_ABOVE), **rows[-1]}  # an earlier version recorded fewer
    sections = {
        section: [_chart(chart, rows, incidents, 250 if len(made) == 3 else 380) for chart in made]
        for section, made in _CHARTS.items()
    }
    sections["accuracy"] = _accuracy_charts(accuracy or {}, incidents)
    template = pages.environment(Path(__file__).parent).get_template("page.html.j2")
    return template.render(
        name=name,
        training=training,
        steps=seen // batch if seen and batch else None,
        last=last,
        figures={key: _figure(key, value) for key, value in last.items()},
        recorded=list(rows[-1]),
        sections=sections,
        incidents=incidents[-_LISTED_INCIDENTS:],
        more_incidents=max(0, len(incidents) - _LISTED_INCIDENTS),
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip(),
    )


def _chart(
    chart: _Chart,
    rows: Sequence[Mapping[str, Any]],
    incidents: Sequence[tuple[int, str]],
    width: int,
) -> dict[str, Any]:
    lines = [_points(rows, column) for column in chart.columns]
    series = [
        charts.Series(name, charts.thin(points))
        for name, points in zip(chart.names, lines, strict=True)
    ]
    largest = max((value for points in lines for _, value in points), default=0.0)
    from_zero = (0.0, chart.ends or 1.05 * largest or 1.0)
    svg: Markup = charts.lines(
        series,
        title=f"{chart.title} over training steps",
        x_label="step",
        y_label=chart.unit,
        y_range=from_zero if chart.begins == "at zero" else None,
        events=[step for step, _ in incidents],
        width=width,
        height=int(width * 0.62),
    )
    return {"title": chart.title, "svg": svg, "legend": [name for name in chart.names if name]}


def _accuracy_charts(
    curves: Mapping[str, Sequence[tuple[int, float]]], incidents: Sequence[tuple[int, str]]
) -> list[dict[str, Any]]:
    """A chart for each dataset."""
    width = 250 if len(curves) == 3 else 380
    made = []
    for name, points in curves.items():
        svg = charts.lines(
            [charts.Series("", charts.thin(points))],
            title=f"Zero-shot accuracy on {name} over training steps",
            x_label="step",
            y_label="share",
            y_range=(0.0, 1.0),
            events=[step for step, _ in incidents],
            width=width,
            height=int(width * 0.62),
        )
        made.append({"title": f"Zero-shot accuracy on {name}", "svg": svg, "legend": []})
    return made


def _points(rows: Sequence[Mapping[str, Any]], column: str) -> list[tuple[float, float]]:
    return [(row["step"], row[column]) for row in rows if _is_finite(row.get(column))]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _figure(name: str, value: Any) -> str:
    """A figure of the last row, for people."""
    if not _is_finite(value):
        return pages.number(None)
    if name == "time":
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(value))
    if name == "samples_per_s":
        return charts.short(value)
    if name == "memory_bytes":
        return pages.size(value)
    if name in ("data_wait", "mfu") or name.startswith("accuracy"):
        return pages.percent(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _incidents(rows: Sequence[Mapping[str, Any]], path: Path) -> list[tuple[int, str]]:
    """From incidents.jsonl if there is one, else the steps that the rows count as skipped."""
    if path.exists():
        found = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                incident = json.loads(line)
                step = int(incident.pop("step"))
                what = str(incident.pop("what"))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # torn, or from a later version
            more = ", ".join(f"{key} {_short(value)}" for key, value in incident.items())
            found.append((step, f"{what}: {more}" if more else what))
        return found
    found = []
    before = 0
    for row in rows:
        if skipped := row.get("skipped", 0) - before:
            found.append((row["step"], f"{skipped} skipped: loss or gradient was not finite"))
        before += skipped
    return found


def _short(value: object) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _training(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / "training.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

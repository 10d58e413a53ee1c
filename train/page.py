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
FIGURES = {
    "step": ("Steps done", ""),
    "samples": ("Pairs seen", ""),
    "epoch": ("Epochs of the dataset that fills most of a batch", ""),
    "time": ("Time", ""),
    "loss": ("Loss, mean of both directions", "nats"),
    "loss_image_to_text": ("Loss, image to text", "nats"),
    "loss_text_to_image": ("Loss, text to image", "nats"),
    "accuracy_image_to_text": ("Accuracy within the batch, image to text", ""),
    "accuracy_text_to_image": ("Accuracy within the batch, text to image", ""),
    "lr": ("Learning rate", ""),
    "temperature": ("Temperature", ""),
    "grad_norm": ("Norm of the gradient", ""),
    "samples_per_s": ("Speed", "pairs/s"),
    "samples_per_s_per_process": ("Speed of each process", "pairs/s"),
    "data_wait": ("Time spent waiting for data", ""),
    "mfu": ("Hardware\N{RIGHT SINGLE QUOTATION MARK}s peak arithmetic in use", ""),
    "memory_bytes": ("Peak memory of the first process", ""),
    "skipped": ("Steps skipped", ""),
    "substituted": ("Samples substituted", ""),
    "damaged": ("Samples that could not be used, since the last start", ""),
}
"""Columns of metrics.jsonl in words, with the unit that follows the number."""
_INCIDENT = {
    "loss": "loss {}",
    "grad_norm": "norm of the gradient {}",
    "steps": "{} steps long",
    "to_step": "back to step {}",
    "error": "{}",
}
"""What an incident says, in words; the rest is in incidents.jsonl."""
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))


class _Chart(NamedTuple):
    """A chart: the columns of metrics.jsonl that it shows, and the names of their lines.

    Bytes are drawn in the unit that suits.
    """

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
        _Chart("Learning rate", "rate", ("lr",), begins="at zero"),
        _Chart("Temperature", "temperature", ("temperature",), begins="at zero"),
        _Chart("Norm of the gradient", "norm", ("grad_norm",), begins="at zero"),
    ),
    "speed": (
        _Chart("Pairs a second", "pairs/s", ("samples_per_s",), begins="at zero"),
        _Chart("Time spent waiting for data", "share", ("data_wait",), ("",), "at zero", 1),
        _Chart("Hardware's peak arithmetic in use", "share", ("mfu",), ("",), "at zero", 1),
        _Chart("Peak memory of the first process", "bytes", ("memory_bytes",), begins="at zero"),
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
    sections = {}
    unknown = []
    for section, charted in _CHARTS.items():
        known = [chart for chart in charted if any(_points(rows, c) for c in chart.columns)]
        unknown += [chart.title for chart in charted if chart not in known]
        width = 250 if len(known) == 3 else 380
        sections[section] = [_chart(chart, rows, incidents, width) for chart in known]
    sections["accuracy"] = _accuracy_charts(accuracy or {}, incidents)
    template = pages.environment(Path(__file__).parent).get_template("page.html.j2")
    return template.render(
        name=name,
        training=training,
        steps=seen // batch if seen and batch else None,
        last=last,
        figures={key: _figure(key, value) for key, value in last.items()},
        recorded=[(_label(key), key, FIGURES.get(key, ("", ""))[1]) for key in rows[-1]],
        sections=sections,
        unknown=unknown,
        unknown_figure=pages.number(None),
        lines_a_point=charts.group_size(len(rows)),
        guessing=math.log(batch) if batch and settings.get("loss") != "siglip" else None,
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
    unit = chart.unit
    if unit == "bytes":
        most = max(value for points in lines for _, value in points)
        one, unit = next((u for u in _BYTES if most >= u[0]), (1.0, unit))
        lines = [[(step, value / one) for step, value in points] for points in lines]
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
        y_label=unit,
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
    if name.startswith("samples_per_s"):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    if name == "memory_bytes":
        return pages.size(value)
    if name in ("data_wait", "mfu") or name.startswith("accuracy"):
        return pages.percent(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _label(name: str) -> str:
    return FIGURES.get(name, (name.replace("_", " "), ""))[0]


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
            words = [
                _INCIDENT[key].format(_short(value))
                for key, value in incident.items()
                if key in _INCIDENT and (key, value) != ("steps", 1)
            ]
            if isinstance(uids := incident.get("uids"), list):
                words.append(f"a batch of {len(uids):,} samples")
            found.append((step, f"{what}: {', '.join(words)}" if words else what))
        return found
    found = []
    before = 0
    for row in rows:
        if skipped := row.get("skipped", 0) - before:
            found.append((row["step"], f"{skipped} skipped: loss or gradient was not finite"))
        before += skipped
    return found


def _short(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else text[:199] + "…"


def _training(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / "training.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

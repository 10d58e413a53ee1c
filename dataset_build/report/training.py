"""The trainer's side of a report: its curves and the evaluation results, read from the run folder.

`metrics.jsonl` is appended to while training runs, so a cut last line is normal, and after a
resume the steps since the checkpoint come again: the later line counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataset_build.report.published import Absent, Build
from pipeline.charts import group_size, thin

_PAGE = "../train/training.html"  # beside the report's own folder
_LOSS = ("loss",)
_ACCURACY = ("accuracy_image_to_text", "accuracy", "batch_accuracy", "in_batch_accuracy", "top1")


def curves(build: Build) -> dict[str, Any]:
    """Loss and in-batch accuracy over steps, thinned by averaging neighbours."""
    path = build.run.stage_folder("train") / "metrics.jsonl"
    if not path.exists():
        raise Absent(f"not trained yet (train: {build['train'].state})")
    series: dict[str, list[tuple[float, float]]] = {"loss": [], "accuracy": []}
    last: Mapping[str, Any] = {}
    steps = 0
    for row in _rows(path):
        last = row
        steps = max(steps, int(row["step"]))
        for name, keys in (("loss", _LOSS), ("accuracy", _ACCURACY)):
            value = next((row[key] for key in keys if _is_number(row.get(key))), None)
            if value is None:
                continue
            points = series[name]
            while points and points[-1][0] >= row["step"]:
                points.pop()
            points.append((row["step"], value))
    if not last:
        raise Absent("no step is logged yet")
    said = _said(path.with_name("training.json"))
    if build["train"].planned and not build["train"].manifests and _is_of_another(build, said):
        raise Absent("not trained on yet: the training that is there is of an earlier dataset")
    return {
        "steps": steps,
        "samples": last.get("samples"),
        **_described(said),
        "last": {key: value for key, value in last.items() if _is_number(value)},
        "curves": {name: thin(points) for name, points in series.items()},
        "lines_a_point": max(map(group_size, map(len, series.values()))),
        "page": _PAGE if (build.run.folder / "report" / _PAGE).exists() else None,
    }


def evaluation(build: Build) -> dict[str, dict[str, Any]]:
    """`RUN/evaluate/evaluation.json`, with the accuracy of guessing beside each result."""
    path = build.run.stage_folder("evaluate") / "evaluation.json"
    if path.exists() and not _is_of_this_model(build):
        raise Absent("not evaluated yet: the accuracy that is known is of an earlier model")
    if not path.exists():
        published = build.paths("evaluate", "evaluation.json")
        if not published:
            raise Absent(f"not evaluated yet (evaluate: {build['evaluate'].state})")
        path = published[0]
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise Absent(f"{path} is not JSON: {error}") from None
    results = {}
    for name, result in sorted(values.items()):
        if not isinstance(result, dict) or "top1" not in result:
            continue
        classes = result.get("classes")
        if isinstance(classes, (list, tuple)):
            classes = len(classes)
        results[name] = {
            "top1": result["top1"],
            "top5": result.get("top5"),
            "classes": classes,
            "images": result.get("images"),
            "chance": result.get("chance", 1 / classes if classes else None),
        }
    if not results:
        raise Absent(f"{path} names no dataset with a top1")
    return results


def _is_of_another(build: Build, said: Mapping[str, Any]) -> bool:
    """Whether the run's dataset is not the one that its training was described with."""
    if said.get("settings", {}).get("data", {}).get("datasets") or "pack" not in build:
        return False
    packed = [json.loads(path.read_bytes()) for path in build["pack"].paths("dataset.json")]
    return any(dataset["fingerprint"] != said.get("dataset") for dataset in packed)


def _is_of_this_model(build: Build) -> bool:
    """Whether evaluation ended after training; told by two manifests, whatever is planned now."""
    trained, evaluated = (build[name].manifests for name in ("train", "evaluate"))
    if not evaluated:
        return False
    return bool(trained) and evaluated[0].finished >= trained[0].finished


def _said(path: Path) -> dict[str, Any]:
    """`training.json`, see `train.metrics.describe`; empty if there is none."""
    try:
        said: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return said


def _described(said: Mapping[str, Any]) -> dict[str, Any]:
    """What is trained, as far as it is said."""
    model = said.get("settings", {}).get("model", {}).get("name")
    return {
        "of_samples": said.get("seen"),
        "model": model,
        **{key: said.get(key) for key in ("parameters", "dataset", "pairs", "device", "processes")},
    }


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and _is_number(row.get("step")):
                yield row


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300

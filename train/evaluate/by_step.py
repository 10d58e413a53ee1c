"""RUN/evaluate/by_step.jsonl: what checkpoints were worth, a line each. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BY_STEP = "by_step.jsonl"


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines in the order in which they were written; none if there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a crash
            continue
        if isinstance(row, dict):
            yield row


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Dataset -> (step, top-1 accuracy), by step; of a step that was evaluated anew, the last."""
    found: dict[str, dict[int, float]] = {}
    for row in rows(path):
        for name, result in row["datasets"].items():
            found.setdefault(name, {})[row["step"]] = result["top1"]
    return {name: sorted(points.items()) for name, points in sorted(found.items())}

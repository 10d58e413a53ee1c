"""The record of a run that was interrupted reads as that of one that was not."""

from __future__ import annotations

import json
from pathlib import Path

from train.metrics import Metrics


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def _write(path: Path, start: int, steps: list[int]) -> None:
    with Metrics(path, start) as metrics:
        for step in steps:
            metrics.write({"step": step, "loss": 1 / 3})


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 0, [10, 20, 30, 40])
    _write(path, 25, [30, 40, 50])
    assert _steps(path) == [10, 20, 30, 40, 50]
    _write(path, 50, [60])
    assert _steps(path) == [10, 20, 30, 40, 50, 60]
    _write(path, 0, [10])
    assert _steps(path) == [10]


def test_a_torn_line_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for torn in ('{"step": 3', '{"step": 30}', "\0\0\0\0", "[]\n", '{"loss": 1}\n'):
        path.write_text('{"step": 10}\n{"step": 20}\n' + torn)
        _write(path, 40, [50])
        assert _steps(path) == [10, 20, 50]


def test_numbers_are_short(tmp_path: Path) -> None:
    _write(tmp_path / "metrics.jsonl", 0, [7])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 7, "loss": 0.333333}\n'

"""The record of a training run: one JSON line for every few steps."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

from pipeline import files
from train.checkpoint import Progress
from train.step import Taken, TrainStep


class Metrics:
    """Appends to `metrics.jsonl`; opened at a step, it first forgets what came after that step.

    A run that goes on from a checkpoint repeats the steps since; each is recorded once.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._step = step
        self._stream: IO[str] | None = None

    def __enter__(self) -> Metrics:
        kept = "".join(_until(self._path, self._step)) if self._step else ""
        files.write_atomic(self._path, kept)
        self._stream = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._stream is not None
        self._stream.close()

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; it has a `step`, the number of steps done."""
        assert self._stream is not None
        short = {k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in row.items()}
        self._stream.write(json.dumps(short) + "\n")
        self._stream.flush()


class Window:
    """What lies between two lines of the metrics."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.waited = 0.0
        """Seconds spent waiting for data."""
        self.losses: list[float] = []

    def add(self, taken: Taken) -> None:
        """Count a step."""
        self.losses.append(taken.loss)


def row(
    step: TrainStep, taken: Taken, progress: Progress, window: Window, epoch: float
) -> dict[str, float]:
    """What is recorded after a step."""
    elapsed = max(time.monotonic() - window.began, 1e-9)
    return {
        "step": progress.step,
        "samples": progress.step * step.settings.batch,
        "epoch": epoch,
        "loss": sum(window.losses) / len(window.losses),
        "accuracy": step.accuracy(),
        "lr": taken.lr,
        "temperature": float(torch.exp(-step.net.logit_scale.detach())),
        "grad_norm": taken.grad_norm,
        "samples_per_s": len(window.losses) * step.settings.batch / elapsed,
        "data_wait": window.waited / elapsed,
        "skipped": progress.skipped,
        "substituted": progress.substituted,
    }


def _until(path: Path, step: int) -> list[str]:
    """The lines of steps up to `step`; the file ends at the first line that is torn."""
    lines: list[str] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return lines
    for line in text.splitlines(keepends=True):
        try:
            if int(json.loads(line)["step"]) > step or not line.endswith("\n"):
                break
        except (ValueError, KeyError, TypeError):
            break
        lines.append(line)
    return lines

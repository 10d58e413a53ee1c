"""The record of a training run, RUN/train/metrics.jsonl: one JSON line for every few steps.

- `step`, `samples`, `epoch`, `time` (Unix seconds): how far training was, and when
- `loss`, `loss_image_to_text`, `loss_text_to_image`, `accuracy_image_to_text`,
  `accuracy_text_to_image` (within the batch): means over the steps since the line before
- `lr`, `temperature`, `grad_norm`: of the last of these steps
- `samples_per_s`, `samples_per_s_per_process`, `data_wait` (share of the time), `mfu` (share of the
  GPU's peak, null where that is not known), `memory_bytes` (peak of the first process)
- `skipped` (steps whose update was left out), `substituted` (samples that stood in for an
  undecodable one): totals since the first step
- `damaged`: different samples that could not be used, since this attempt began

Trackers are mirrors of it; `training.json` beside it says what is being trained. Reading needs no
torch: a report is made without it.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline import files
from train.trackers import Mirrors, Row

if TYPE_CHECKING:
    from train.checkpoint import Progress
    from train.step import Taken, TrainStep

log = logging.getLogger(__name__)

_MEANS = (
    "loss",
    "loss_image_to_text",
    "loss_text_to_image",
    "accuracy_image_to_text",
    "accuracy_text_to_image",
)


class Metrics:
    """Appends to `metrics.jsonl`; opened at a step, it first forgets what came after that step.

    A run that goes on from a checkpoint repeats the steps since; each is recorded once. `mirrors`
    get every row after it is recorded.
    """

    def __init__(self, path: Path, step: int, mirrors: Mirrors | None = None) -> None:
        self._path = path
        self._step = step
        self._mirrors = mirrors
        self._stream: FileIO | None = None
        self.note = ""
        """The last row's loss, for who looks at a terminal."""

    def __enter__(self) -> Metrics:
        kept = "".join(_until(self._path, self._step)) if self._step else ""
        files.write_atomic(self._path, kept)
        self._stream = self._path.open("ab", buffering=0)
        if self._mirrors:
            for line in kept.splitlines():
                self._mirrors.send(json.loads(line))  # what a killed process had not sent
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._stream is not None
        self._stream.close()

    def write(self, row: Row) -> None:
        """Append a row; it has a `step`, the number of steps done.

        Where the disk is full, the row is left out with a warning: training is worth more.
        """
        assert self._stream is not None
        short = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        whole = os.fstat(self._stream.fileno()).st_size
        try:
            line = (json.dumps(short) + "\n").encode()
            if self._stream.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            log.warning("%s: step %d is not recorded (%s)", self._path, row["step"], error.strerror)
            self._stream.truncate(whole)
        if self._mirrors:
            self._mirrors.send(short)
        self.note = note(row)


class Window:
    """What lies between two lines of the metrics."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.waited = 0.0
        """Seconds spent waiting for data."""
        self.steps = 0
        self._sums = dict.fromkeys(_MEANS, 0.0)

    def add(self, taken: Taken) -> None:
        """Count a step."""
        self.steps += 1
        for name in _MEANS:
            self._sums[name] += getattr(taken, name)

    def means(self) -> dict[str, float]:
        """Of the losses and accuracies."""
        return {name: value / self.steps for name, value in self._sums.items()}


def row(
    step: TrainStep,
    taken: Taken,
    progress: Progress,
    window: Window,
    epoch: float,
    damaged: int,
) -> dict[str, float | int | None]:
    """What is recorded after a step."""
    from train.hardware import peak_memory_bytes

    elapsed = max(time.monotonic() - window.began, 1e-9)
    samples_per_s = window.steps * step.settings.batch / elapsed
    each = samples_per_s / step.process.world
    return {
        "step": progress.step,
        "samples": progress.step * step.settings.batch,
        "epoch": epoch,
        "time": int(time.time()),
        **window.means(),
        "lr": taken.lr,
        "temperature": math.exp(-step.net.logit_scale.item()),
        "grad_norm": taken.grad_norm,
        "samples_per_s": samples_per_s,
        "samples_per_s_per_process": each,
        "data_wait": window.waited / elapsed,
        "mfu": _mfu(step, each),
        "memory_bytes": peak_memory_bytes(step.process.device),
        "skipped": progress.skipped,
        "substituted": progress.substituted,
        "damaged": damaged,
    }


def describe(folder: Path, step: TrainStep, training: Mapping[str, Any]) -> None:
    """Write `training.json`: what `model.json` will say of the training, and where it runs."""
    from train.hardware import device_name

    process = step.process
    parameters = sum(parameter.numel() for parameter in step.net.parameters())
    where = {"device": device_name(process.device), "processes": process.world}
    text = json.dumps({**training, **where, "parameters": parameters}, indent=1)
    files.write_atomic(folder / "training.json", text + "\n")


def note(row: Row) -> str:
    """What a row says of how training goes; how fast, whoever watches it knows."""
    return "" if row.get("loss") is None else f"loss {row['loss']:.3f}"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a record that may just be written: a torn last line is left out."""
    for line in _until(path):
        yield json.loads(line)


def _mfu(step: TrainStep, samples_per_s: float) -> float | None:
    from train.hardware import device_name, peak_flops
    from train.step import wants_bfloat16

    device = step.process.device
    bfloat16 = wants_bfloat16(step.settings.precision, device)
    peak = peak_flops(device_name(device), bfloat16=bfloat16)
    return step.flops_per_sample * samples_per_s / peak if peak else None


def _until(path: Path, step: float = float("inf")) -> list[str]:
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

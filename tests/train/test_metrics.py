"""The record of a run that was interrupted reads as that of one that was not."""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.stage import Attempt
from tests.train.conftest import Pack
from train import loop
from train.hardware import peak_flops
from train.metrics import Metrics, Window, note, read, row
from train.step import Taken


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


def test_a_row_has_every_figure(pack: Pack, attempt: Callable[..., Attempt]) -> None:
    run = attempt(pack(20))
    before = time.time()
    loop.train(run)
    folder = run.run.stage_folder("train")
    rows = list(read(folder / "metrics.jsonl"))
    for made in rows:
        both = (made["loss_image_to_text"] + made["loss_text_to_image"]) / 2
        assert made["loss"] == pytest.approx(both, rel=1e-4)
        assert 0 <= made["accuracy_image_to_text"] <= 1
        assert 0 <= made["accuracy_text_to_image"] <= 1
        assert 0 <= made["data_wait"] <= 1
        assert made["mfu"] is None  # nobody knows the peak of a CPU
        assert before - 1 <= made["time"] <= time.time() + 1
        assert 50e6 < made["memory_bytes"] < 64e9
        assert made["samples_per_s_per_process"] == made["samples_per_s"] > 0
        assert made["samples"] == 8 * made["step"]
    described = json.loads((folder / "training.json").read_text())
    assert described["pairs"] == 20 and described["seen"] == 160
    assert described["settings"]["lr"] == 2e-3
    assert (described["device"], described["processes"]) == ("cpu", 1)


def _step(world: int, flops: int) -> Any:
    """As much of a `TrainStep` as a row needs."""
    return SimpleNamespace(
        settings=SimpleNamespace(batch=64, precision="bfloat16"),
        process=SimpleNamespace(device=torch.device("cpu"), world=world),
        net=SimpleNamespace(logit_scale=torch.tensor(math.log(50.0))),
        flops_per_sample=flops,
    )


def test_means_are_over_the_window_and_rates_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.hardware.device_name", lambda device: "NVIDIA L4")
    window = Window()
    for loss in (3.0, 1.0):
        taken = Taken(loss, 7.0, 1e-3, True, loss + 0.5, loss - 0.5, 0.25, 0.75)
        window.add(taken)
    window.began = time.monotonic() - 2.0
    window.waited = 0.5
    progress: Any = SimpleNamespace(step=30, skipped=1, substituted=2)
    made = row(_step(4, 10**9), taken, progress, window, epoch=1.5, damaged=2)
    assert (made["loss"], made["loss_image_to_text"], made["loss_text_to_image"]) == (2, 2.5, 1.5)
    assert (made["accuracy_image_to_text"], made["accuracy_text_to_image"]) == (0.25, 0.75)
    assert made["temperature"] == pytest.approx(0.02)
    assert made["samples_per_s"] == pytest.approx(64, rel=0.01)
    assert made["samples_per_s_per_process"] == pytest.approx(16, rel=0.01)
    assert made["data_wait"] == pytest.approx(0.25, rel=0.01)
    peak = peak_flops("NVIDIA L4", bfloat16=True)
    assert peak and made["mfu"] == pytest.approx(16 * 1e9 / peak, rel=0.01)
    assert (made["skipped"], made["substituted"]) == (1, 2)
    assert note(made) == "loss 2.000"


def test_a_full_disk_costs_rows_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Metrics(path, 0) as metrics:
        metrics.write({"step": 1, "loss": 1.0})
        room = path.stat().st_size + 10  # for a part of the next line
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            metrics.write({"step": 2, "loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        metrics.write({"step": 3, "loss": 1.0})
    assert _steps(path) == [1, 3]
    assert "step 2 is not recorded" in caplog.text


def test_reading_needs_no_torch() -> None:
    code = "import sys, train.metrics, train.page; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

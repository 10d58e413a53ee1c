"""Mirrors get every step once, and none of them can harm a training."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.stage import Attempt
from pipeline.stop import Stopped
from tests.train.conftest import Pack, Stopping
from train import loop, trackers
from train.metrics import Metrics
from train.trackers import Mirror, Mirrors, Row

FIGURES = {"loss": 1.0, "mfu": None, "samples": 8, "epoch": 0.5, "time": 1_700_000_000}


class Noted:
    """A mirror that writes down what it gets, and fails at a step if told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.closed = 0
        self.fails_at = fails_at
        self.opened: list[tuple[str, str]] = []

    def open(self, folder: Path, digest: str, name: str, settings: Mapping[str, Any]) -> Mirror:
        self.opened.append((digest, name))
        if self.fails_at == 0:
            raise OSError("no route to host")
        return self

    def send(self, step: int, row: Row) -> None:
        if step == self.fails_at:
            raise ConnectionError("reset by peer")
        self.steps.append(step)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Noted]:
    """Registers a mirror under a name; its package is one that is there."""

    def register(name: str = "noted", **how: Any) -> Noted:
        made = Noted(**how)
        monkeypatch.setitem(trackers.MIRRORS, name, ("json", made.open))
        return made

    return register


def _record(folder: Path, start: int, steps: range, *names: str, digest: str = "d" * 64) -> None:
    with (
        Mirrors(names, folder, digest, {}) as mirrors,
        Metrics(folder / "metrics.jsonl", start, mirrors) as metrics,
    ):
        for step in steps:
            metrics.write({"step": step, **FIGURES})


def test_repeated_steps_are_sent_once(tmp_path: Path, noted: Callable[..., Noted]) -> None:
    mirror = noted()
    _record(tmp_path, 0, range(1, 8), "noted")
    _record(tmp_path, 4, range(5, 11), "noted")
    assert mirror.steps == list(range(1, 11))
    assert mirror.closed == 2
    assert len(set(mirror.opened)) == 1  # one run, gone on with


def test_what_a_killed_process_recorded_but_did_not_send_is_sent(
    tmp_path: Path, noted: Callable[..., Noted]
) -> None:
    mirror = noted()
    _record(tmp_path, 0, range(1, 4), "noted")
    with Metrics(tmp_path / "metrics.jsonl", 3) as metrics:
        metrics.write({"step": 4, **FIGURES})
    _record(tmp_path, 4, range(5, 7), "noted")
    assert mirror.steps == [1, 2, 3, 4, 5, 6]


def test_another_configuration_is_another_run(tmp_path: Path, noted: Callable[..., Noted]) -> None:
    mirror = noted()
    _record(tmp_path, 0, range(1, 4), "noted")
    _record(tmp_path, 0, range(1, 3), "noted", digest="e" * 64)
    assert mirror.steps == [1, 2, 3, 1, 2]
    (_, first), (_, second) = mirror.opened
    assert first != second


@pytest.mark.parametrize(("fails_at", "kept"), [(0, []), (3, [1, 2])])
def test_a_mirror_that_fails_is_switched_off(
    tmp_path: Path,
    noted: Callable[..., Noted],
    caplog: pytest.LogCaptureFixture,
    fails_at: int,
    kept: list[int],
) -> None:
    broken, whole = noted("broken", fails_at=fails_at), noted("whole")
    _record(tmp_path, 0, range(1, 6), "broken", "whole")
    assert broken.steps == kept
    assert whole.steps == [1, 2, 3, 4, 5]
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "broken is switched off, training goes on" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    broken.fails_at = None  # the next attempt sends what is missing
    _record(tmp_path, 5, range(6, 7), "broken", "whole")
    assert broken.steps == [1, 2, 3, 4, 5, 6]
    assert whole.steps == [1, 2, 3, 4, 5, 6]


def test_a_mirror_that_will_not_close_does_not_hold_a_stop(
    tmp_path: Path,
    noted: Callable[..., Noted],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mirror, released = noted(), threading.Event()
    monkeypatch.setattr(mirror, "close", released.wait)
    monkeypatch.setattr(trackers, "CLOSING_S", 0.05)
    _record(tmp_path, 0, range(1, 3), "noted")
    released.set()
    assert "not closed within 0.05 s" in caplog.text


def test_a_missing_package_is_named_before_training(
    pack: Pack, attempt: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.MIRRORS, "wandb", ("not_installed", trackers.WeightsAndBiases))
    with pytest.raises(ConfigError, match=r"needs the package not_installed.*\[logging\]"):
        loop.train(attempt(pack(8), trackers=["wandb"]))


def test_no_tracker_is_imported_unless_asked_for(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        import train.loop
        from train.trackers import Mirrors
        with Mirrors([], Path(sys.argv[1]), "d", {}) as mirrors:
            mirrors.send({"step": 1})
        print([name for name in ("wandb", "tensorboard") if name in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_a_training_that_was_stopped(
    pack: Pack, attempt: Callable[..., Attempt]
) -> None:
    pytest.importorskip("tensorboard")
    packed = pack(20)
    with pytest.raises(Stopped):  # after step 6; its checkpoint is that of step 6
        loop.train(attempt(packed, stop=Stopping(6), trackers=["tensorboard"]))
    last = attempt(packed, trackers=["tensorboard"])
    loop.train(last)
    (folder,) = (last.run.stage_folder("train") / "tensorboard").iterdir()
    script = """
        import json, sys
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(sys.argv[1])
        events.Reload()
        names = events.Tags()["scalars"]
        print(json.dumps({n: [(e.step, e.value) for e in events.Scalars(n)] for n in names}))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout.splitlines()[-1])
    rows = (last.run.stage_folder("train") / "metrics.jsonl").read_text().splitlines()
    recorded = [json.loads(row) for row in rows]
    for name in ("loss", "lr", "temperature", "accuracy_text_to_image"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-5)) for row in recorded]
        assert [tuple(point) for point in shown[f"train/{name}"]] == expected
    assert "train/mfu" not in shown  # not known on a CPU


@pytest.mark.timeout(170)
def test_wandb_keeps_one_run_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    script = """
        import sys
        from pathlib import Path
        from train.metrics import Metrics
        from train.trackers import Mirrors
        folder, start, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
        with (
            Mirrors(["wandb"], folder, "d" * 64, {"settings": {"lr": 0.5}}) as mirrors,
            Metrics(folder / "metrics.jsonl", start, mirrors) as metrics,
        ):
            assert mirrors._open, "switched off"
            for step in range(start + 1, last + 1):
                metrics.write({"step": step, "loss": 1 / step})
    """
    folder = tmp_path / "run" / "train"
    folder.mkdir(parents=True)
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "WANDB_MODE": "offline"}
    environ |= {"WANDB_ERROR_REPORTING": "false", "HOME": str(tmp_path)}
    for start, last in ((0, 5), (3, 8)):
        command = [sys.executable, "-c", textwrap.dedent(script)]
        command += [str(folder), str(start), str(last)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    runs = sorted(folder.glob("wandb/offline-run-*"))
    assert len(runs) == 2
    known = json.loads((folder / "trackers.json").read_text())
    assert known["sent"] == {"wandb": 8}
    assert {path.name.rpartition("-")[2] for path in runs} == {known["id"]}
    assert all(list(path.glob("run-*.wandb")) for path in runs)

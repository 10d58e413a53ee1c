"""The training stage: it stops, goes on, and ends as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.stage import Attempt
from pipeline.stop import Stopped
from tests.train.conftest import Config, Pack, Stopping
from train import loop, optim, stages
from train.checkpoint_folder import Checkpoint, CheckpointFolder
from train.data.loader import Batch
from train.guard import TrainingDiverged
from train.settings import EvaluateSettings, OptimSettings
from train.step import TrainStep

Make = Callable[..., Attempt]


def _weights(attempt: Attempt) -> bytes:
    return (attempt.folder / "model.safetensors").read_bytes()


def _rows(attempt: Attempt) -> list[dict[str, float]]:
    path = attempt.run.stage_folder("train") / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stopping_anywhere_changes_no_bit(pack: Pack, attempt: Make) -> None:
    packed = pack(20, 13)
    whole = attempt(packed, run="undisturbed")
    stats = loop.train(whole)
    assert stats.rows_in == stats.rows_out == 160
    assert stats.balanced()
    for after in (1, 7, 2):  # steps 1, 8 and 10: beside and between the periodic checkpoints
        stopped = attempt(packed, stop=Stopping(after))
        with pytest.raises(Stopped, match=r"^SIGTERM at step \d+$"):
            loop.train(stopped)
        assert not list(stopped.folder.iterdir())
    last = attempt(packed)
    assert loop.train(last) == stats
    assert _weights(last) == _weights(whole)
    assert [row["step"] for row in _rows(last)] == list(range(2, 21, 2))
    # Not means since the line before, nor what the machine had to do with.
    lasting = ("samples", "epoch", "lr", "temperature", "grad_norm", "skipped", "substituted")
    for one, other in zip(_rows(last), _rows(whole), strict=True):
        assert {name: one[name] for name in lasting} == {name: other[name] for name in lasting}


def test_a_killed_process_goes_on_from_the_newest_checkpoint(
    pack: Pack, attempt: Make, tmp_path: Path
) -> None:
    packed = pack(20, 13)
    whole = attempt(packed, run="undisturbed")
    loop.train(whole)
    first = attempt(packed)
    # Another process trains the same run and is killed in the middle of writing a checkpoint.
    script = f"""
        import os, pickle, signal, sys
        from train import checkpoint, loop
        attempt = pickle.load(open({str(tmp_path / "attempt.pickle")!r}, "rb"))
        write, written = checkpoint.files.write_atomic, []
        def killed(path, data):
            written.append(path)
            if path.name == "state.json" and len([p for p in written if p.name == path.name]) == 3:
                path.write_text(data[:40])
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, data)
        checkpoint.files.write_atomic = killed
        loop.train(attempt)
    """
    import pickle

    (tmp_path / "attempt.pickle").write_bytes(pickle.dumps(first))
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == -9, ended.stderr
    folder = first.run.stage_folder("train") / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == [
        "step-0000000004",
        "step-0000000008",
    ]
    last = attempt(packed)
    loop.train(last)
    assert _weights(last) == _weights(whole)
    assert [row["step"] for row in _rows(last)] == list(range(2, 21, 2))
    assert not list(folder.glob(".step-*"))


def test_training_learns(pack: Pack, attempt: Make) -> None:
    run = attempt(pack(40), samples=8 * 60)
    loop.train(run)
    rows = _rows(run)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[0]["lr"] < max(row["lr"] for row in rows) == pytest.approx(2e-3, rel=0.01)
    assert 0 < rows[-1]["temperature"] < 1
    assert all(row["samples_per_s"] > 0 for row in rows)


def test_samples_are_counted_before_the_first_step(
    pack: Pack, attempt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[object, ...]] = []
    monkeypatch.setattr(Attempt, "progress", lambda attempt, *words: said.append(words))
    packed = pack(20)
    for first in (0, 24):
        said.clear()
        with pytest.raises(Stopped):
            loop.train(attempt(packed, stop=Stopping(3)))
        assert said[0] == (first, 160, "samples", "first step")
        assert [words[0] for words in said[1:]] == [first + 8, first + 16, first + 24]


def test_another_configuration_starts_anew(pack: Pack, attempt: Make) -> None:
    packed = pack(20)
    loop.train(attempt(packed))
    other = attempt(packed, seed=4)
    loop.train(other)
    clean = attempt(packed, seed=4, run="clean")
    loop.train(clean)
    assert _weights(other) == _weights(clean)
    aside = list(other.run.stage_folder("train").glob("checkpoints/set-aside-*/*"))
    assert {path.name for path in aside} > {"metrics.jsonl"}


def test_operational_settings_keep_the_checkpoints(pack: Pack, attempt: Make) -> None:
    packed = pack(20)
    with pytest.raises(Stopped):
        loop.train(attempt(packed, stop=Stopping(6)))
    data = {"lanes": 4, "block_samples": 5, "margin": 2, "workers": 1, "cache_bytes": 0}
    last = attempt(packed, data=data, checkpoint={"max_lost_steps": 14}, log_every_steps=3)
    loop.train(last)
    whole = attempt(packed, run="undisturbed")
    loop.train(whole)
    assert _weights(last) == _weights(whole)
    assert [row["step"] for row in _rows(last)] == [2, 4, 6, 9, 12, 15, 18, 20]


class Poison:
    """Spoils the loss of some batches, by their place in the order of samples."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *bad: int, by: float = math.nan) -> None:
        self.steps: list[tuple[int, int]] = []
        """(step of training, step in the order of samples) of every batch."""
        self.uids: dict[int, list[str]] = {}
        real = TrainStep.gradients

        def gradients(this: TrainStep, step: int, batch: Batch) -> Tensor:
            self.steps.append((step, batch.step))
            self.uids[batch.step] = batch.uid
            figures = real(this, step, batch)
            if batch.step in bad:
                figures[0] *= by
            return figures

        monkeypatch.setattr(TrainStep, "gradients", gradients)


def _incidents(attempt: Attempt) -> list[dict[str, Any]]:
    path = attempt.run.stage_folder("train") / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_that_are_not_finite_are_skipped_and_counted(
    pack: Pack, attempt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(monkeypatch, 2, 3, 8)
    run = attempt(pack(20), max_skipped_steps=3)
    stats = loop.train(run)
    assert stats.dropped == {"step_not_finite": 24}
    assert stats.balanced()
    assert _rows(run)[-1]["skipped"] == 3
    weights = load_file(run.folder / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    incidents = _incidents(run)
    assert [(i["what"], i["step"]) for i in incidents] == [("not finite", n) for n in (2, 3, 8)]
    assert [i["uids"] for i in incidents] == [poison.uids[n] for n in (2, 3, 8)]


def test_a_skipped_step_changes_nothing(
    pack: Pack, attempt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(20)
    kept: list[dict[str, Tensor]] = []
    real = TrainStep.leave_out

    def leave_out(this: TrainStep) -> None:
        real(this)
        kept.append({name: value.clone() for name, value in this.net.state_dict().items()})

    monkeypatch.setattr(TrainStep, "leave_out", leave_out)
    Poison(monkeypatch, 5, 6)
    loop.train(attempt(packed))
    for name, value in kept[0].items():
        assert torch.equal(value, kept[1][name]), name


def test_after_too_many_skips_training_goes_back_and_past_their_data(
    pack: Pack, attempt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(20)
    poison = Poison(monkeypatch, 9, 11, 13)
    change = {"max_skipped_steps": 2, "checkpoint": {"max_lost_steps": 8, "keep": 9}}
    whole = attempt(packed, run="undisturbed", **change)
    stats = loop.train(whole)
    # The third skip, at 13, leads back to the checkpoint before the first, that of step 8.
    assert poison.steps == [(n, n) for n in range(14)] + [(n, n + 6) for n in range(8, 20)]
    assert stats.counts["rewinds"] == 1
    assert not stats.dropped
    assert [row["step"] for row in _rows(whole)] == list(range(2, 21, 2))
    assert [row["skipped"] for row in _rows(whole)] == [0] * 10
    rewind = _incidents(whole)[-1]
    assert (rewind["what"], rewind["step"], rewind["to_step"]) == ("rewind", 13, 8)
    # Stopped in the midst of it, just before the third, just after it, and later: no bit changes.
    for after in (11, 2, 3, 2):
        with pytest.raises(Stopped):
            loop.train(attempt(packed, stop=Stopping(after), **change))
    last = attempt(packed, **change)
    assert loop.train(last).counts == stats.counts
    assert _weights(last) == _weights(whole)


def test_trouble_before_the_first_checkpoint_ends_the_run(
    pack: Pack, attempt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, 1, 2, 3)
    with pytest.raises(TrainingDiverged, match=r"before the first checkpoint; lower train\.lr"):
        loop.train(attempt(pack(20), max_skipped_steps=2))


def test_a_learning_rate_that_is_far_too_high_ends_in_advice(
    pack: Pack, attempt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = optim.learning_rate
    fault = 1.0

    def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
        return real(step, steps, settings) * (fault if step >= 42 else 1)

    monkeypatch.setattr(optim, "learning_rate", learning_rate)
    packed = pack(40)
    change = {"spike_steps": 6, "checkpoint": {"max_lost_steps": 8, "keep": 4}, "samples": 8 * 100}
    assert "rewinds" not in loop.train(attempt(packed, run="healthy", **change)).counts
    fault = 1e4
    run = attempt(packed, max_rewinds=2, **change)
    with pytest.raises(TrainingDiverged, match=r"again after 2 rewinds; lower train\.lr"):
        loop.train(run)
    rewinds = [i for i in _incidents(run) if i["what"] == "rewind"]
    assert len(rewinds) == 2
    assert all(30 < rewind["to_step"] <= 42 < rewind["step"] < 60 for rewind in rewinds)


def test_no_checkpoint_is_written_while_the_loss_is_high(
    pack: Pack, attempt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, 43, 44, 45, by=100)
    saved = []
    real = CheckpointFolder.publish

    def publish(this: CheckpointFolder, temporary: Path, checkpoint: Checkpoint) -> Path:
        saved.append(checkpoint.progress.step)
        return real(this, temporary, checkpoint)

    monkeypatch.setattr(CheckpointFolder, "publish", publish)
    run = attempt(pack(40), samples=8 * 50)
    loop.train(run)
    assert saved == [*range(4, 44, 4), 47, 48, 50]
    spike = next(i for i in _incidents(run) if i["what"] == "spike" and i["steps"] == 3)
    assert spike["step"] in (43, 44, 45)


def test_the_stages_plan_and_evaluate(pack: Pack, attempt: Make, tmp_path: Path) -> None:
    from tests.train.evaluate.test_zero_shot import NAMES, _write, picture
    from train.evaluate.stage import evaluate

    trained = attempt(pack(40), samples=8 * 60)
    loop.train(trained)
    rows = [(picture(100 + seed)[0], seed % 3) for seed in range(12)]
    rows = [(image, (100 + number) % 3) for number, (image, _) in enumerate(rows)]
    parquet = _write(tmp_path / "set.parquet", rows, NAMES, ["a {} picture"])
    config = Config(evaluate=EvaluateSettings(datasets={"paints": str(parquet)}, threads=1))
    model = [str(trained.folder / name) for name in ("model.json", "model.safetensors")]
    folder = tmp_path / "evaluated"
    folder.mkdir()
    run = type(trained.run)(tmp_path / "run", config)
    params = {"datasets": {"paints": [str(parquet)]}}
    task = stages.Task("evaluate", 0, (*model, str(parquet)), params)
    stats = evaluate(Attempt(run, task, folder, trained.stop))
    assert stats.rows_in == stats.rows_out == 12
    results = json.loads((folder / "evaluation.json").read_text())
    assert results["paints"]["classes"] == 3
    assert results["paints"]["top1"] > 0.6
    copied = tmp_path / "run" / "evaluate" / "evaluation.json"
    assert json.loads(copied.read_text()) == results


def test_evaluation_without_datasets_says_what_to_add(attempt: Make, pack: Pack) -> None:
    with pytest.raises(stages.ConfigError, match="NAME: /path"):
        stages.EVALUATE.plan(attempt(pack(8)).run)


def test_stages_and_settings_load_without_torch() -> None:
    code = "import sys, train.stages, train.settings; print('torch' in sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout == "False\n"

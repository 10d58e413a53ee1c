"""The training stage: it stops, goes on, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config import ConfigError
from pipeline.stage import Attempt
from pipeline.stop import Stopped
from tests.train.conftest import Config, Pack, Stopping
from train import loop, stages, step
from train.loss import Measured
from train.settings import EvaluateSettings

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
        with pytest.raises(Stopped):
            loop.train(stopped)
        assert not list(stopped.folder.iterdir())
    last = attempt(packed)
    assert loop.train(last) == stats
    assert _weights(last) == _weights(whole)
    assert [row["step"] for row in _rows(last)] == list(range(2, 21, 2))
    # Clocks and memory differ, and so do means over the steps since the line before.
    volatile = ("time", "samples_per_s", "data_wait", "memory", "loss", "accuracy")
    for one, other in zip(_rows(last), _rows(whole), strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(volatile)} == {
            k: v for k, v in other.items() if not k.startswith(volatile)
        }


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
    last = attempt(packed, data=data, checkpoint={"every_steps": 7}, log_every_steps=3)
    loop.train(last)
    whole = attempt(packed, run="undisturbed")
    loop.train(whole)
    assert _weights(last) == _weights(whole)
    assert [row["step"] for row in _rows(last)] == [2, 4, 6, 9, 12, 15, 18, 20]


def test_steps_that_are_not_finite_are_skipped_and_counted(
    pack: Pack, attempt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(20)
    real = step.contrast
    calls = []

    def poisoned(*args: torch.Tensor, tile: int, bias: None) -> Measured:
        calls.append(tile)
        measured = real(*args, tile=tile, bias=bias)
        poison = float("nan") if len(calls) in (3, 4, 9) else 1.0
        return measured._replace(loss=measured.loss * poison)

    monkeypatch.setattr(step, "contrast", poisoned)
    run = attempt(packed, max_skipped_steps=3)
    stats = loop.train(run)
    assert stats.dropped == {"step_not_finite": 24}
    assert stats.balanced()
    assert _rows(run)[-1]["skipped"] == 3
    weights = torch.frombuffer(bytearray(_weights(run)), dtype=torch.uint8)
    assert weights.numel() > 0
    calls.clear()
    with pytest.raises(loop.TrainingDiverged, match=r"3 losses or .*; lower train\.lr"):
        loop.train(attempt(packed, max_skipped_steps=2, run="halted"))


def test_lanes_that_do_not_fit_are_refused(pack: Pack, attempt: Make) -> None:
    with pytest.raises(ConfigError, match=r"train\.data\.lanes: 3 must divide"):
        loop.train(attempt(pack(20), data={"lanes": 3}))


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

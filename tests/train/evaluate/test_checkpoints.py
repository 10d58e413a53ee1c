"""Checkpoints evaluated while training goes on: equal to the model that was saved, each once."""

from __future__ import annotations

import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config import ConfigError, MissingInput
from pipeline.stage import Attempt, Run
from pipeline.stop import StopFlag, Stopped
from tests.train import ranks
from tests.train.conftest import TINY_MODEL, Config, Pack, write_paints
from train import loop
from train.checkpoint_folder import listed
from train.evaluate import by_step, zero_shot
from train.evaluate.checkpoints import evaluate_new, load
from train.evaluate.stage import measure
from train.model import load_model
from train.settings import EvaluateSettings, TrainSettings

VIT = {**TINY_MODEL, "tower": "vit", "layers": [1], "width": 16, "head_width": 16}
CHECKPOINT = {"max_lost_steps": 8, "keep": 1, "keep_every_steps": 8}


@pytest.fixture
def paints(tmp_path: Path) -> str:
    return str(write_paints(tmp_path / "paints.parquet"))


def _to_evaluate(attempt: Attempt, paints: str) -> Run:
    config = Config(
        train=attempt.settings, evaluate=EvaluateSettings(datasets={"paints": paints}, threads=1)
    )
    return Run(attempt.run.folder, config)


def _rows(run: Run) -> list[dict[str, object]]:
    return list(by_step.rows(run.folder / "evaluate/by_step.jsonl"))


def test_each_milestone_is_evaluated_once_as_the_model_is(
    pack: Pack, attempt: Callable[..., Attempt], paints: str
) -> None:
    trained = attempt(pack(24), checkpoint=CHECKPOINT)  # a ResNet, 20 steps
    loop.train(trained)
    run = _to_evaluate(trained, paints)
    assert [step for _, step in listed(run.folder / "train/checkpoints")] == [20, 16, 8]
    assert evaluate_new(run, StopFlag()) == 2
    assert [row["step"] for row in _rows(run)] == [8, 16]
    assert [row["samples"] for row in _rows(run)] == [64, 128]
    assert evaluate_new(run, StopFlag()) == 0

    last = load(run.folder / "train/checkpoints/step-0000000020", trained.settings)
    net, saved = load_model(trained.folder / "model.json", trained.folder / "model.safetensors")
    assert not last.training
    assert last.state_dict().keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(last.state_dict()[name], value), name
    datasets = {"paints": zero_shot.open_dataset("paints", [Path(paints)])}
    settings, side = run.settings("evaluate"), saved["preprocess_cfg"]["resize"]
    (run.folder / "train/checkpoints/step-0000000020").rename(
        run.folder / "train/checkpoints/step-0000000024"
    )  # under another step's name it is no milestone's checkpoint
    assert evaluate_new(run, StopFlag()) == 0
    [(_, scores)] = measure(net, datasets, settings, side, StopFlag())
    every = run.config.model_copy(
        update={"train": TrainSettings.model_validate(_changed(trained, "never"))}
    )
    (run.folder / "train/checkpoints/step-0000000024").rename(
        run.folder / "train/checkpoints/step-0000000020"
    )
    assert evaluate_new(Run(run.folder, every), StopFlag()) == 1
    result = _rows(run)[-1]["datasets"]["paints"]  # type: ignore[index]
    expected = scores.results()
    assert result == {name: expected[name] for name in result}
    assert set(expected) - set(result) == {"per_class"}


def _changed(attempt: Attempt, keep_every_steps: object) -> dict[str, object]:
    values: dict[str, object] = attempt.settings.model_dump()
    return {**values, "checkpoint": {**CHECKPOINT, "keep_every_steps": keep_every_steps}}


def test_what_processes_saved_in_shards_is_read_by_one(
    pack: Pack, attempt: Callable[..., Attempt], paints: str, tmp_path: Path
) -> None:
    attempts = [
        attempt(
            pack(24), model=VIT, samples=64, parallel="fsdp", checkpoint={"max_lost_steps": 16}
        ),
    ]
    attempts.append(pickle.loads(pickle.dumps(attempts[0])))
    (tmp_path / "other").mkdir()
    attempts[1].folder = tmp_path / "other"
    (tmp_path / "attempts").write_bytes(pickle.dumps(attempts))
    ranks.together(tmp_path, 2, _train)
    assert evaluate_new(_to_evaluate(attempts[0], paints), StopFlag()) == 1
    net, _ = load_model(attempts[0].folder / "model.json", attempts[0].folder / "model.safetensors")
    folder = attempts[0].run.folder / "train/checkpoints/step-0000000008"
    for name, value in load(folder, attempts[0].settings).state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


def _train(rank: int, world: int, folder: Path) -> None:
    loop.train(pickle.loads((folder / "attempts").read_bytes())[rank])


def test_what_is_gone_damaged_or_cut_short_costs_its_point_only(
    pack: Pack, attempt: Callable[..., Attempt], paints: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = attempt(pack(24), model=VIT, checkpoint={**CHECKPOINT, "keep_every_steps": 4})
    loop.train(trained)
    run = _to_evaluate(trained, paints)
    checkpoints = run.folder / "train/checkpoints"
    damaged = next((checkpoints / "step-0000000008").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (checkpoints / "step-0000000012/state.json").write_text("{")

    def deleted(folder: Path, sha256: object) -> None:
        if folder.name == "step-0000000016":  # as training does, between two reads
            shutil.rmtree(folder)

    from train.evaluate import checkpoints as module

    intact = module.faults
    monkeypatch.setattr(module, "faults", lambda f, s: intact(f, s) or deleted(f, s))
    path = run.folder / "evaluate/by_step.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 99, "key": "x", "data')  # a crash while a line was written
    assert evaluate_new(run, StopFlag()) == 2
    assert [row["step"] for row in _rows(run)] == [4, 20]
    assert [step for step, _ in by_step.curves(path)["paints"]] == [4, 20]


def test_a_stop_comes_between_pictures_and_leaves_no_line(
    pack: Pack, attempt: Callable[..., Attempt], paints: str
) -> None:
    trained = attempt(pack(24), model=VIT, samples=64, checkpoint=CHECKPOINT)
    loop.train(trained)
    run = _to_evaluate(trained, paints)
    stop = StopFlag()
    stop.signal = signal.SIGUSR2
    with pytest.raises(Stopped):
        evaluate_new(run, stop)
    assert not _rows(run)


def test_other_settings_than_the_checkpoints_are_refused(
    pack: Pack, attempt: Callable[..., Attempt], paints: str
) -> None:
    trained = attempt(pack(24), model=VIT, samples=64)
    with pytest.raises(MissingInput, match="no training has begun"):
        evaluate_new(_to_evaluate(trained, paints), StopFlag())
    loop.train(trained)
    other = attempt(Path(trained.task.reads[0]).parent, model=VIT, samples=64, lr=1e-5)
    with pytest.raises(ConfigError, match="not the settings"):
        evaluate_new(_to_evaluate(other, paints), StopFlag())

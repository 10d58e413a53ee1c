"""What the stages say of training before it begins: the nodes that will do, and who follows it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.stage import Run
from tests.train.conftest import Config
from train.settings import EvaluateSettings, TrainSettings
from train.stages import TRAIN


def _run(datasets: dict[str, str] | None = None, **train: Any) -> Run:
    values: dict[str, object] = {"batch": 480, "data": {"lanes": 48}, **train}
    settings = TrainSettings.model_validate(values)
    evaluate = EvaluateSettings(datasets=datasets or {})
    return Run(Path("/run"), Config(train=settings, evaluate=evaluate))


def test_numbers_of_nodes_that_share_the_lanes_equally_will_do() -> None:
    assert TRAIN.nodes(_run(), 8) == (1,)
    assert TRAIN.nodes(_run(nodes=3), 8) == (3,)
    assert TRAIN.nodes(_run(nodes=(1, 4)), 4) == (1, 2, 3, 4)
    assert TRAIN.nodes(_run(nodes=(2, 7), data={"lanes": 16}), 2) == (2, 4)
    said = "3 nodes of 2 processes are 6 processes, which do not divide .* 1, 2, 4, 8 nodes would"
    with pytest.raises(ConfigError, match=rf"train.nodes: {said}"):
        TRAIN.nodes(_run(nodes=3, data={"lanes": 16}), 2)
    with pytest.raises(ConfigError, match=r"lanes \(16\); make those a multiple of 6"):
        TRAIN.nodes(_run(data={"lanes": 16}), 6)


@pytest.mark.parametrize("nodes", [0, (0, 2), (3, 2), (1, 2, 3), "many"])
def test_what_is_no_number_of_nodes_is_refused(nodes: object) -> None:
    with pytest.raises(ValueError, match="nodes"):
        TrainSettings.model_validate({"nodes": nodes})


def test_nodes_decide_nothing_of_the_result() -> None:
    assert TrainSettings(nodes=(1, 4)).identity() == TrainSettings().identity()


def test_milestones_are_followed_where_there_is_something_to_evaluate_on() -> None:
    milestones = {"keep_every_steps": 10}
    datasets = {"paints": "paints.parquet"}
    assert TRAIN.follower(_run(datasets, checkpoint=milestones)) == (
        "evaluate-checkpoints",
        "/run",
    )
    assert TRAIN.follower(_run(datasets)) == ()
    assert TRAIN.follower(_run(checkpoint=milestones)) == ()


@pytest.mark.parametrize(
    ("train", "gpus", "rank", "warned"),
    [
        ({"preset": "single-gpu"}, 0, None, ["128,000,000 samples of ViT-S-16"]),
        ({"preset": "single-gpu"}, 0, "0", ["128,000,000 samples of ViT-S-16"]),
        ({"preset": "single-gpu"}, 0, "1", []),
        ({"preset": "single-gpu"}, 1, None, []),
        ({"preset": "cpu"}, 0, None, []),
        ({"batch": 64, "model": {"name": "custom"}, "data": {"lanes": 32}}, 0, None, []),
    ],
)
def test_a_large_model_without_a_gpu_is_warned_of_once(
    train: dict[str, Any],
    gpus: int,
    rank: str | None,
    warned: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("train.launch.visible_gpus", lambda: gpus)
    if rank:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
    run = Run(Path("/run"), Config(train=TrainSettings.model_validate(train)))
    with caplog.at_level(logging.WARNING), TRAIN.service(run):
        pass
    hint = 'will take a long time; SET="train.preset=cpu" is a small recipe'
    assert caplog.messages == [f"there is no GPU here: {what} {hint}" for what in warned]

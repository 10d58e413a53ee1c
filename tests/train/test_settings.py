"""Settings that contradict each other are refused where they are read, with those that would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config
from pipeline.config import ConfigError, Settings
from train.settings import TrainSettings


class Root(Settings):
    train: TrainSettings = TrainSettings()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["batch=100"], "train.batch=100: train.batch: a batch of 100 cannot be cut into 32 equal"
         " lanes; set train.data.lanes=25 or 50, or set train.batch=96 or 128"),
        (["data.lanes=3"], "train.data.lanes=3: train.data.lanes: a batch of 128 cannot be cut into"
         " 3 equal lanes; set train.data.lanes=2 or 4, or set train.batch=126 or 129"),
        (["batch=8"], "train.batch=8: train.batch: a batch of 8 cannot be cut into 32 equal lanes;"
         " set train.data.lanes=8, or set train.batch=32"),
        (["processes=3"], "train.processes=3: train.processes: 3 processes cannot share 32 lanes"
         " equally; train in 2"),
        (["batch=96", "processes=3"], "train.processes=3: train.processes: 3 processes cannot share"
         " 32 lanes equally; set train.data.lanes=24 or 48, or train in 2"),
    ],
)  # fmt: skip
def test_lanes_that_do_not_divide(tmp_path: Path, overrides: list[str], said: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("train: {preset: cpu}")  # 32 lanes of a batch of 128
    with pytest.raises(ConfigError) as caught:
        config.load(Root, path, [f"train.{override}" for override in overrides])
    assert str(caught.value) == said


@pytest.mark.parametrize("batch", [2, 30, 96, 100, 4096])
@pytest.mark.parametrize("lanes", [1, 7, 32, 50])
@pytest.mark.parametrize("processes", [1, 3, 8])
def test_what_is_proposed_would_do(batch: int, lanes: int, processes: int) -> None:
    fits = TrainSettings.model_validate({"batch": batch, "data": {"lanes": 1}})
    data = fits.data.model_copy(update={"lanes": lanes})
    said = fits.model_copy(update={"data": data}).misfit(processes)
    assert bool(said) == bool(batch % lanes or lanes % processes)
    for way in said.partition("; ")[2].split(", or "):
        what, _, numbers = way.rpartition("=") if "=" in way else way.rpartition(" ")
        for number in map(int, numbers.split(" or ") if numbers else []):
            if what == "set train.data.lanes":
                assert batch % number == number % processes == 0
            elif what == "set train.batch":
                assert number % lanes == 0
            else:
                assert what == "train in"
                assert lanes % number == 0

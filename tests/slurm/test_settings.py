from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config
from pipeline.config import ConfigError
from pipeline.recipe import Config
from slurm.settings import SlurmSettings


def test_what_a_stage_asks_for_stands_above_what_all_ask_for() -> None:
    default = {"partition": "cpu", "memory_gb": 8, "time_minutes": 60}
    stages = {"train": {"partition": "gpu", "gpus": 8}}
    settings = SlurmSettings.model_validate({"default": default, "stages": stages})
    found = settings.resources("train")
    assert (found.partition, found.gpus, found.memory_gb, found.time_minutes) == ("gpu", 8, 8, 60)
    assert settings.resources("match").partition == "cpu"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slurm: {stages: {extrct: {cpus: 2}}}", "no stage 'extrct'; did you mean 'extract'?"),
        ("slurm: {default: {memory: 3}}", "no such key; did you mean 'memory_gb'?"),
        ("slurm: {tasks_per_job: 0}", "at least 1"),
        ("slurm: {default: {extra: [nodelist=n1]}}", "write options as --name or --name=value"),
    ],
)
def test_mistakes_name_what_is_meant(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        config.load(Config, path)


def test_an_override_of_a_stage_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("slurm: {stages: {train: {gpus: 1}}}")
    with pytest.raises(ConfigError) as caught:
        config.load(Config, path, ["slurm.stages.trian.gpus=1"])
    said = "slurm.stages.trian.gpus=1: slurm.stages.trian: no stage 'trian'; did you mean 'train'?"
    assert str(caught.value) == said


def test_one_option_and_one_line_may_stand_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("{}")
    overrides = ["slurm.default.extra=--exclusive", "slurm.setup=module load cuda"]
    found = config.load(Config, path, overrides).slurm
    assert found.default.extra == ("--exclusive",) and found.setup == ("module load cuda",)


def test_the_key_of_a_value_is_where_it_was_set() -> None:
    stages = {"train": {"gpus": 8}}
    settings = SlurmSettings.model_validate({"default": {"memory_gb": 8}, "stages": stages})
    assert settings.key("train", "gpus") == "slurm.stages.train.gpus"
    assert settings.key("train", "memory_gb") == "slurm.default.memory_gb"
    assert settings.key("match", "gpus") == "slurm.default.gpus"


def test_nothing_of_it_is_part_of_a_fingerprint() -> None:
    assert SlurmSettings.model_validate({"attempts": 9}).identity() == {}

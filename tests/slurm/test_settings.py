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


def test_nothing_of_it_is_part_of_a_fingerprint() -> None:
    assert SlurmSettings.model_validate({"attempts": 9}).identity() == {}

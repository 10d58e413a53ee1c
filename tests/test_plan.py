"""`python -m pipeline plan`: what it says of a cluster's build, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.__main__ import main

CLUSTER = """
queries: {file: [/data/queries.txt]}
extract: {wat: [/data/crawl/*.wat.gz]}
match: {buckets: 4096}
train: {preset: ViT-B/32}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "clip.yaml"
    path.write_text(CLUSTER)
    return str(path)


def test_a_build_and_a_training_before_there_is_any_data(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = "--candidates 12e9 --pairs 400e6 --cores 2000 --gpu H100 --gpus 128 --mfu 0.4"
    assert main(["plan", config, *numbers.split(), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    stages = {stage["stage"]: stage for stage in answer["stages"]}
    assert list(stages)[-2:] == ["pack", "train"]
    assert stages["pack"]["rows_out"] == pytest.approx(400e6)
    assert stages["extract"]["rows_out"] == 12e9
    assert stages["match"]["tasks"] >= 12_000
    assert answer["facts"]["train: epochs"] == pytest.approx(32, rel=1e-3)
    # 400 million pictures of 30 kB, staged and packed
    assert 24e12 < answer["total"]["kept_bytes"] < 60e12
    assert stages["train"]["gpu_hours"] == pytest.approx(128 * stages["train"]["wall_s"] / 3600)
    assert answer["figures"]["pairs"]["source"] == "given"


def test_the_table_names_its_sources(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--pairs", "1e6", "--gpu", "A100"]) == 0
    text = capsys.readouterr().out
    assert "measured by us: python -m benchmarks rates" in text
    assert "reference: MetaCLIP" in text
    assert "array of" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--candidates", "many"], "many is not a number above 0"),
        (["--gpus", "1.5"], "1.5 is not a whole number"),
        (["--ratio", "match=2"], "a share is at most 1"),
        (["--ratio", "train=0.5"], "expected STAGE=SHARE, of match, dedup"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    config: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", config, *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 2), (["--pairs", "1e6", "--from", "/nowhere"], 3)],
)
def test_what_is_missing_is_asked_for(config: str, arguments: list[str], code: int) -> None:
    """No size; no such run."""
    assert main(["plan", config, *arguments]) == code

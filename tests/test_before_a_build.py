"""What a build ends for before it begins: nobody told who asks, functions or files not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import config, recipe

ROOT = Path(__file__).parent.parent
REAL = "configs/clip_400m.yaml"


@pytest.mark.parametrize(
    ("name", "overrides", "anonymous"),
    [
        (REAL, [], True),
        (REAL, ["until=download"], True),
        (REAL, ["until=balance"], False),
        (REAL, ["download.contact=https://lab.example/crawl"], False),
        ("configs/sample.yaml", ['download.contact=""'], False),
    ],
)
def test_which_builds_would_be_anonymous(name: str, overrides: list[str], anonymous: bool) -> None:
    loaded = config.load(recipe.Config, ROOT / name, overrides)
    assert recipe.fetches_anonymously(loaded) == anonymous


def test_such_a_build_ends_before_it_begins(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pipeline", "build", REAL, "--run", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{REAL}: download.contact is not set" in done.stderr
    assert not run.exists()


@pytest.mark.parametrize(
    "setting",
    [
        "extract.language=no_such:codes",
        "download.blur=no_such:finder",
        "screen.scores={a: {function: 'no_such:score'}}",
    ],
)
def test_so_does_one_whose_functions_are_not_there(tmp_path: Path, setting: str) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pipeline", "build", "configs/sample.yaml"]
    command += ["--run", str(run), setting]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no module 'no_such' in Python is there" in done.stderr
    assert not run.exists()


@pytest.mark.parametrize("contact", ["nonsense", "ftp://lab.example", "me @lab.example", "me@lab"])
def test_a_contact_that_reaches_nobody(contact: str) -> None:
    with pytest.raises(config.ConfigError, match="nor one of mail"):
        config.load(recipe.Config, ROOT / REAL, [f"download.contact={contact}"])


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    command = [sys.executable, "-m", "pipeline", "build", "configs/sample.yaml"]
    command += ["--run", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no run's folder, and holds thesis.tex" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_so_does_one_without_the_files_of_a_later_stage(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pipeline", "build", "configs/sample.yaml"]
    command += ["--run", str(run), f"extract.warc=[{tmp_path}/no/*.warc.gz]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert f"extract.warc: {tmp_path}/no/*.warc.gz: no such input" in done.stderr
    assert not run.exists()

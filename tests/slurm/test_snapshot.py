from __future__ import annotations

import stat
from pathlib import Path

import pytest

from slurm import snapshot


@pytest.fixture
def project(tmp_path: Path) -> Path:
    package = tmp_path / "project" / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "code.py").write_text("x = 1")
    (tmp_path / "project" / "data").mkdir()
    (tmp_path / "project" / "data" / "input.txt").write_text("input")
    return tmp_path / "project"


def test_later_edits_reach_the_next_snapshot_only(project: Path, tmp_path: Path) -> None:
    first = snapshot.take(tmp_path / "run", project)
    (project / "package/inner/code.py").write_text("x = 2")
    second = snapshot.take(tmp_path / "run", project)
    assert (first / "package/inner/code.py").read_text() == "x = 1"
    assert (second / "package/inner/code.py").read_text() == "x = 2"
    assert stat.S_IMODE((tmp_path / "run/code").stat().st_mode) == 0o700


def test_the_same_code_is_one_snapshot_also_if_taken_from_it(project: Path, tmp_path: Path) -> None:
    first = snapshot.take(tmp_path / "run", project)
    (first / "package/__pycache__").mkdir()
    (first / "package/__pycache__/code.pyc").write_text("")
    assert snapshot.take(tmp_path / "run", project) == first
    assert snapshot.take(tmp_path / "run", first) == first
    assert len(list((tmp_path / "run/code").iterdir())) == 1


def test_relative_paths_of_inputs_hold_there(project: Path, tmp_path: Path) -> None:
    first = snapshot.take(tmp_path / "run", project)
    assert (first / "data/input.txt").read_text() == "input"
    (project / "more.txt").write_text("more")
    snapshot.take(tmp_path / "run", project)
    assert (first / "more.txt").read_text() == "more"


def test_a_renamed_file_is_other_code(project: Path, tmp_path: Path) -> None:
    first = snapshot.take(tmp_path / "run", project)
    (project / "package/inner/code.py").rename(project / "package/inner/other.py")
    assert snapshot.take(tmp_path / "run", project) != first

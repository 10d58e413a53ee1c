"""The command `purge`: what it says, what it refuses, when it waits for a training."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset_build import removed
from pipeline import recipe, runner
from pipeline.__main__ import main
from pipeline.lock import RunLock
from pipeline.stage import Run
from pipeline.stop import EXIT_STOPPED


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has begun."""
    config = recipe.Config()
    folder = tmp_path / "run"
    folder.mkdir()
    runner.describe(Run(folder, config), recipe.build_stages(config))
    (tmp_path / "list.txt").write_text("example.org\n")
    return folder


def test_later_puts_it_in_force_and_changes_no_file(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["purge", str(run), str(run.parent / "list.txt"), "--later"]) == 0
    assert "1 entries name nothing that is here" in capsys.readouterr().err
    assert (run / "removed/000001/domains.txt").read_text() == "example.org\n"
    assert not (run / "removed/done.json").exists()


def test_bad_lists_end_with_the_code_of_their_kind(run: Path) -> None:
    (run.parent / "list.txt").write_text("com\n")
    assert main(["purge", str(run), str(run.parent / "list.txt")]) == 2
    assert main(["purge", str(run), str(run.parent / "none.txt")]) == 3
    assert main(["purge", str(run), "--from", str(run.parent)]) == 3
    assert not removed.in_force(run)


def test_a_training_goes_on_without_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = RunLock(run / "train" / "lock.json", beat_s=0.1, job="training")
    try:
        assert main(["purge", str(run), str(run.parent / "list.txt")]) == EXIT_STOPPED
    finally:
        lock.release()
    assert removed.in_force(run)
    said = capsys.readouterr().err
    assert "is training in this run" in said
    assert "leaves out what was removed" in said

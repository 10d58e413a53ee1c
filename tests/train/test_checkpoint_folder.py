"""Checkpoints on disk: whole or not there, whatever byte is wrong and whenever the process dies."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.toy_training import Toy, alone
from train.checkpoint import CheckpointDamaged, Checkpointer, Progress
from train.checkpoint_folder import MARKER

ROOT = Path(__file__).parents[2]


def _save(folder: Path, *steps: int, digest: str = "one", **settings: object) -> Toy:
    """Checkpoints of steps, made by one process."""
    toy = Toy("plain", alone())
    with toy.checkpointer(folder, digest, **settings) as saving:
        for number in range(1, max(steps) + 1):
            toy.step(number)
            if number in steps:
                saving.after_step(Progress(number), now=True)
    return toy


def _resumed(folder: Path, digest: str = "one", **settings: object) -> int:
    saving: Checkpointer
    with Toy("plain", alone()).checkpointer(folder, digest, **settings) as saving:
        return saving.resume().step


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def _positions(size: int) -> list[int]:
    dice = random.Random(size)
    return sorted({0, size - 1, *(dice.randrange(size) for _ in range(12))})


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", MARKER])
def test_one_wrong_byte_anywhere_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    _save(tmp_path / "sound", 1, 2)
    size = (tmp_path / "sound" / "step-0000000002" / name).stat().st_size
    for position in _positions(size):
        folder = tmp_path / f"at-{position}"
        shutil.copytree(tmp_path / "sound", folder)
        path = folder / "step-0000000002" / name
        data = bytearray(path.read_bytes())
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        assert _resumed(folder) == 1, position
        assert _names(folder) == ["damaged", "step-0000000001"]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", MARKER])
@pytest.mark.parametrize("harm", ["cut", "empty", "remove", "folder", "loop"])
def test_what_is_missing_or_unreadable_is_passed_over(
    tmp_path: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, 1, 2)
    path = tmp_path / "step-0000000002" / name
    data = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(data[:-1])
    elif harm == "empty":
        path.touch()
    elif harm == "folder":
        path.mkdir()
    elif harm == "loop":
        path.symlink_to(path)
    assert _resumed(tmp_path) == 1
    assert "going on from the checkpoint before it" in caplog.text
    # Those passed over are neither found again nor counted.
    _save(tmp_path, 2, 3, keep=2)
    assert _steps(tmp_path) == [2, 3]
    assert _resumed(tmp_path) == 3


def test_an_unreadable_folder_is_passed_over(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "step-0000000002")
    (tmp_path / "step-0000000002").symlink_to("step-0000000002")  # of use to nobody, even root
    (tmp_path / "step-x").mkdir()
    assert _resumed(tmp_path) == 1


def test_a_checkpoint_under_the_name_of_another_step_is_not_believed(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2)
    (tmp_path / "step-0000000002").rename(tmp_path / "step-0000000009")
    assert _resumed(tmp_path) == 1


def test_the_damaged_newest_never_outlives_the_sound_one(tmp_path: Path) -> None:
    _save(tmp_path, 1, 4, keep=2)
    (tmp_path / "step-0000000004" / MARKER).unlink()
    toy = Toy("plain", alone())
    with toy.checkpointer(tmp_path, keep=1) as saving:
        assert saving.resume() == Progress(1)
        toy.step(2)
        saving.after_step(Progress(2), now=True)
    assert _resumed(tmp_path) == 2


def test_if_none_is_whole_training_does_not_start_anew_by_itself(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2)
    for path in tmp_path.glob("step-*/__0_0.distcp"):
        path.unlink()
    with pytest.raises(CheckpointDamaged, match=r"none of the 2 .* move them away") as raised:
        _resumed(tmp_path)
    assert raised.value.exit_code == 5
    assert _steps(tmp_path) == [1, 2]


def test_those_of_another_configuration_are_set_aside(tmp_path: Path) -> None:
    _save(tmp_path, 6, digest="other-configuration")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("{}\n")
    toy = Toy("plain", alone())
    state = (toy.net, toy.optimizer)
    settings = toy.checkpointer(tmp_path)._settings
    with Checkpointer(tmp_path, "one", *state, settings, alone(), metrics) as saving:
        assert saving.resume() == Progress()
        toy.step(0)
        saving.after_step(Progress(1), now=True)
    aside = tmp_path / "set-aside-other-config"
    assert _names(aside) == ["metrics.jsonl", "step-0000000006"]
    assert not metrics.exists()
    assert _resumed(tmp_path) == 1
    shutil.move(aside / "step-0000000006", tmp_path)
    assert _resumed(tmp_path, "other-configuration") == 6


def test_what_stays(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 4, 5, 8, 9, 10, keep=2, keep_every_steps=4)
    assert _steps(tmp_path) == [4, 8, 9, 10]
    _save(tmp_path / "plain", 2, 9, 10, 100, keep=2)
    assert _steps(tmp_path / "plain") == [10, 100]


def test_the_marker_names_every_file_with_its_checksum(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    folder = tmp_path / "step-0000000001"
    state = json.loads((folder / MARKER).read_text())
    assert sorted(state["sha256"]) == sorted(p.name for p in folder.iterdir() if p.name != MARKER)
    assert state["progress"] == {"step": 1, "skipped": 0, "substituted": 0, "guard": {}}


def test_killed_before_every_operation_on_a_file(tmp_path: Path) -> None:
    """Before every fourth, for time; of the training thread and of the one that writes."""
    command = [sys.executable, "-m", "tests.train.kill_points", str(tmp_path), "4"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert int(ended.stdout) >= 12

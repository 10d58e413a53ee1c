"""Checkpoints while training goes on: when, beside what, and what becomes of failures."""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline import files
from pipeline.config import UserError
from pipeline.lock import RunInUse
from tests.train.toy_training import Toy, alone, group, on_ranks
from train.checkpoint import CheckpointDamaged, Progress, SaveFailed
from train.checkpoint_folder import MARKER
from train.distributed import Process


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def _train(toy: Toy, folder: Path, first: int, last: int, **settings: object) -> list[float]:
    """Steps `first` to `last` - 1, with what checkpoints are due, ending in one; the losses."""
    losses = []
    with toy.checkpointer(folder, **settings) as saving:
        assert saving.resume().step == first
        for number in range(first, last):
            losses.append(toy.step(number))
            saving.after_step(Progress(number + 1), now=number + 1 == last)
    return losses


class Held:
    """A disk that forces nothing down until it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.let = threading.Event(), threading.Event()
        real = files.reread_sha256

        def reread(path: Path) -> str:
            self.reached.set()
            assert self.let.wait(60)
            return real(path)

        monkeypatch.setattr(files, "reread_sha256", reread)


def test_training_goes_on_while_a_checkpoint_of_its_moment_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Held(monkeypatch)
    toy = Toy("plain", alone())
    with toy.checkpointer(tmp_path, every_steps=3) as saving:
        for number in range(3):
            toy.step(number)
            saving.after_step(Progress(number + 1))
        moment = toy.tensors()
        assert disk.reached.wait(10)
        for number in range(3, 5):
            toy.step(number)
            saving.after_step(Progress(number + 1))
        assert not _steps(tmp_path)
        disk.let.set()
        saving.finish()
        assert _steps(tmp_path) == [3]
    other = Toy("plain", alone())
    with other.checkpointer(tmp_path) as saving:
        assert saving.resume() == Progress(3)
    loaded = other.tensors()
    assert all(torch.equal(loaded[name], moment[name]) for name in moment)


def test_one_save_at_a_time_and_the_next_says_that_it_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Held(monkeypatch)
    toy = Toy("plain", alone())
    with toy.checkpointer(tmp_path, every_steps=1) as saving:
        toy.step(0)
        saving.after_step(Progress(1))
        assert disk.reached.wait(10)
        threading.Timer(0.3, disk.let.set).start()
        toy.step(1)
        saving.after_step(Progress(2))
        assert _steps(tmp_path) == [1]
    assert _steps(tmp_path) == [1, 2]
    waited = [r for r in caplog.records if "waited" in r.message]
    assert [r.levelno for r in waited] == [logging.WARNING]
    assert re.search(r"step 2 waited 0\.[3-9] s for that of step 1", waited[0].message)


def test_time_makes_a_checkpoint_due_where_steps_do_not(tmp_path: Path) -> None:
    toy = Toy("plain", alone())
    with toy.checkpointer(tmp_path, every_minutes=1e-9) as saving:
        toy.step(0)
        saving.after_step(Progress(1))
    assert _steps(tmp_path) == [1]
    with toy.checkpointer(tmp_path, every_minutes=1e3) as saving:
        saving.resume()
        saving.after_step(Progress(2))
    assert _steps(tmp_path) == [1]


@pytest.fixture
def small_files() -> Iterator[Callable[[int | None], None]]:
    """Sets the largest size of a file, bytes, beyond which write(2) fails; None lifts it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        soft = before[0] if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(None)


def test_a_disk_that_refuses_loses_nothing_and_ends_training_when_it_stays_so(
    tmp_path: Path,
    small_files: Callable[[int | None], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    toy = Toy("plain", alone(), width=500)
    with toy.checkpointer(tmp_path, every_steps=1, max_failed_saves=2) as saving:

        def step(number: int) -> None:
            toy.step(number)
            saving.after_step(Progress(number))
            saving.finish()

        step(1)
        small_files(4000)
        step(2)
        step(3)
        assert _steps(tmp_path) == [1]
        assert not list(tmp_path.glob(".step-*")), "what was written of it makes no room"
        assert "the checkpoint of step 2 could not be written: [Errno 27] File too" in caplog.text
        assert "that of step 1 stays. Make room there, or lower" in caplog.text
        small_files(None)
        step(4)
        small_files(4000)
        step(5)  # counts from 1 again
        step(6)
        with pytest.raises(SaveFailed, match=r"step 7 .*File too large.*; 3 in a row failed"):
            step(7)
        small_files(None)
    assert _steps(tmp_path) == [1, 4]


def test_a_stop_that_cannot_be_saved_is_an_error(
    tmp_path: Path, small_files: Callable[[int | None], None]
) -> None:
    toy = Toy("plain", alone(), width=500)
    with (
        pytest.raises(SaveFailed, match="File too large"),
        toy.checkpointer(tmp_path, max_failed_saves=5) as saving,
    ):
        toy.step(0)
        small_files(4000)
        saving.after_step(Progress(1), now=True)
    small_files(None)  # before pytest writes the outcome, perhaps to a file


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB; skips where it may not be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_with_what_is_needed_and_training_recovers(
    tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy = Toy("plain", alone(), width=2500)  # 27,500 numbers, three times: 0.33 MB
    with toy.checkpointer(tiny_disk, every_steps=1, keep=1) as saving:
        for number in range(1, 5):
            toy.step(number)
            saving.after_step(Progress(number))
            saving.finish()
            if number == 1:
                (tiny_disk / "ballast").write_bytes(bytes(500_000))
            elif number == 3:
                (tiny_disk / "ballast").unlink()
    assert caplog.text.count(f"[Errno {errno.ENOSPC}] No space left on device: 0 MB to write") == 2
    assert _steps(tiny_disk) == [4]


def test_a_disk_that_returns_other_bytes_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.reread_sha256

    def reread(path: Path) -> str:
        if path.name.endswith(".distcp"):
            with path.open("r+b") as stream:
                stream.seek(1000)
                stream.write(b"\0\0\0\0\1")
        return real(path)

    monkeypatch.setattr(files, "reread_sha256", reread)
    toy = Toy("plain", alone())
    with (
        pytest.raises(SaveFailed, match="the disk returned other bytes"),
        toy.checkpointer(tmp_path) as saving,
    ):
        toy.step(0)
        saving.after_step(Progress(1), now=True)


def test_two_trainers_in_one_run_are_one_too_many(tmp_path: Path) -> None:
    with (
        Toy("plain", alone()).checkpointer(tmp_path),
        pytest.raises(RunInUse, match=rf"process {os.getpid()} on .* is training in this run"),
        Toy("plain", alone()).checkpointer(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_who_lost_the_run_publishes_nothing(tmp_path: Path) -> None:
    toy = Toy("plain", alone())
    with toy.checkpointer(tmp_path) as saving, pytest.raises(SaveFailed, match="was removed"):
        toy.step(0)
        (tmp_path / "lock.json").unlink()
        saving.after_step(Progress(1), now=True)
    assert not _steps(tmp_path)


@pytest.mark.parametrize("seed", [0, 1])
def test_stopped_anywhere_losses_go_on_bit_for_bit(tmp_path: Path, seed: int) -> None:
    _stop_and_go_on("plain", alone(), tmp_path, seed)


def _stop_and_go_on(kind: str, process: Process, folder: Path, seed: int) -> None:
    dice = random.Random(seed)
    stop = dice.randrange(2, 20)
    last = stop + 52
    whole = _train(Toy(kind, process), folder / "whole", 0, last, every_steps=20)
    before = _train(Toy(kind, process), folder / "parts", 0, stop, every_steps=7)
    after = _train(Toy(kind, process), folder / "parts", stop, last, every_steps=9)
    assert len(after) >= 50
    assert before + after == whole


def test_ranks(tmp_path: Path) -> None:
    """All that needs ranks, in one set of them: starting them takes longest."""
    on_ranks(2, _on_two_ranks, str(tmp_path))


def _on_two_ranks(rank: int, where: str) -> None:
    folder = Path(where)
    with group(folder / "meet", rank, 2) as process:
        for kind in ("ddp", "fsdp"):
            _stop_and_go_on(kind, process, folder / f"bits-{kind}", seed=3)
            _one_rank_cannot_write(kind, process, folder / f"full-{kind}")
            _all_pass_over_the_same(kind, process, folder / f"damage-{kind}")
        _the_first_rank_has_the_clock(process, folder / "clock")
        _a_second_job_is_refused_in_all_ranks(process, folder / "lock")


def _one_rank_cannot_write(kind: str, process: Process, folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    toy = Toy(kind, process, width=500)
    with toy.checkpointer(folder, every_steps=1, max_failed_saves=1) as saving:
        toy.step(0)
        saving.after_step(Progress(1))
        saving.finish()
        if not process.leads:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
        toy.step(1)
        saving.after_step(Progress(2))
        saving.finish()  # no rank is told apart: all know, none raises
        toy.step(2)
        saving.after_step(Progress(3))
        with pytest.raises(SaveFailed, match=r"step 3 .*too large.*2 in a row failed"):
            saving.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    process.wait()
    assert [path.name for path in folder.iterdir()] == ["step-0000000001"]


def _all_pass_over_the_same(kind: str, process: Process, folder: Path) -> None:
    _train(Toy(kind, process), folder, 0, 6, every_steps=2, keep=3)
    process.wait()
    for name, step in (("__1_0.distcp", 4), (MARKER, 2), ("__0_0.distcp", 0)):
        newest = folder / f"step-{max(_steps(folder)):010d}" / name
        process.wait()
        if process.leads:
            newest.write_bytes(newest.read_bytes()[:-1] + b"?")
        process.wait()
        with Toy(kind, process).checkpointer(folder) as saving:
            if step:
                assert saving.resume() == Progress(step)
            else:
                with pytest.raises(CheckpointDamaged):
                    saving.resume()
        process.wait()


def _the_first_rank_has_the_clock(process: Process, folder: Path) -> None:
    toy = Toy("ddp", process)
    with toy.checkpointer(folder, every_minutes=1e-9 if process.leads else 1e9) as saving:
        saving.after_step(Progress(1))
        saving.finish()
    process.wait()
    assert _steps(folder) == [1]


def _a_second_job_is_refused_in_all_ranks(process: Process, folder: Path) -> None:
    toy = Toy("ddp", process)
    with toy.checkpointer(folder), pytest.raises(UserError), toy.checkpointer(folder):
        pass

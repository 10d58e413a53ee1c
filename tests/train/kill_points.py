"""Kill -9 before the n-th operation on a file of the checkpoints; then go on.

Python's audit events see every open, rename, mkdir, link and removal, of any thread. Each killed
trainer is followed by one that ends; what it gives must be what an undisturbed one gives.
By hand, for every n: `python -m tests.train.kill_points FOLDER 1`.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.train.toy_training import Toy, alone
from train.checkpoint import Progress
from train.training_state import TrainingState

STEPS, MAX_LOST = 6, 4
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir"}


def train(folder: Path, report: int) -> None:
    """Train to the end, writing `newest checkpoint, step` after every step; leave the tensors."""
    toy = Toy("plain", alone())
    with toy.checkpointer(folder, max_lost_steps=MAX_LOST) as saving:
        done = saving.resume().step
        os.write(report, bytes([done, done]))
        while done < STEPS:
            toy.step(done)
            done += 1
            saving.after_step(Progress(done), now=done == STEPS)
            newest = max((int(p.name[5:]) for p in folder.glob("step-*")), default=0)
            os.write(report, bytes([newest, done]))
    torch.save(toy.tensors(), folder.with_suffix(".pt"))


def forked(folder: Path, kill_at: int) -> tuple[bool, list[tuple[int, int]]]:
    """Train in a child, killed at an operation (0: at none); whether it was, and its report."""
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if kill_at:
                sys.addaudithook(_killer(folder, kill_at))
            train(folder, writes)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writes)
    with os.fdopen(reads, "rb") as stream:
        told = stream.read()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0, f"kill point {kill_at}"
    return killed, list(zip(told[::2], told[1::2], strict=True))


def _killer(folder: Path, kill_at: int) -> Any:
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and str(args[0]).startswith(str(folder)):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def main(where: Path, stride: int) -> int:
    """Kill at the first operation and every `stride`-th after it; how many trainers were killed."""
    torch.set_num_threads(1)
    warm = Toy("plain", alone())  # or each child would load the rest of torch by itself
    warm.step(0)
    TrainingState(warm.net, warm.optimizer, alone()).copy()
    forked(where / "undisturbed", 0)
    expected = torch.load(where / "undisturbed.pt", weights_only=True)
    for kill_at in itertools.count(1, stride):
        folder = where / f"killed-at-{kill_at}"
        killed, told = forked(folder, kill_at)
        _, after = forked(folder, 0)
        resumed, reached = after[0][1], told[-1][1] if told else 0
        published = max((newest for newest, _ in told), default=0)
        assert resumed >= published, (kill_at, told, after)
        assert reached - resumed <= MAX_LOST, (kill_at, told, after)
        actual = torch.load(folder.with_suffix(".pt"), weights_only=True)
        assert all(torch.equal(actual[name], expected[name]) for name in expected), kill_at
        left = sorted(path.name for path in folder.iterdir())
        assert left == ["step-0000000004", "step-0000000006"], (kill_at, left)
        if not killed:
            return (kill_at - 1) // stride
    raise AssertionError


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), int(sys.argv[2])))

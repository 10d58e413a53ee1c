"""A toy run on the test cluster: its configuration, its driver, and what its tasks did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurm import batches
from tests.cluster.local_slurm import Cluster
from tests.slurm import toy

ROOT = Path(__file__).parents[2]


class ToyRun:
    """A run of the toy recipe; `numbers` and `slurm` are sections of its configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.config = folder / "toy.yaml"
        self.configure()

    def configure(self, numbers: Any = None, slurm: Any = None, **others: Any) -> None:
        slurm = {"poll_seconds": 0.5, "tasks_per_job": 1, **(slurm or {})}
        sections = {"numbers": numbers or {}, "slurm": slurm, **others}
        self.config.write_text(yaml.safe_dump(sections))

    def start(self, *options: str, path: Path | None = None) -> subprocess.Popen[str]:
        """Start a driver; `path` goes before the PATH on which it finds SLURM's commands."""
        command = [sys.executable, "-m", toy.PROGRAM, "build", str(self.config)]
        command += ["--run", str(self.folder), "--on", "slurm", *options]
        found = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PATH": found},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def build(self, *options: str, path: Path | None = None) -> tuple[int, str]:
        """Run a driver to its end: exit code, and what it said."""
        driver = self.start(*options, path=path)
        said, _ = driver.communicate(timeout=150)
        return driver.returncode, said

    def hurry(self) -> None:
        """Let the slow tasks end."""
        (self.folder / "hurry").touch()

    @property
    def tallies(self) -> list[int]:
        """How often each task of `numbers` has begun."""
        paths = self.folder.glob("tally-*")
        found = {int(path.name.partition("-")[2]): len(path.read_text()) for path in paths}
        return [found.get(i, 0) for i in range(max(found, default=-1) + 1)]

    @property
    def total(self) -> int | None:
        """What the run came to; None before it is done."""
        try:
            value: int = json.loads((self.folder / "total/out/sum.json").read_text())
        except FileNotFoundError:
            return None
        return value

    @property
    def driver_log(self) -> str:
        path = self.folder / "slurm/driver.log"
        return path.read_text() if path.exists() else ""

    def batches(self, stage: str = "numbers") -> list[batches.Batch]:
        """Its arrays so far."""
        return [b for b in batches.everything(self.folder / "slurm") if b.stage == stage]


@pytest.fixture
def toy_run(cluster: Cluster, tmp_path: Path) -> ToyRun:
    return ToyRun(tmp_path)


@pytest.fixture
def wait_for() -> Callable[..., None]:
    def wait(holds: Callable[[], object], what: str, timeout_s: float = 60) -> None:
        until = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < until, f"waited {timeout_s:g} s for {what}"
            time.sleep(0.05)

    return wait

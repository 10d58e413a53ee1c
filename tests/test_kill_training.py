"""A trainer that is killed again and again gives the weights of one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills", "steps"), [(1, 4, 120), (2, 3, 100)])
def test_killed_again_and_again(tmp_path: Path, ranks: int, kills: int, steps: int) -> None:
    numbers = {"--ranks": ranks, "--kills": kills, "--steps": steps}
    arguments = [str(word) for pair in numbers.items() for word in pair]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.kill_training", str(tmp_path), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"{kills} kills" in ended.stdout
    assert "final weights equal" in ended.stdout

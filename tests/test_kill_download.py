"""Builds that are killed, or whose tasks are done twice, publish what undisturbed ones do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_raced_and_killed_in_turn(tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.kill_download",
            str(tmp_path),
            "--kills",
            "4",
            "--races",
            "4",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "shards byte-identical" in ended.stdout
    assert "4 double executions: one published each time" in ended.stdout
    assert "tasks killed once: the run completes" in ended.stdout

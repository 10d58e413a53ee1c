"""A build on a disk that fails at any call: loudly and with nothing published, or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_calls_that_fail(tmp_path: Path) -> None:
    """Each 90th; `python -m tests.full_disk FOLDER` does all."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.full_disk", str(tmp_path), "--first", "37", "--every", "90"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, second = ended.stdout.splitlines()
    assert first.startswith("a full disk at ") and second.startswith("half a write")

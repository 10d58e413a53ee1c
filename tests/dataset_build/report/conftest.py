"""A run folder to publish into."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dataset_build.report.fake_build import FakeBuild


@pytest.fixture
def fake_build(tmp_path: Path) -> FakeBuild:
    """A run folder in which nothing is published yet."""
    return FakeBuild(tmp_path / "run")

"""What all tests share: where real inputs are, if anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real inputs that $OPENWIT_DATA names; skips where it is unset."""
    folder = os.environ.get("OPENWIT_DATA")
    if not folder:
        pytest.skip("$OPENWIT_DATA is not set: it names a folder with real inputs")
    return Path(folder)

"""What has failed is asked for again if somebody says so, and only then."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from tests.dataset_build.hand_made import Pair
from tests.dataset_build.inline import InlineExecutor

from .conftest import HostileWeb
from .downloads import Downloads, asked, failing, pictures, timeless


@pytest.fixture
def select(
    tmp_path: Path, web: HostileWeb, inline: InlineExecutor, monkeypatch: pytest.MonkeyPatch
) -> Downloads:
    monkeypatch.setenv("OPENWIT_CONNECT_TO", web.connect_to)
    return Downloads(tmp_path / "run", web, inline)


def test_what_failed_is_asked_again_if_somebody_says_so(select: Downloads, web: HostileWeb) -> None:
    dead, busy = failing(0, 1), [Pair(f"http://a.example/status/503?{i}") for i in range(3)]
    pairs = pictures(*range(9)) + dead + busy
    usual: dict[str, Any] = {"retries": 0, "pairs_per_task": 4}
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    assert select(pairs, **usual) == asked(pairs)
    before = timeless(select.outcomes)
    assert select(pairs, **usual, timeout_s=6.0) == []
    assert select(pairs, **usual, ask_again_before=began) == []
    time.sleep(1)  # outcomes are of whole seconds
    moment = datetime.now(timezone.utc).isoformat()
    assert select(pairs, **usual, ask_again_before=moment) == asked(busy)
    assert timeless(select.outcomes) == before
    assert select.stats.dropped == {"dead_link": 2, "server_error": 3}
    select.check_pictures()
    assert select(pairs, **usual, ask_again_before=moment) == []
    assert select(pairs, **usual) == []  # nor by going back


def test_the_moment_to_ask_again_before_must_have_come(select: Downloads) -> None:
    with pytest.raises(ConfigError, match=r"2999-01-01 00:00:00\+00:00 is yet to come"):
        select(pictures(0), ask_again_before="2999-01-01")

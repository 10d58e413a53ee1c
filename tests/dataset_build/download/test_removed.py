"""What was removed is not asked for again, and not kept where another address has it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dataset_build import download, purge, removal
from dataset_build.download import DownloadSettings
from pipeline import tar
from pipeline.stage import Run, Stage
from tests.dataset_build.hand_made import Config, Pair, balance_of, dedup_of
from tests.dataset_build.inline import InlineExecutor

from .conftest import HostileWeb, picture


class Builds:
    """A run that downloads whatever is selected; `ask` removes from it."""

    def __init__(self, folder: Path, web: HostileWeb) -> None:
        self._web = web
        settings = DownloadSettings(
            timeout_s=5.0,
            polite_connections=8,
            pairs_per_task=8,
            allow_networks=("127.0.0.0/8",),
            robots="ignore",
            requests_per_s=None,
        )
        folder.mkdir()
        self.run = Run(folder, Config(download=settings))

    def __call__(self, *selected: Pair) -> tuple[dict[str, str], list[str]]:
        """Status by address and text, and what the server was asked."""
        self._web.hits.clear()
        stages = self._stages(selected)
        run = Run(self.run.folder, self.run.config)
        requests = purge.settle(run, stages)
        InlineExecutor().advance(run, stages)
        purge.finish(Run(self.run.folder, self.run.config), requests)
        rows = self.rows()
        assert [row["uid"] for row in rows] == sorted(pair.uid for pair in selected)
        by_uid = {pair.uid: f"{pair.url.rpartition('/')[2]} {pair.text}" for pair in selected}
        return {by_uid[row["uid"]]: row["status"] for row in rows}, sorted(self._web.hits)

    @staticmethod
    def _stages(selected: Sequence[Pair]) -> list[Stage]:
        return [dedup_of(selected), balance_of(selected), download.STAGE]

    def rows(self) -> list[dict[str, Any]]:
        run = Run(self.run.folder, self.run.config)
        paths = [run.path(reference) for reference in run.find("download:fetched-*")]
        return [row for path in paths for row in pq.read_table(path).to_pylist()]

    def staged(self) -> dict[str, bytes]:
        """All pictures that any tar of the run has bytes of, by their addresses' hashes."""
        found = {}
        for path in self.run.folder.rglob("staged-*.tar"):
            with tar.opened(path) as opened:
                for member in tar.members(opened):
                    data = bytes(opened.read(member.offset, member.size))
                    if member.name.endswith(".jpg") and data.strip(b"\0"):
                        found[member.name.partition(".")[0]] = data
        return found

    def ask(self, folder: Path, *entries: str) -> removal.Request:
        path = folder / "list.txt"
        path.write_text("\n".join(entries))
        return removal.ask(self.run, removal.read([path]))


@pytest.fixture(autouse=True)
def detour(web: HostileWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENWIT_CONNECT_TO", web.connect_to)


def _pair(number: int, text: str = "x", query: str = "") -> Pair:
    return Pair(f"http://a.example/picture/{number}{query}", text)


def test_a_rebuild_asks_for_nothing_that_was_removed(tmp_path: Path, web: HostileWeb) -> None:
    build = Builds(tmp_path / "run", web)
    first = [_pair(n) for n in range(12)]
    assert set(build(*first)[0].values()) == {"ok"}
    sent = hashlib.sha256(picture(1)).hexdigest()
    request = build.ask(tmp_path, first[0].url, sent, first[2].uid.hex())
    assert request.found["in all"] == 3

    # Another cap, another snapshot: some pairs go, some come, two of them with removed pictures.
    again = [*first[:8], _pair(1, query="?size=large"), _pair(2, "another caption"), _pair(20)]
    status, asked = build(*again)
    # Whose picture the first of them serves shows when it has come.
    assert asked == ["/picture/1?size=large", "/picture/20"]
    gone = {"0 x", "1 x", "2 x", "1?size=large x", "2 another caption"}
    assert {name for name, reason in status.items() if reason == "removed"} == gone
    assert {reason for name, reason in status.items() if name not in gone} == {"ok"}
    kept = {pair.uid[:8].hex() for pair in [*first[3:], _pair(20)]}
    assert build.staged().keys() == kept
    for row in build.rows():
        if row["status"] == "removed":
            assert (row["url"], row["text"], row["final_url"]) == ("http://a.example/", "", "")
            assert (row["page_url"], row["staged"]) == ("", "")

    status, asked = build(*again[1:])  # that other address is known by now
    assert asked == []


def test_a_run_that_begins_with_them_never_asks(tmp_path: Path, web: HostileWeb) -> None:
    build = Builds(tmp_path / "run", web)
    build.ask(tmp_path, "http://a.example/picture/0", "b.example", _pair(2).uid.hex())
    elsewhere = Pair("http://img.b.example/picture/7")
    led_there = Pair("http://a.example/redirect?to=http://b.example/picture/8")
    status, asked = build(_pair(0), _pair(1), _pair(2), elsewhere, led_there)
    assert status.pop("1 x") == "ok"
    assert set(status.values()) == {"removed"}
    assert "/picture/0" not in asked
    assert "/picture/2" not in asked
    assert "/picture/7" not in asked
    assert build.staged().keys() == {_pair(1).uid[:8].hex()}

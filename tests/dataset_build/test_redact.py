"""Tables and tars without what was removed: in every download that has a part of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataset_build import purge, redact, removal, removed
from pipeline import damage, files, manifest
from pipeline.stage import Run
from tests.dataset_build.download.conftest import HostileWeb
from tests.dataset_build.inline import InlineExecutor
from tests.small_build import SmallBuild, load


@pytest.fixture
def web() -> Iterator[HostileWeb]:
    load()
    server = HostileWeb()
    yield server
    server.close()


class Crash(BaseException):
    pass


def _build(small: SmallBuild, folder: Path) -> InlineExecutor:
    run, executor = Run(folder, small.config), InlineExecutor()
    requests = purge.settle(run, small.stages)
    executor.advance(run, small.stages)
    purge.finish(Run(folder, small.config), requests)
    return executor


def _rows(run: Run) -> list[dict[str, Any]]:
    columns = (*removed.COLUMNS, "staged", "staged_offset", "staged_bytes")
    rows = [row for table in removed.outcomes(run, columns) for row in table.to_pylist()]
    return sorted(rows, key=lambda row: bytes(row["uid"]))


def _ask(run: Run, *entries: str) -> None:
    path = run.folder.parent / "list.txt"
    path.write_text("\n".join(entries))
    removal.ask(run, removal.read([path]))


def _picture(folder: Path, row: dict[str, Any]) -> bytes:
    data = (folder / "download/out" / row["staged"]).read_bytes()
    return data[row["staged_offset"] :][: row["staged_bytes"]]


def _with(folder: Path, needle: bytes) -> list[str]:
    below = (path for path in files.walk(folder) if path.relative_to(folder).parts[0] != "removed")
    return [str(path) for path in below if re.search(needle, path.read_bytes())]


@pytest.mark.parametrize("crashes_at", [None, 1, 2, 3])
def test_a_tar_of_several_downloads_is_emptied_in_all(
    tmp_path: Path, web: HostileWeb, monkeypatch: pytest.MonkeyPatch, crashes_at: int | None
) -> None:
    """Cut anew, four downloads have a part each of the one tar that the first build fetched."""
    folder = tmp_path / "run"
    _build(SmallBuild(web, addresses=48, tasks=1), folder)
    small = SmallBuild(web, addresses=48, tasks=4)
    _build(small, folder)
    run = Run(folder, small.config)
    assert len({path.name for path in folder.rglob("staged-*.tar")}) == 1
    ok = [row for row in _rows(run) if row["status"] == "ok"]
    first, last = ok[0], ok[-1]  # of the first and of the last download
    pictures = [re.escape(_picture(folder, row)) for row in (first, last)]
    assert all(_with(folder, picture) for picture in pictures)
    _ask(run, first["url"], last["url"])
    if crashes_at:
        revise, calls = manifest.revise, 0

        def crashing(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == crashes_at:
                raise Crash
            return revise(*arguments)

        monkeypatch.setattr(redact.published, "revise", crashing)
        with pytest.raises(Crash):
            _build(small, folder)
        monkeypatch.setattr(redact.published, "revise", revise)
    _build(small, folder)
    assert not any(_with(folder, picture) for picture in pictures)
    run = Run(folder, small.config)
    for stage in ("download", "screen", "pack"):
        for done in run.manifests(stage):
            assert damage.damage(run.stage_folder(stage), done) == []
    if not crashes_at:
        paths = {path.stat().st_ino for path in folder.rglob("staged-*.tar")}
        assert len(paths) == 1, "it is one file still"


def test_an_address_without_a_picture_goes_from_the_tar_too(
    tmp_path: Path, web: HostileWeb
) -> None:
    small = SmallBuild(web, addresses=24, tasks=1)
    folder = tmp_path / "run"
    _build(small, folder)
    run = Run(folder, small.config)
    row = next(row for row in _rows(run) if row["status"] != "ok")
    needle = re.escape(row["url"].partition(".example")[2].encode()) + rb"(?![0-9])"
    assert any(path.endswith(".tar") for path in _with(folder, needle))
    _ask(run, row["url"])
    _build(small, folder)
    assert not [path for path in _with(folder, needle) if "/download/" in path]


def test_what_is_left_in_a_tar_is_an_error(
    tmp_path: Path, web: HostileWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SmallBuild(web, addresses=8, tasks=1)
    folder = tmp_path / "run"
    _build(small, folder)
    run = Run(folder, small.config)
    _ask(run, next(row["url"] for row in _rows(run) if row["status"] == "ok"))
    monkeypatch.setattr(redact, "_without", lambda source, target, members: os.link(source, target))
    with pytest.raises(purge.StillThere, match="2 files in its tars"):
        _build(small, folder)

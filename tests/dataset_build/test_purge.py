"""What is removed is nowhere any more, stays away, and nothing else changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dataset_build import purge, records, redact, removal, removed
from pipeline import damage, files, tar
from pipeline.config import ConfigError
from pipeline.stage import Run
from tests.dataset_build.published_build import Web, picture, run_in
from train.data.index import open_dataset
from train.data.removed import Removed

WEB = Web(size=300)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = run_in(tmp_path_factory.mktemp("pristine") / "run")
    WEB.build(run)
    return run.folder


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Run:
    """A built run of its own, hard links as in the original."""
    subprocess.run(["cp", "-a", pristine, tmp_path / "run"], check=True)
    return run_in(tmp_path / "run")


def _ask(run: Run, tmp_path: Path, *entries: str, reason: str = "") -> removal.Request:
    path = tmp_path / "list.txt"
    path.write_text("# asked for\n" + "\n".join(entries) + "\n")
    return removal.ask(run, removal.read([path]), reason)


def _holding(folder: Path, *needles: bytes) -> list[str]:
    """The files of a run that have one of these bytes in them; parquet is looked at by rows."""
    found = []
    for path in files.walk(folder):
        name = path.relative_to(folder).as_posix()
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data = repr(pq.read_table(path).to_pylist()).encode()
        if any(needle in data for needle in needles):
            found.append(name)
    return [name for name in found if not name.startswith("removed/")]


def _shards(folder: Path) -> dict[str, str]:
    return {p.name: files.sha256(p) for p in (folder / "pack/out/shards").iterdir()}


def _uids(folder: Path) -> set[bytes]:
    """Samples of the index, of each tar and of the loader's index, which are the same."""
    rows = pq.read_table(folder / "pack/out/index.parquet").to_pylist()
    in_tars = set()
    for path in (folder / "pack/out/shards").iterdir():
        with tar.opened(path) as opened:
            in_tars |= {m.name.partition(".")[0] for m in tar.members(opened, canonical=True)}
    index = open_dataset(folder / "pack/out")
    assert {index.name(row) for row in range(len(index))} == in_tars
    assert {row["uid"].hex() for row in rows} == in_tars
    return {row["uid"] for row in rows}


def test_no_byte_is_left_and_other_shards_stay_as_they_were(run: Run, tmp_path: Path) -> None:
    before, uids = _shards(run.folder), _uids(run.folder)
    fingerprint = removed.fingerprint(run.folder)
    assert len(uids) == WEB.size
    gone = [7, 98, 105]  # 99 serves the file of 98
    needles = [hashlib.sha256(str(n).encode()).digest() for n in gone]
    needles += [WEB.text(n).encode() for n in (*gone, 99)]
    assert len(_holding(run.folder, *needles)) > 5
    request = _ask(run, tmp_path, WEB.url(7), WEB.sent(98).hex(), WEB.uid(105).hex())
    executor = WEB.build(run)
    assert request.found["in all"] == 4
    assert _uids(run.folder) == uids - {WEB.uid(n) for n in (*gone, 99)}
    assert _holding(run.folder, *needles) == []
    assert removed.fingerprint(run.folder) != fingerprint
    after = _shards(run.folder)
    changed = {name for name in before if before[name] != after[name]}
    assert 1 <= len(changed) <= 4 < len(before)
    assert after.keys() == before.keys()
    assert {task.stage for task in executor.ran} == {"pack"}
    for stage in ("balance", "download", "screen", "pack"):
        for done in Run(run.folder, run.config).manifests(stage):
            assert damage.damage(run.stage_folder(stage), done) == []
    assert not WEB.build(run_in(run.folder)).ran, "there is nothing left to do"


def test_a_domain_takes_what_lies_there_and_nothing_else(run: Run, tmp_path: Path) -> None:
    uids = _uids(run.folder)
    request = _ask(run, tmp_path, "d48.example")  # 98 there has the file of 99, elsewhere
    WEB.build(run)
    assert uids - _uids(run.folder) == {WEB.uid(n) for n in range(48, WEB.size, 50)}
    assert request.found["domains"] == request.found["in all"] == 6
    with_redirects = _ask(run, tmp_path, "cdn.example")
    assert with_redirects.found["in all"] == WEB.size - 6


def test_the_description_and_the_logs_say_so(run: Run, tmp_path: Path) -> None:
    before = removed.fingerprint(run.folder)
    assert purge.summary(run.folder) == []
    assert (
        json.loads((run.folder / "pack/out/dataset.json").read_bytes())["removed"]["samples"] == 0
    )
    request = _ask(run, tmp_path, WEB.url(3), "http://nowhere.example/x", reason="mail of today")
    assert list(request.unknown) == ["http://nowhere.example/x"]
    assert "files still hold some" in purge.summary(run.folder)[0]
    assert not purge.is_settled(run.folder)
    WEB.build(run)
    assert purge.is_settled(run.folder)
    (line,) = purge.summary(run.folder)
    assert line.startswith("removed: 1 pairs by 1 request since ")
    assert "still" not in line
    description = json.loads((run.folder / "pack/out/dataset.json").read_bytes())
    assert description["removed"] == {
        "samples": 1,
        "sha256": hashlib.sha256(WEB.uid(3)).hexdigest(),
    }
    (entry,) = removed.requests(run.folder)
    assert entry["reason"] == "mail of today"
    assert entry["entries"] == {"addresses": 2, "domains": 0, "sha256": 0, "uids": 0}
    assert entry["lists"][0]["sha256"] == files.sha256(tmp_path / "list.txt")
    log = [json.loads(row) for row in (run.folder / "removed/log.jsonl").read_text().splitlines()]
    assert [(row["samples"], row["fingerprint_before"]) for row in log] == [(1, before)]
    assert log[0]["fingerprint"] == description["fingerprint"]
    stats = [m.stats for m in Run(run.folder, run.config).manifests("pack")]
    assert sum(each.dropped["removed"] for each in stats) == 1


def test_a_loader_leaves_them_out_before_any_file_is_changed(run: Run, tmp_path: Path) -> None:
    pattern = str(run.folder / "removed/[0-9]*/uids.txt")
    beside = run.folder / "pack/out/removed.txt"
    loader = Removed([pattern], timeout_s=3, every_s=0)
    copied = Removed([str(beside)], timeout_s=3, every_s=0)
    _ask(run, tmp_path, WEB.sent(98).hex())
    purge.show_uids(run.folder)
    for each in (loader, copied):
        each.look()
        assert len(each) == 2
    index = open_dataset(run.folder / "pack/out")
    names = {index.name(row): row for row in range(len(index))}
    assert index.uid[names[WEB.uid(99).hex()]] in loader
    assert index.uid[names[WEB.uid(97).hex()]] not in loader
    WEB.build(run)
    assert beside.exists(), "for copies that are older than the shards"


def test_bad_lines_are_named_and_nothing_comes_in_force(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("d1.example\nnot an entry\n\n# fine\nabc123\nco.uk\n")
    (tmp_path / "uids.txt").write_text("d1.example\n")
    with pytest.raises(ConfigError) as caught:
        removal.ask(run, removal.read([tmp_path / "a.txt", tmp_path / "uids.txt"]))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0].rpartition("/")[2] for line in lines] == [
        *("a.txt:2", "a.txt:5", "a.txt:6"),
        "uids.txt:1",
    ]
    assert removed.in_force(run.folder) == {}


def test_what_a_comment_is_and_what_an_address(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("http://a.example/x#part # why\n  \nA.Example # who\n")
    asked = removal.read([path])
    assert list(asked.entries["addresses"]) == ["http://a.example/x#part"]
    assert list(asked.entries["domains"]) == ["A.Example"]


def test_two_requests_at_the_same_time_lose_nothing(run: Run, tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def ask(number: int) -> None:
        path = tmp_path / f"list-{number}.txt"
        path.write_text(WEB.url(number) + "\n")
        asked = removal.read([path])
        barrier.wait()
        removal.ask(run, asked)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in removed.folders(run.folder)] == [f"{n:06d}" for n in range(1, 5)]
    assert removed.uids(run.folder) == sorted(WEB.uid(n).hex() for n in range(4))
    assert not list((run.folder / "removed").glob(".*"))


def test_another_run_can_take_them_over(run: Run, tmp_path: Path) -> None:
    _ask(run, tmp_path, WEB.url(3), "d9.example")
    other = run_in(tmp_path / "other")
    request = removal.ask(other, removal.read(removal.carried(run.folder)))
    assert request.found["in all"] == 0
    tombstones = removed.Tombstones(other.folder)
    outcome = {"status": "ok", "sha256": WEB.sent(3), "staged_sha256": bytes(32), "final_url": ""}
    assert tombstones.cover({"uid": bytes(16), "url": "http://elsewhere.example/"}, outcome)
    assert tombstones.cover({"uid": bytes(16), "url": "https://img.d9.example/new"}, None)
    assert not tombstones.cover({"uid": bytes(16), "url": WEB.url(4)}, None)


class Crash(BaseException):
    pass


def _crashes(step: int) -> Iterator[None]:
    """Everything that changes the disk in a purge raises at its `step`-th call."""
    calls = 0

    def counted(function: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == step:
                raise Crash
            return function(*arguments, **options)  # type: ignore[operator]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for where, name in (
            (redact, "_without"),
            (purge, "_append"),
            (shutil, "rmtree"),
            (os, "link"),
            (files, "write_atomic"),
            (files, "publish_once"),
            (files, "link_in_place"),
            (Path, "rename"),
            (pq, "write_table"),
        ):
            patch.setattr(where, name, counted(getattr(where, name)))
        yield


@pytest.mark.parametrize("first", range(4))
def test_a_crash_between_any_two_steps_leaves_what_can_go_on(tmp_path: Path, first: int) -> None:
    """Each `first` has steps of its own; the run before and the run after are the only two ends."""
    web = Web(size=24, parts=1)
    web.build(run_in(tmp_path / "pristine", pairs_per_shard=12))
    needle = hashlib.sha256(b"7").digest()
    expected = None
    for step in range(1 + first, 199, 4):
        folder = tmp_path / f"run-{step}"
        subprocess.run(["cp", "-a", tmp_path / "pristine", folder], check=True)
        run = run_in(folder, pairs_per_shard=12)
        crashed = True
        for _ in _crashes(step):
            try:
                _ask(run, tmp_path, web.url(7))
                web.build(run)
                crashed = False
            except Crash:
                pass
        in_force = bool(removed.in_force(folder))
        uids = [path.read_text().split() for path in folder.glob("removed/[0-9]*/uids.txt")]
        assert in_force == (uids == [[web.uid(7).hex()]]), "the loader sees what is in force"
        if not in_force:
            assert crashed
            _ask(run, tmp_path, web.url(7))
        web.build(run_in(folder, pairs_per_shard=12))
        assert _holding(folder, needle, web.text(7).encode()) == []
        shards = _shards(folder)
        expected = expected or shards
        assert shards == expected
        if not crashed:
            break
    assert not crashed, "the last step was reached"


def test_rows_keep_their_place_and_their_digests() -> None:
    row = dict.fromkeys(records.FETCHED.names, "x") | {
        "url": "https://a.example/secret?x",
        "width": 3,
    }
    row |= {"sha256": b"1" * 32, "uid": b"2" * 16}
    left = removed.redacted(row, records.FETCHED.names)
    assert list(left) == records.FETCHED.names
    assert (left["url"], left["status"], left["width"]) == ("https://a.example/", "removed", 0)
    assert (left["sha256"], left["uid"], left["text"]) == (b"1" * 32, b"2" * 16, "")
    assert picture(1) != picture(2)

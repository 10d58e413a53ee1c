"""Requests: what is in force and since when, numbers, and what is found later."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataset_build import purge, records, removal, removed
from dataset_build.screen import ScreenSettings
from pipeline.stage import Run
from tests.dataset_build import published_build
from tests.dataset_build.inline import InlineExecutor
from tests.dataset_build.published_build import Web, picture, run_in
from train.data.removed import ANY, Removed

WEB = Web(size=60, parts=2, domains=10)


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


def _ask(run: Run, *entries: str) -> removal.Request:
    path = run.folder.parent / "list.txt"
    path.write_text("\n".join(entries) + "\n")
    return removal.ask(run, removal.read([path]))


def _packed(run: Run) -> set[bytes]:
    return set(pq.read_table(run.folder / "pack/out/index.parquet")["uid"].to_pylist())


def _loader(run: Run) -> Removed:
    return Removed([str(run.folder / "removed" / ANY / "uids.txt")], timeout_s=3, every_s=0)


def test_a_new_request_is_carried_out_whatever_became_of_earlier_ones(run: Run) -> None:
    _ask(run, WEB.url(7))
    WEB.build(run)
    shutil.rmtree(run.folder / "removed/000001")
    assert _ask(run, WEB.url(8)).number == 2
    assert not purge.is_settled(run.folder)
    WEB.build(run_in(run.folder))
    assert WEB.uid(8) not in _packed(run)
    (run.folder / "removed/000002").rename(run.folder / "removed/000001")
    again = _ask(run, WEB.url(9))
    shutil.rmtree(run.folder / "removed/000001")
    (run.folder / f"removed/{again.number:06d}").rename(run.folder / "removed/000002")
    assert not purge.is_settled(run.folder), "the number of one that is done"
    WEB.build(run_in(run.folder))
    assert WEB.uid(9) not in _packed(run)


def test_what_an_ended_process_was_writing_is_not_in_force_and_goes(run: Run) -> None:
    private = run.folder / "removed/.host-1-abc"
    private.mkdir(parents=True)
    (private / "uids.txt").write_text(f"{WEB.uid(7).hex()}\n{WEB.uid(8).hex()[:20]}")
    assert len(_loader(run)) == 0
    assert purge.is_settled(run.folder)
    _ask(run, WEB.url(9))
    assert private.exists(), "it may be another process that writes"
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(private, (long_ago, long_ago))
    _ask(run, WEB.url(10))
    assert not private.exists()


def test_the_list_beside_the_dataset_outlives_later_builds(run: Run) -> None:
    _ask(run, WEB.url(7))
    WEB.build(run)
    listed = run.folder / "pack/out/removed.txt"
    assert listed.read_text() == f"{WEB.uid(7).hex()}\n"
    other = run_in(run.folder, pairs_per_shard=7)
    InlineExecutor().advance(other, WEB.stages())
    assert listed.exists(), "a loader that looks now"
    listed.unlink()
    WEB.build(other)
    assert listed.read_text() == f"{WEB.uid(7).hex()}\n"


def test_what_is_asked_for_while_it_is_fetched_is_found_later(tmp_path: Path) -> None:
    """No download was published when the request came, so it named nothing."""
    run = run_in(tmp_path / "run")
    requests = purge.settle(run, WEB.stages())
    assert _ask(run, WEB.url(7), "d3.example").unknown == [WEB.url(7), "d3.example"]
    InlineExecutor().advance(run, WEB.stages())
    purge.finish(Run(run.folder, run.config), requests)
    assert not purge.is_settled(run.folder)
    assert WEB.uid(7) in _packed(run)
    gone = {7, *range(3, 60, 10)}
    for _ in range(2):  # the second time there is nothing to do
        WEB.build(run_in(run.folder))
        assert _packed(run) == {WEB.uid(n) for n in set(range(60)) - gone}
        uids = sorted(WEB.uid(n).hex() for n in gone)
        assert removed.uids(run.folder) == uids
        assert (run.folder / "pack/out/removed.txt").read_text().split() == uids
        assert len(_loader(run)) == len(uids)


def test_a_request_during_a_build_does_not_fail_it(run: Run) -> None:
    _ask(run, WEB.url(7))
    requests = purge.settle(run, WEB.stages())
    InlineExecutor().advance(run, WEB.stages())
    _ask(run, WEB.url(8))
    purge.finish(Run(run.folder, run.config), requests)
    log = run.folder / "removed/log.jsonl"
    assert [json.loads(line)["requests"] for line in log.read_text().splitlines()] == [["000001"]]
    assert not purge.is_settled(run.folder)
    WEB.build(run_in(run.folder))
    assert [json.loads(line)["requests"] for line in log.read_text().splitlines()][1] == ["000002"]
    assert _packed(run) == {WEB.uid(n) for n in range(60) if n not in (7, 8)}


def test_a_line_that_a_full_disk_cut_off_harms_no_other(run: Run) -> None:
    log = run.folder / "removed/log.jsonl"
    log.parent.mkdir()
    log.write_text('{"requests": ["000001"]}\n{"requ')
    _ask(run, WEB.url(7))
    WEB.build(run)
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == 2


def test_verdicts_on_what_is_exchanged_meanwhile_are_not_kept(tmp_path: Path) -> None:
    """A purge was broken off; before it goes on, a file of an evaluation set changes."""
    known = tmp_path / "known.jpg"
    known.write_bytes(picture(50))

    def run() -> Run:
        run = run_in(tmp_path / "run")
        screen = run.config.screen.model_copy(
            update={"near_distance": None, "evaluation": {"known": (str(known),)}}
        )
        return Run(run.folder, run.config.model_copy(update={"screen": screen}))

    WEB.build(run())
    _ask(run(), WEB.url(7))
    purge.settle(run(), WEB.stages())
    kept = (run().folder / "removed/verdicts.json").read_text()
    known.write_bytes(picture(20))
    executor = InlineExecutor()
    requests = purge.settle(run(), WEB.stages())
    executor.advance(run(), WEB.stages())
    purge.finish(run(), requests)
    assert kept
    assert {"evaluation", "decide"} <= {task.params.get("phase") for task in executor.ran}


@pytest.mark.parametrize(
    ("final", "is_found"),
    [
        ("http://cdn.example:80/a/b.jpg", "address, domain"),
        ("http://CDN.example/a/x/../b.jpg#top", "address, domain"),
        ("https://cdn.example./a/b.jpg", "address, domain"),
        (f"http://cdn.example./{'x' * 3000}", "domain"),
        ("http://cdn.example:8080/a/b.jpg", "domain"),
        ("http://cdn.other.example/a/b.jpg", ""),
        ("", ""),
    ],
)
def test_where_a_redirect_ended_is_known_in_any_spelling(
    tmp_path: Path, final: str, is_found: str
) -> None:
    row = {"uid": bytes(16), "url": "http://a.example/1", "final_url": final, "status": "ok"}
    row |= {"sha256": b"1" * 32, "staged_sha256": b"2" * 32}
    table = pa.Table.from_pylist(
        [row, row | {"final_url": row["url"]}, row | {"final_url": None}],
        pa.schema([records.FETCHED.field(name) for name in removed.COLUMNS]),
    )
    for kind, entry in (("address", "http://cdn.example/a/b.jpg"), ("domain", "cdn.example")):
        run = run_in(tmp_path / kind)
        _ask(run, entry)
        rows = removed.Tombstones(run.folder).rows(table)
        assert rows.tolist() == [kind in is_found, False, False]


def _telling(number: int) -> bytes:
    """A picture with much to see in it; that of 8 is that of 7 in another quality."""
    seen = 7 if number == 8 else number
    noise = np.random.default_rng(seen).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    shown = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
    shown.save(stream, "JPEG", quality=78 if number == 8 else 80)
    return stream.getvalue() + hashlib.sha256(str(number).encode()).digest()


def test_what_looks_like_it_stays_out_when_screen_decides_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_build, "picture", _telling)
    web = Web(size=24, parts=2)
    keeps, copy = sorted((7, 8), key=web.uid)

    def run(name: str, **settings: Any) -> Run:
        run = run_in(tmp_path / name)
        screen = ScreenSettings(drop_placeholders=False, **settings)
        return Run(run.folder, run.config.model_copy(update={"screen": screen}))

    everything = {web.uid(n) for n in range(24)}
    web.build(run("run"))
    assert _packed(run("run")) == everything - {web.uid(copy)}
    _ask(run("run"), web.url(keeps))
    assert len((run("run").folder / "removed/000001/perceptual.txt").read_text().split()) == 1
    executor = web.build(run("run", captions_per_picture=5))
    assert "decide" in {task.params.get("phase") for task in executor.ran}
    assert _packed(run("run")) == everything - {web.uid(keeps), web.uid(copy)}
    verdicts = pa.concat_tables(
        pq.read_table(path) for path in (run("run").folder / "screen/out").glob("screened-*")
    )
    (verdict,) = (row for row in verdicts.to_pylist() if row["uid"] == web.uid(copy))
    assert verdict["reason"] == "removed"

    other = run("other")  # which has neither of them yet
    removal.ask(other, removal.read(removal.carried(run("run").folder)))
    InlineExecutor().advance(other, web.stages())
    assert _packed(other) == everything - {web.uid(keeps), web.uid(copy)}


def test_a_picture_with_too_little_to_see_takes_no_other_with_it(run: Run) -> None:
    _ask(run, WEB.url(7))
    assert not (run.folder / "removed/000001/perceptual.txt").exists()

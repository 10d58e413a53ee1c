from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import tarfile
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import damage, files, formats, manifest
from pipeline.manifest import Damaged, Manifest
from pipeline.stats import Stats
from pipeline.tar import BrokenTar

FINGERPRINT = "f" * 64


def attempt(stage: Path, name: str = "a") -> Path:
    folder = stage / "store" / f"00000.{name}"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text('{"from": "x"}')
    pq.write_table(pa.table({"n": [1, 2, 3]}), folder / "t.parquet")
    return folder


def publish(stage: Path, folder: Path) -> Manifest:
    return manifest.publish(
        stage,
        folder,
        index=0,
        fingerprint=FINGERPRINT,
        stats=Stats(rows_in=3, rows_out=3),
        seconds=100.0,
        attempt=1,
    )


def test_published_outputs_have_stable_names_and_checksums(tmp_path: Path) -> None:
    done = publish(tmp_path / "s", attempt(tmp_path / "s"))
    assert [(o.name, o.rows) for o in done.outputs] == [("t.parquet", 3), ("x.json", None)]
    assert done.outputs[1].sha256 == files.sha256(tmp_path / "s/out/x.json")
    assert manifest.find(tmp_path / "s", FINGERPRINT) == done
    assert damage.damage(tmp_path / "s", done) == []


def test_the_seconds_hold_what_publishing_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.reread_sha256

    def slow(path: Path) -> str:
        time.sleep(0.05)
        return real(path)

    monkeypatch.setattr(files, "reread_sha256", slow)
    assert 100.1 <= publish(tmp_path / "s", attempt(tmp_path / "s")).seconds < 200


def test_the_second_attempt_loses_politely(tmp_path: Path) -> None:
    stage = tmp_path / "s"
    first = publish(stage, attempt(stage, "a"))
    second = publish(stage, attempt(stage, "b"))
    assert second == first
    assert [p.name for p in (stage / "store").iterdir()] == ["00000.a"]


def test_unbalanced_accounts_are_not_published(tmp_path: Path) -> None:
    folder = attempt(tmp_path / "s")
    with pytest.raises(AssertionError, match="1 of 3 rows are unaccounted for"):
        manifest.publish(
            tmp_path / "s",
            folder,
            index=0,
            fingerprint=FINGERPRINT,
            stats=Stats(rows_in=3, rows_out=2),
            seconds=0,
            attempt=1,
        )
    assert manifest.find(tmp_path / "s", FINGERPRINT) is None


@pytest.mark.parametrize("name", ["t.parquet", "x.json", "x.tar", "x.npy"])
def test_a_file_that_does_not_read_back_is_not_published(tmp_path: Path, name: str) -> None:
    folder = attempt(tmp_path / "s")
    (folder / name).write_bytes(b"PAR1 this is not what the suffix says {")
    with pytest.raises(Damaged, match=name):
        publish(tmp_path / "s", folder)
    assert not (tmp_path / "s" / "done").exists()


_CALLS = ("fsync", "link", "replace", "open")


@pytest.mark.parametrize("call", _CALLS)
def test_fail_the_nth_call_for_every_n(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails, whenever: nothing half is ever visible, and the next attempt succeeds."""
    real = getattr(os, call)
    for nth in range(200):
        stage = tmp_path / f"{call}-{nth}"
        folder = attempt(stage)
        calls = 0

        def faulty(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == nth + 1:  # noqa: B023
                raise OSError(errno.ENOSPC, "no space left, as asked for")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, faulty)
            try:
                publish(stage, folder)
                failed = False
            except OSError:
                failed = True
        done = manifest.find(stage, FINGERPRINT)
        if done is None:
            assert failed
            assert not (stage / "out").exists(), "outputs before their manifest"
            done = publish(stage, attempt(stage, "second"))
        manifest.expose(stage, done)
        assert damage.damage(stage, done) == []
        assert not list((stage / "done").glob(".*")), "a temporary file was left behind"
        if not failed:
            assert nth > 0 or call == "open"
            return
    raise AssertionError("publication never succeeded")


def _race(stage: Path, name: str, barrier: multiprocessing.synchronize.Barrier) -> None:
    folder = stage / "store" / f"00000.{name}"
    folder.mkdir(parents=True)
    (folder / "who.json").write_text(json.dumps(name))
    barrier.wait()
    publish(stage, folder)


def test_racing_attempts_have_one_winner(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for round_number in range(10):
        stage = tmp_path / str(round_number)
        barrier = context.Barrier(4)
        racers = [context.Process(target=_race, args=(stage, f"r{i}", barrier)) for i in range(4)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(30)
        assert [racer.exitcode for racer in racers] == [0, 0, 0, 0]
        done = manifest.find(stage, FINGERPRINT)
        assert done is not None and damage.damage(stage, done) == []
        assert len(list((stage / "store").iterdir())) == 1
        assert json.loads((stage / "out/who.json").read_text()) == done.store.partition(".")[2]


def tar_bytes() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a.txt", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(b"x" * 700))
    return stream.getvalue()


def test_every_truncation_of_a_tar_is_seen(tmp_path: Path) -> None:
    whole = tar_bytes()
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    assert formats.tar_members(path) == 2
    needed = 2 * (512 + 1024) + 1024
    for length in range(0, needed, 128):
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenTar):
            formats.tar_members(path)


counters = st.dictionaries(st.sampled_from("abc"), st.integers(1, 9)).map(Counter)
stats = st.builds(
    Stats,
    st.integers(0, 9),
    st.integers(0, 9),
    counters,
    counters,
    st.dictionaries(st.sampled_from("hk"), counters),
)


@given(stats, stats, stats)
def test_stats_add_like_numbers(a: Stats, b: Stats, c: Stats) -> None:
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + Stats() == a

"""`python -m pipeline train` and its like, as their users meet them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import files
from pipeline.config import Settings
from pipeline.stage import Run
from tests.train.conftest import TINY_MODEL, Pack
from tests.train.published import publish_pack

ROOT = Path(__file__).parents[2]
TINY = [
    *(f"train.model.{key}={value}" for key, value in TINY_MODEL.items()),
    "train.preset=cpu",
    "train.batch=8",
    "train.data.lanes=4",
    "train.data.workers=0",
    "train.threads=1",
    "train.log_every_steps=2",
]


def begin(command: str, *arguments: object, **environ: object) -> subprocess.Popen[str]:
    """A command under way."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", command, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in environ.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and messages of a command."""
    out, said = process.communicate(timeout=120)
    assert "Traceback" not in said, said
    return process.returncode, out, said


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.05)


def contents(folder: Path, leave_out: str) -> dict[str, str]:
    """Checksum of every file but those that a training under way writes itself."""
    return {
        str(path.relative_to(folder)): files.sha256(path)
        for path in files.walk(folder)
        if not re.search(leave_out, str(path.relative_to(folder)))
    }


@pytest.fixture
def data(pack: Pack, tmp_path: Path) -> Path:
    """A configuration that trains a tiny model on a packed folder."""
    packed = pack(24)
    described = '{"fingerprint": "f", "pairs_by_shard": [{"name": "00000.tar", "bytes": %d}]}'
    size = (packed / "shards/00000.tar").stat().st_size
    (packed / "dataset.json").write_text(described % size)
    path = tmp_path / "tiny.yaml"
    path.write_text(f"train: {{data: {{datasets: {{one: {{path: {packed}}}}}}}}}\n")
    return path


def test_who_comes_second_is_refused_before_anything_is_changed(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = begin("train", data, "--run", run, *TINY, "train.samples=800000")
    try:
        wait_for(run / "train/metrics.jsonl")
        written = (
            r"^train/(checkpoints|heartbeats|live|logs|lock|metrics|training\.html|training\.json)"
        )
        before = contents(run, written)
        assert before.keys() >= {"config.yaml", "stages.json", "train/plan.json"}
        for command in ("train", "evaluate"):
            began = time.monotonic()
            second = begin(command, data, "--run", run, *TINY, "train.samples=80")
            code, _, said = end(second)
            assert time.monotonic() - began < 20
            assert code == 9, said
            assert re.search(rf"process {first.pid} on \S+ \(since 20\d\d-.*\) is training", said)
            assert len(said.splitlines()) == 1
        log = (run / "train/logs/00000.log").read_text()
        assert contents(run, written) == before
        assert log.count("attempt 1") == 1 and "attempt 2" not in log
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)  # it holds the lock, and does not let go of it
        first.communicate()
    assert (run / "train/lock.json").exists()
    code, _, said = end(begin("train", data, "--run", run, *TINY, "train.samples=80"))
    assert code == 0, said
    assert not (run / "train/lock.json").exists()


@pytest.fixture
def to_build(tmp_path: Path) -> Path:
    """A configuration with something to build from."""
    (tmp_path / "queries.txt").write_text("red\n")
    (tmp_path / "pool.parquet").touch()
    text = "queries: {file: [%s]}\nextract: {parquet: [%s]}\n"
    path = tmp_path / "build.yaml"
    path.write_text(text % (tmp_path / "queries.txt", tmp_path / "pool.parquet"))
    return path


def test_what_is_not_built_is_not_trained_on_and_leaves_nothing(
    to_build: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, _, said = end(begin("train", to_build, "--run", run, "balance.cap=50"))
    assert code == 3
    assert f"{run}: not built yet: run `make build-dataset CONFIG={to_build} RUN={run}" in said
    assert 'SET="balance.cap=50"`' in said
    assert not run.exists()


def test_a_dataset_of_other_settings_is_not_trained_on_and_stays_as_it_is(
    to_build: Path, pack: Pack, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", Settings())
    publish_pack(run, pack(8))
    (run.folder / "pack/complete.json").write_text(json.dumps(["f" * 64]))
    before = contents(run.folder, "^$")
    code, _, said = end(begin("train", to_build, "--run", run.folder))
    assert code == 3
    assert "queries is not up to date with" in said
    assert "run `make build-dataset CONFIG=" in said
    assert contents(run.folder, "^$") == before

"""`python -m pipeline train` and its like, as their users meet them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import files
from pipeline.config import Settings, load
from pipeline.lock import RunLock
from pipeline.manifest import digest
from pipeline.recipe import Config
from pipeline.stage import Run
from tests.train.conftest import TINY_MODEL, Pack, write_paints
from tests.train.published import publish_pack
from train.settings import TrainSettings

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


def begin(command: str, *arguments: object) -> subprocess.Popen[str]:
    """A command under way, in an environment without OPENWIT_TARS."""
    environ = {key: value for key, value in os.environ.items() if key != "OPENWIT_TARS"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", command, *map(str, arguments)],
        cwd=ROOT,
        env=environ | {"OMP_NUM_THREADS": "1"},
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
    size = (packed / "shards/00000.tar").stat().st_size
    described = {"pairs_by_shard": [{"name": "00000.tar", "bytes": size}]}
    described["fingerprint"] = digest(described)
    (packed / "dataset.json").write_text(json.dumps(described))
    path = tmp_path / "tiny.yaml"
    path.write_text(f"train: {{data: {{datasets: {{one: {{path: {packed}}}}}}}}}\n")
    return path


@pytest.fixture
def to_build(tmp_path: Path) -> Path:
    """A configuration with something to build from."""
    (tmp_path / "queries.txt").write_text("red\n")
    (tmp_path / "pool.parquet").touch()
    text = (
        "queries: {file: [%s]}\nextract: {pool: [%s]}\n"
        "download: {contact: https://lab.example/openwit}\n"
    )
    path = tmp_path / "build.yaml"
    path.write_text(text % (tmp_path / "queries.txt", tmp_path / "pool.parquet"))
    return path


def test_who_comes_second_is_refused_before_anything_is_changed(
    data: Path, to_build: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = begin("train", data, "--run", run, *TINY, "train.samples=800000")
    try:
        wait_for(run / "train/metrics.jsonl")
        written = (
            r"^train/(checkpoints|heartbeats|live|logs|lock|metrics|training\.html|training\.json)"
        )
        before = contents(run, written)
        assert before.keys() >= {"config.yaml", "stages.json", "train/plan.json"}
        code, _, said = end(begin("evaluate", data, "--run", run, *TINY, "train.samples=80"))
        assert code == 9, said
        assert re.search(rf"process {first.pid} on \S+ \(since 20\d\d-.*\) is training", said)
        assert len(said.splitlines()) == 1
        assert end(begin("build", to_build, "--run", run))[0] == 9
        log = (run / "train/logs/00000.log").read_text()
        assert contents(run, written) == before
        assert log.count("attempt 1") == 1 and "attempt 2" not in log
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)  # it holds the lock, and does not let go of it
        first.communicate()
    assert (run / "train/lock.json").exists()
    nowhere = f"train.data.datasets.one.path={tmp_path}/nowhere"  # found out behind the lock
    code, _, said = end(begin("train", data, "--run", run, *TINY, nowhere))
    assert (code, "no such file" in said) == (3, True), said
    assert not (run / "train/lock.json").exists()


def test_who_comes_while_a_job_of_a_cluster_trains_is_refused_at_once(
    data: Path, to_build: Path, tmp_path: Path
) -> None:
    """Such a job holds the checkpoints alone: there is no command that waits for it."""
    run = tmp_path / "run"
    lock = RunLock(run / "train/checkpoints/lock.json", beat_s=0.2)
    try:
        code, _, said = end(begin("train", data, "--run", run, *TINY))
        assert code == 9 and f"process {os.getpid()} on" in said and len(said.splitlines()) == 1
        assert end(begin("build", to_build, "--run", run))[0] == 9
    finally:
        lock.release()
    assert [path.name for path in files.walk(run)] == []


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


@pytest.mark.parametrize("tars", [[], ["train.data.datasets.pairs.path=/data"]])
def test_a_configuration_for_training_alone_is_not_built(tars: list[str], tmp_path: Path) -> None:
    config, run = "configs/webdataset.yaml", tmp_path / "run"
    code, _, said = end(begin("build", config, "--run", run, *tars))
    assert code == 2
    assert f"for training alone: `make train CONFIG={config} RUN={run}`" in said
    assert not run.exists()


def test_without_its_environment_a_configuration_is_explained_and_not_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, said = end(begin("config", "configs/webdataset.yaml"))
    assert code == 0
    assert "path: '${OPENWIT_TARS}'" in out
    assert "configs/webdataset.yaml:17: train.data.datasets.pairs.path: the environment" in said
    code, _, said = end(begin("train", "configs/webdataset.yaml", "--run", run))
    assert code == 2
    assert "the environment variable OPENWIT_TARS is not set" in said
    assert not run.exists()


@pytest.mark.parametrize("preset", ["single-gpu", "cpu", "RN50"])
def test_a_preset_in_the_packaged_configuration_is_the_whole_recipe(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENWIT_TARS", "/data")
    path = ROOT / "configs/webdataset.yaml"
    loaded = load(Config, path, [f"train.preset={preset}"]).train
    bare = TrainSettings.model_validate({"preset": preset})
    data = bare.data.model_copy(update={"datasets": loaded.data.datasets})
    assert loaded == bare.model_copy(update={"data": data})


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_goes_on_with_a_runs_own_configuration(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def said(*variables: str) -> str:
        command = [
            "make",
            "--no-print-directory",
            "--dry-run",
            "evaluate",
            f"RUN={run}",
            *variables,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]

    assert f"evaluate configs/sample.yaml --run {run} " in said()
    run.mkdir()
    (run / "config.yaml").touch()
    assert f"evaluate {run}/config.yaml --run {run} " in said()
    assert f"evaluate configs/cifar10.yaml --run {run} " in said("CONFIG=configs/cifar10.yaml")


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path, to_build: Path) -> None:
    run = tmp_path / "run"
    nowhere = f"train.data.datasets.pairs.path={tmp_path}/nowhere"
    code, _, said = end(begin("train", "configs/webdataset.yaml", "--run", run, nowhere))
    assert (code, f"{tmp_path}/nowhere: no such file or folder" in said) == (3, True), said
    (tmp_path / "queries.txt").unlink()
    code, _, said = end(begin("build", to_build, "--run", run, "queries.wikipedia=[/not/here]"))
    assert (code, "/not/here: no such input" in said) == (3, True), said
    code, _, said = end(begin("report", to_build, "--run", run))
    assert (code, "no run here" in said) == (3, True), said
    assert not run.exists()


@pytest.mark.parametrize("folder", ["file", "file/run", "locked/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_named(
    folder: str, to_build: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    if folder.startswith("locked") and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("root may write everywhere")
    run = tmp_path / folder
    code, _, said = end(begin("build", to_build, "--run", run))
    assert code == 2
    assert f"{run}: no run can be kept here" in said


def test_evaluation_ends_with_the_accuracy_of_every_dataset(data: Path, tmp_path: Path) -> None:
    paints = write_paints(tmp_path / "paints.parquet")
    arguments = ("--run", tmp_path / "run", *TINY, "train.samples=80")
    datasets = f"evaluate.datasets={{paints: {paints}}}"
    for _ in range(2):  # also when there is nothing to run
        code, _, said = end(begin("evaluate", data, *arguments, datasets))
        assert code == 0, said
        result = json.loads((tmp_path / "run/evaluate/out/evaluation.json").read_text())["paints"]
        top1 = f"{100 * result['top1']:.1f}"
        line = f"paints: top-1 {top1} %, top-5 100.0 % of 12 pictures, guessing 33.3 %"
        assert said.count(line) == 1

"""The command on a run: whatever befalls a published file is said, and mended by the next build."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline import files
from pipeline.__main__ import main
from pipeline.stage import Run
from tests import mutations
from tests.dataset_build.published_build import Web, run_in

WEB = Web(size=120)
DATASET = ("pack/out/shards/*", "pack/out/index.parquet", "pack/out/dataset.json")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = run_in(tmp_path_factory.mktemp("built") / "run")
    WEB.build(run)
    return run.folder


@pytest.fixture
def run(built: Path, tmp_path: Path) -> Run:
    subprocess.run(["cp", "-a", built, tmp_path / "run"], check=True)
    return run_in(tmp_path / "run")


def digests(folder: Path) -> dict[str, str]:
    paths = (path for pattern in DATASET for path in folder.glob(pattern))
    return {path.relative_to(folder).as_posix(): files.sha256(path) for path in paths}


def faults(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the command says of a run's files, below the run; its exit code goes by it."""
    capsys.readouterr()
    code = main(["verify", str(folder), "--no-decode"])
    said = [line.removeprefix(f"{folder}/") for line in capsys.readouterr().out.splitlines()]
    assert (code, len(said)) == (0, 1) or (code, said[-2]) == (5, f"{len(said) - 2} faults")
    return said[:-2]


def test_whatever_befalls_a_published_file_is_said_and_mended(
    run: Run, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, draw = digests(built), random.Random(3)
    assert faults(run.folder, capsys) == []
    stores = [path.relative_to(run.folder) for path in mutations.published(run.folder)]
    names = sorted({Path(path.parts[0], "out", *path.parts[3:]) for path in stores})
    assert len(names) > 20 and len({name.parts[0] for name in names}) == 5
    for number, name in enumerate(names):
        kind = mutations.KINDS_OF_RUNS[number % len(mutations.KINDS_OF_RUNS)]
        shown = run.folder / name
        (path,) = (p for p in mutations.published(run.folder) if p.samefile(shown))
        mutations.befall(path, kind, draw)
        said = faults(run.folder, capsys)
        assert any(fault.startswith(f"{name}: ") for fault in said), (kind, said)
        WEB.build(run_in(run.folder))
        assert digests(run.folder) == expected, (kind, name)
        assert faults(run.folder, capsys) == [], (kind, name)


@pytest.mark.parametrize("keep", [0, 100])
def test_a_lost_or_torn_record_of_a_complete_stage_is_a_fault(
    run: Run, built: Path, keep: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run.folder / "pack/done").iterdir():
        path.write_bytes(path.read_bytes()[:keep]) if keep else path.unlink()
    count = len(json.loads((run.folder / "pack/complete.json").read_text()))
    said = faults(run.folder, capsys)
    assert len(said) == count > 3
    assert all(f.startswith("pack/done/") for f in said)
    (run.folder / "screen/complete.json").write_text("[")
    (run.folder / "screen/plan.json").write_text("[")
    said = faults(run.folder, capsys)
    assert len(said) == count + 2 and said[-1] == "screen/plan.json: cannot be read"
    WEB.build(run_in(run.folder))
    assert digests(run.folder) == digests(built)
    assert faults(run.folder, capsys) == []


def test_what_is_not_built_yet_is_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.dataset_build.inline import InlineExecutor

    run = run_in(tmp_path / "run")
    assert faults(run.folder, capsys) == []
    for stages, tasks in ((3, 1), (4, 2), (5, 2)):
        with pytest.raises(KeyboardInterrupt):
            InlineExecutor().advance(run, WEB.stages()[:stages], stop_after=tasks)
        assert faults(run.folder, capsys) == []
    WEB.build(run)
    again = run_in(run.folder, pairs_per_shard=30)  # some of both are shown meanwhile
    with pytest.raises(KeyboardInterrupt):
        InlineExecutor().advance(again, WEB.stages(), stop_after=2)
    assert faults(run.folder, capsys) == []
    (earlier,) = run.folder.glob("pack/store/00002.*/shards/00002.tar")
    earlier.write_bytes(bytes(512))
    assert len(faults(run.folder, capsys)) == 1
    WEB.build(again)
    assert faults(run.folder, capsys) == []


def test_of_a_copy_without_second_names_both_files_are_read(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "run"))
    assert faults(folder, capsys) == []
    (stored,) = folder.glob("screen/store/*/screened-00000-*.parquet")
    flipped(stored)
    flipped(folder / "screen/out" / stored.name)
    flipped(folder / "pack/out/index.parquet")
    (folder / "pack/out/shards/00000.tar").unlink()
    said = faults(folder, capsys)
    before = len(list(folder.glob("*/done/*.json")))
    assert [line for line in said if "packed" not in line and "cannot be read" not in line] == [
        "pack/out/shards/00000.tar: missing",
        "pack/out/index.parquet: its bytes differ from those published",
        f"{stored.relative_to(folder)}: its bytes differ from those published",
        f"screen/out/{stored.name}: its bytes differ from those published",
    ]
    assert before == len(list(built.glob("*/done/*.json"))) - 1  # of what builds read, one is lost
    WEB.build(run_in(folder))
    assert digests(folder) == digests(built)
    assert faults(folder, capsys) == []


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_neither_a_run_nor_a_dataset(tmp_path: Path) -> None:
    assert main(["verify", str(tmp_path)]) == 3

"""The command `purge`: what it says, what it refuses, when it waits for a training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dataset_build import purge, removed
from pipeline import recipe, runner
from pipeline.__main__ import main
from pipeline.commands import advance
from pipeline.executor import Outcome
from pipeline.lock import RunLock
from pipeline.stage import Planned, Run, Stage, Task
from pipeline.stop import EXIT_STOPPED
from tests.dataset_build.inline import InlineExecutor
from tests.dataset_build.published_build import Web


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has begun."""
    config = recipe.Config()
    folder = tmp_path / "run"
    folder.mkdir()
    runner.describe(Run(folder, config), recipe.build_stages(config))
    (tmp_path / "list.txt").write_text("example.org\n")
    return folder


def test_a_list_that_names_nothing_is_no_request(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "list.txt").write_text("# nothing yet\n\n")
    assert main(["purge", str(run), str(run.parent / "list.txt")]) == 2
    assert "list.txt: nothing is named there to be removed" in capsys.readouterr().err
    assert not (run / "removed").exists()


def test_later_puts_it_in_force_and_changes_no_file(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["purge", str(run), str(run.parent / "list.txt"), "--later"]) == 0
    assert "1 entries name nothing that is here" in capsys.readouterr().err
    assert (run / "removed/000001/domains.txt").read_text() == "example.org\n"
    assert not (run / "removed/done.json").exists()


def test_bad_lists_end_with_the_code_of_their_kind(run: Path) -> None:
    (run.parent / "list.txt").write_text("com\n")
    assert main(["purge", str(run), str(run.parent / "list.txt")]) == 2
    assert main(["purge", str(run), str(run.parent / "none.txt")]) == 3
    assert main(["purge", str(run), "--from", str(run.parent)]) == 3
    assert not removed.in_force(run)


def test_a_training_goes_on_without_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = RunLock(run / "train" / "lock.json", beat_s=0.1, job="training")
    try:
        assert main(["purge", str(run), str(run.parent / "list.txt")]) == EXIT_STOPPED
    finally:
        lock.release()
    assert removed.in_force(run)
    said = capsys.readouterr().err
    assert "is training in this run" in said
    assert "leaves out what was removed" in said


WEB = Web(size=12, parts=1)
SETTINGS = {
    "extract": {"wat": ["archive.wat"]},
    "download": {"contact": "https://lab.example/crawl"},
    "screen": {"pairs_per_picture": 2, "drop_placeholders": False},
}


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built run, whose queries are from a file beside it."""
    source = tmp_path / "queries.txt"
    source.write_text("x")
    queries, *rest = WEB.stages()
    queries = replace(queries, plan=lambda run: [Task("queries", 0, (str(source),))])
    monkeypatch.setattr(recipe, "build_stages", lambda config: [queries, *rest])
    monkeypatch.setattr(recipe, "all_stages", lambda config: [queries, *rest])
    monkeypatch.setattr(advance, "write_report", lambda run, stages: run.folder / "report")
    _do_with(monkeypatch, InlineExecutor())
    run = Run(tmp_path / "run", recipe.Config.model_validate(SETTINGS))
    run.folder.mkdir()
    InlineExecutor().advance(run, [queries, *rest])
    return run.folder


def _do_with(monkeypatch: pytest.MonkeyPatch, executor: InlineExecutor) -> None:
    @contextmanager
    def inline(*about: Any) -> Iterator[InlineExecutor]:
        executor._last, executor._left = "", None
        yield executor

    monkeypatch.setattr(advance, "_executor", inline)


def _ask(run: Path, number: int) -> str:
    path = run.parent / f"list-{number}.txt"
    path.write_text(WEB.url(number))
    return str(path)


def _packed(run: Path) -> set[bytes]:
    return set(pq.read_table(run / "pack/out/index.parquet")["uid"].to_pylist())


def test_it_needs_no_inputs_that_have_no_pictures(built: Path) -> None:
    (built.parent / "queries.txt").unlink()
    assert main(["purge", str(built), _ask(built, 7)]) == 0
    assert _packed(built) == {WEB.uid(n) for n in range(12) if n != 7}
    assert purge.is_settled(built)


def test_an_input_that_is_missing_is_named_with_what_is_still_there(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (built.parent / "queries.txt").unlink()
    (built / "queries/complete.json").unlink()  # so it is not known to be whole
    assert main(["purge", str(built), _ask(built, 7)]) == 3
    said = capsys.readouterr().err
    assert "queries.txt" in said
    assert "1 samples that were removed are in shards still" in said
    (built.parent / "queries.txt").write_text("x")
    assert main(["purge", str(built)]) == 0
    assert WEB.uid(7) not in _packed(built)


class _AsksMeanwhile(InlineExecutor):
    """The first time that it packs, somebody asks for something more to be removed."""

    run: Path

    def submit(self, run: Run, stage: Stage, tasks: Sequence[Planned]) -> Iterator[Outcome | None]:
        if stage.name == "pack" and len(removed.folders(self.run)) == 1:
            assert main(["purge", str(self.run), _ask(self.run, 8), "--later"]) == 0
        yield from super().submit(run, stage, tasks)


def test_what_is_asked_for_during_a_build_is_done_before_it_ends(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = _AsksMeanwhile()
    executor.run = built
    _do_with(monkeypatch, executor)
    assert main(["purge", str(built), _ask(built, 7)]) == 0
    assert len(removed.folders(built)) == 2
    assert purge.is_settled(built)
    assert _packed(built) == {WEB.uid(n) for n in range(12) if n not in (7, 8)}

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import manifest, status
from pipeline.config import Settings
from pipeline.executor import Outcome
from pipeline.manifest import find
from pipeline.runner import Advance, TasksFailed, describe, outdated, work_on
from pipeline.stage import Attempt, Run, Stage
from pipeline.stats import Stats
from pipeline.stop import StopFlag
from tests.pipeline import toy
from tests.pipeline.toy import Recorder

Call = Callable[..., tuple[Run, Advance]]


def test_nothing_changed_runs_nothing(advance: Call) -> None:
    _, first = advance()
    assert not first.idle
    watch = Recorder()
    _, second = advance(watch=watch)
    assert second.idle
    assert watch.ended == [("numbers", 0), ("total", 0)]


def test_a_changed_setting_runs_its_stage_and_what_depends_on_it(advance: Call) -> None:
    advance()
    run, done = advance(total={"factor": 10})
    assert done.ran == {"numbers": 0, "total": 4}
    assert json.loads((run.folder / "total/out/sum.json").read_text()) == 60
    _, done = advance({"first": 2}, {"factor": 10})
    assert done.ran == {"numbers": 3, "total": 4}


def test_only_the_tasks_whose_inputs_changed_run(advance: Call) -> None:
    advance()
    run, done = advance({"count": 4})
    assert done.ran["total"] == 2, "the new number's copy, and the sum"
    assert json.loads((run.folder / "total/out/sum.json").read_text()) == 10


def test_stale_outputs_are_gone_once_the_stage_is_done(advance: Call) -> None:
    advance({"count": 4})
    run, _ = advance({"count": 2})
    folder = run.folder / "numbers"
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["n-00000.json", "n-00001.json"]
    assert len(list((folder / "done").iterdir())) == len(list((folder / "store").iterdir())) == 2


def test_a_lost_output_is_made_again(advance: Call) -> None:
    run, _ = advance()
    lost = run.manifests("numbers")[1]
    (run.folder / "numbers/store" / lost.store / "n-00001.json").unlink()
    run, done = advance()
    assert done.ran["numbers"] == 1
    assert find(run.folder / "numbers", lost.fingerprint) is not None


def test_a_torn_manifest_counts_as_not_done(advance: Call) -> None:
    run, _ = advance()
    path = next((run.folder / "numbers/done").glob("*.json"))
    path.write_text(path.read_text()[:40])
    _, done = advance()
    assert done.ran["numbers"] == 1


def test_the_stage_version_is_part_of_the_fingerprint(advance: Call) -> None:
    run, _ = advance()
    assert outdated(run, toy.STAGES) is None
    newer = replace(toy.TOTAL, version=2)
    assert outdated(run, (toy.NUMBERS, newer)) is newer


def test_status_names_a_failure_until_its_task_succeeds(advance: Call, tmp_path: Path) -> None:
    with pytest.raises(TasksFailed):
        advance({"count": 1, "fault": "raise", "times": 2}, attempts=1)
    failed = status.failures(status.read(tmp_path / "run"))
    assert len(failed) == 1 and "the fault that was asked for" in failed[0]
    with pytest.raises(TasksFailed):  # another configuration: the first one's failure is no news
        advance({"count": 1, "fault": "missing", "times": 9}, attempts=1)
    (failure,) = status.failures(status.read(tmp_path / "run"))
    assert "somewhere: not there" in failure
    advance({"count": 1})
    assert status.failures(status.read(tmp_path / "run")) == []
    assert not list((tmp_path / "run" / "numbers" / "failed").iterdir())


def test_a_share_of_failed_tasks_is_left_out_where_the_stage_can_do_without(
    advance: Call,
) -> None:
    numbers = {"count": 4, "fault": "raise", "times": 2, "only": 1}
    with pytest.raises(TasksFailed, match="1 task"):
        advance(numbers, attempts=1, max_failed_tasks=0.2)
    run, _ = advance(numbers, attempts=1, max_failed_tasks=0.25)
    assert json.loads((run.folder / "total/out/sum.json").read_text()) == 1 + 3 + 4
    assert list(run.left_out("numbers").values()) == ["ValueError: the fault that was asked for"]
    stage = next(stage for stage in status.read(run.folder) if stage.name == "numbers")
    assert (stage.word, stage.done, stage.left_out) == ("done", 3, 1)
    _, again = advance(numbers, attempts=1, max_failed_tasks=0.25)
    assert again.idle, "what was left out stays out"
    assert outdated(run, toy.STAGES, 0.25) is None
    assert outdated(run, toy.STAGES) is toy.NUMBERS, "a smaller share tries it again"


def test_status_reads_the_folder_alone(advance: Call) -> None:
    run, _ = advance()
    stages = {stage.name: stage for stage in status.read(run.folder)}
    assert stages["numbers"].word == "done"
    assert (stages["numbers"].stats.rows_in, stages["numbers"].stats.rows_out) == (6, 3)
    assert (stages["total"].done, stages["total"].total) == (4, 4)


def test_a_stage_is_not_done_before_its_last_phase_is_planned(advance: Call) -> None:
    class Looking(Recorder):
        def tick(self, stage: Stage, outcome: Outcome | None) -> None:
            now = status.read_stage(Run(folder, Settings()), stage.name, stage.unit)
            if stage.name == "total" and now.done == now.total == 3:
                seen.add((now.word, now.now()))

    folder = advance()[0].folder
    seen: set[tuple[str, str]] = set()
    advance(total={"factor": 2}, watch=Looking())
    assert seen == {("partly done", "more to come")}
    assert status.read(folder)[-1].word == "done"


def test_running_a_part_keeps_the_order_of_the_whole(advance: Call) -> None:
    run, _ = advance()
    describe(run, (toy.TOTAL,))
    assert [stage.name for stage in status.read(run.folder)] == ["numbers", "total"]


def test_what_is_published_stays_though_something_fails_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is there; its outputs' names below `out/` are not all made yet."""
    run = Run(tmp_path / "run", toy.Toy())
    (planned, *_) = toy.NUMBERS.planned(run, 0, 0)
    run.folder.mkdir()

    def fails(*arguments: object) -> None:
        raise OSError("no space left, as asked for")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="as asked for"):
        patch.setattr(manifest, "expose", fails)
        work_on(run, toy.NUMBERS, planned, 1, StopFlag())
    done = find(run.folder / "numbers", planned.fingerprint)
    assert done is not None, "its outputs were removed"
    assert work_on(run, toy.NUMBERS, planned, 2, StopFlag()) == done


def test_what_an_attempt_leaves_behind_is_there_for_the_next_until_one_is_published(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path / "run", toy.Toy())
    run.folder.mkdir()
    found: list[list[str]] = []

    def work(attempt: Attempt) -> Stats:
        assert attempt.partial is not None
        attempt.partial.mkdir(parents=True, exist_ok=True)
        found.append(sorted(path.name for path in attempt.partial.iterdir()))
        (attempt.partial / str(len(found))).touch()
        if len(found) < 3:
            raise ValueError("not yet")
        return Stats()

    stage = replace(toy.NUMBERS, work=work)
    (planned, *_) = stage.planned(run, 0, 0)
    for _ in range(2):
        with pytest.raises(ValueError, match="not yet"):
            work_on(run, stage, planned, 1, StopFlag())
    work_on(run, stage, planned, 1, StopFlag())
    assert found == [[], ["1"], ["1", "2"]]
    assert not list((run.folder / "numbers" / "partial").iterdir())

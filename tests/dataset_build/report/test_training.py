"""Curves and results of the trainer, as its log may really look."""

from __future__ import annotations

import json

import pytest

from dataset_build import report
from dataset_build.report.published import Absent, Build
from dataset_build.report.training import curves, evaluation
from tests.dataset_build.report.fake_build import STAGES, FakeBuild


def _log(fake_build: FakeBuild, *lines: str) -> Build:
    folder = fake_build.run.stage_folder("train")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return Build(fake_build.run, STAGES)


def test_after_a_resume_the_later_line_counts(fake_build: FakeBuild) -> None:
    rows = [(1, 4.0), (2, 3.0), (3, 2.5), (2, 3.5), (3, 3.25), (4, 2.0)]
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in rows]
    made = curves(_log(fake_build, *lines))
    assert made["curves"]["loss"] == [[1, 4.0], [2, 3.5], [3, 3.25], [4, 2.0]]
    assert made["steps"] == 4


def test_a_cut_line_and_strangers_are_passed_over(fake_build: FakeBuild) -> None:
    build = _log(fake_build, "[1]", '{"event": "start"}', '{"step": 1, "loss": 2}', '{"step": 2, ')
    assert curves(build)["last"] == {"step": 1, "loss": 2}


def test_the_page_of_the_training_is_linked_where_there_is_one(fake_build: FakeBuild) -> None:
    fake_build.through("train")
    link = 'href="../train/training.html"'
    assert link not in report.write(fake_build.run, STAGES).read_text()
    (fake_build.run.stage_folder("train") / "training.html").write_text("")
    assert link in report.write(fake_build.run, STAGES).read_text()


def test_accuracy_is_that_of_pictures_among_texts(fake_build: FakeBuild) -> None:
    row = {"step": 1, "accuracy_image_to_text": 0.25, "accuracy_text_to_image": 0.75}
    assert curves(_log(fake_build, json.dumps(row)))["curves"]["accuracy"] == [[1, 0.25]]


def test_a_log_without_a_step_is_absent(fake_build: FakeBuild) -> None:
    with pytest.raises(Absent, match="no step"):
        curves(_log(fake_build, ""))


def test_accuracy_of_an_earlier_model_is_not_shown(fake_build: FakeBuild) -> None:
    fake_build.make_train()
    fake_build.make_evaluate()
    assert evaluation(Build(fake_build.run, STAGES))
    for manifest in (fake_build.run.stage_folder("train") / "done").iterdir():
        manifest.unlink()
    with pytest.raises(Absent, match="of an earlier model"):
        evaluation(Build(fake_build.run, STAGES))


def test_chance_is_derived_from_the_classes(fake_build: FakeBuild) -> None:
    fake_build.make_train()
    fake_build.make_evaluate()
    results = evaluation(Build(fake_build.run, STAGES))
    assert results["sample_web"]["chance"] == 1 / 48
    assert list(results) == ["sample_web", "sample_web_unseen"]

"""The ending of a build in a terminal."""

from __future__ import annotations

from dataset_build import report
from tests.dataset_build.report.fake_build import NAMES, STAGES, FakeBuild


def test_a_line_a_stage_then_accuracy_then_what_to_open(fake_build: FakeBuild) -> None:
    fake_build.through("evaluate")
    page = report.write(fake_build.run, STAGES)
    lines = report.summary_lines(fake_build.run, STAGES)
    assert [line.split()[0] for line in lines[1 : 1 + len(NAMES)]] == list(NAMES)
    extract = lines[2]
    assert "1,718,012" in extract
    assert "1,598,012" in extract
    assert "no_alt 1,400,002 · too_short 180,004" in extract
    assert any(line.split()[:4] == ["sample_web", "71.2%", "95.1%", "2.1%"] for line in lines)
    assert any(line.endswith(str(page)) for line in lines)


def test_the_page_of_the_training_is_named_where_there_is_one(fake_build: FakeBuild) -> None:
    fake_build.publish("train")
    page = fake_build.run.stage_folder("train") / "training.html"
    assert not any(str(page) in line for line in report.summary_lines(fake_build.run, STAGES))
    page.write_text("")
    assert f"training {page}" in report.summary_lines(fake_build.run, STAGES)


def test_nothing_built_yet(fake_build: FakeBuild) -> None:
    lines = report.summary_lines(fake_build.run, STAGES)
    assert all("not started" in line for line in lines[1 : 1 + len(NAMES)])
    assert "accuracy: not evaluated yet (evaluate: not started)" in lines


def test_more_reasons_than_there_is_room_for(fake_build: FakeBuild) -> None:
    fake_build.through("download")
    line = next(
        line for line in report.summary_lines(fake_build.run, STAGES) if line.startswith("download")
    )
    reasons = fake_build.run.manifests("download")[0].stats.dropped
    assert len(reasons) > 2
    assert line.count("·") == (3 if len(reasons) > 3 else len(reasons) - 1)

"""The page of a training: every curve and incident, self-contained, and never in the way."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selectolax.lexbor import LexborHTMLParser

from pipeline.stage import Attempt
from pipeline.stop import Stopped
from tests.browser import show, visited
from tests.train.conftest import Pack, Stopping
from train import loop, page
from train.metrics import read

__all__ = ["visited"]  # a fixture

HEADINGS = ["Learning", "Optimisation", "Speed", "Incidents", "Figures", "Settings"]


def _row(step: int, **more: Any) -> dict[str, Any]:
    loss = 1 + 4 * math.exp(-step / 300)
    return {
        "step": step,
        "samples": 64 * step,
        "epoch": step / 100,
        "time": 1_795_500_000 + step,
        "loss": loss,
        "loss_image_to_text": loss + 0.1,
        "loss_text_to_image": loss - 0.1,
        "accuracy_image_to_text": 0.25,
        "accuracy_text_to_image": 0.375,
        "lr": 5e-4,
        "temperature": 0.05,
        "grad_norm": 1.5,
        "samples_per_s": 1234.5,
        "samples_per_s_per_process": 617.25,
        "data_wait": 0.01,
        "mfu": 0.41,
        "memory_bytes": 51_200_000_000,
        "skipped": 0,
        "substituted": 3,
        **more,
    }


def _write(folder: Path, rows: list[dict[str, Any]], **training: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"batch": 64, "lr": 5e-4, "model": {"name": "ViT-S-16"}}
    described = {
        "settings": settings,
        "dataset": "f00d" * 16,
        "pairs": 6400,
        "seen": 64 * 2000,
        "device": "NVIDIA H100 80GB HBM3",
        "processes": 2,
        "parameters": 12_345_678,
        **training,
    }
    (folder / "training.json").write_text(json.dumps(described))
    written = page.write(folder)
    assert written
    return written


def _tree(path: Path) -> LexborHTMLParser:
    return LexborHTMLParser(path.read_text())


def _text(tree: LexborHTMLParser, selector: str) -> str:
    return " ".join(" ".join(node.text().split()) for node in tree.css(selector))


def test_every_curve_and_figure_is_there(tmp_path: Path) -> None:
    tree = _tree(_write(tmp_path / "run" / "train", [_row(s) for s in range(10, 1001, 10)]))
    assert [node.text() for node in tree.css("h2")] == HEADINGS
    assert len(tree.css("svg")) == 9 and len(tree.css("polyline")) == 12
    assert not tree.css("#unknown")
    assert "64,000 pairs seen in 1,000 steps; 1,000 steps of 2,000 are left" in _text(tree, ".lead")
    assert "6,400 pairs, f00df00df00df00d…" in _text(tree, ".facts")
    assert "f00d" * 16 in _text(tree, "#settings")
    assert "2 \N{MULTIPLICATION SIGN} NVIDIA H100 80GB HBM3" in _text(tree, ".facts")
    figures = _text(tree, "#figures td")
    for figure in ("Learning rate 0.0005", "text to image 37.5%", "51.2 GB", "1,234 pairs/s"):
        assert figure in figures
    assert "guessing costs 4.16 nats" in _text(tree, "#learning .note")
    assert "lr: 0.0005" in _text(tree, "#settings")


def test_what_checkpoints_were_worth_is_a_curve_of_each_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "evaluate"
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "datasets": {"paints": {"top1": 0.1 * step / 100}, "<b>": {"top1": 0.5}}}
        for step in (100, 300, 200, 300)  # that of 300 anew
    ]
    lines.append({"step": 300, "datasets": {"paints": {"top1": 1.0}}})
    text = "\n".join([*map(json.dumps, lines), '{"step": 4'])
    (folder / "by_step.jsonl").write_text(text)
    tree = _tree(_write(tmp_path / "run" / "train", [_row(s) for s in (100, 400)]))
    titles = [node.text() for node in tree.css("#learning h3")][2:]
    assert titles == ["Zero-shot accuracy on <b>", "Zero-shot accuracy on paints"]
    [flat, rising] = [svg.css_first("polyline") for svg in tree.css("#learning svg")[2:]]
    heights = [float(at.split(",")[1]) for at in str(rising.attributes["points"]).split()]
    assert len(heights) == 3 and heights == sorted(heights, reverse=True)
    [level] = {at.split(",")[1] for at in str(flat.attributes["points"]).split()}
    assert float(level) > heights[-1]


def test_unknown_figures_are_said_to_be_unknown(tmp_path: Path) -> None:
    rows = [_row(step, mfu=None, loss=float("nan")) for step in (10, 20)]
    tree = _tree(_write(tmp_path / "run" / "train", rows))
    peak = "Hardware's peak arithmetic in use"
    assert _text(tree, "#unknown") == f"Not known, and not drawn: {peak}."
    assert [node.text() for node in tree.css("#speed h3")].count(peak) == 0
    assert len(tree.css("#speed svg")) == 3
    assert "in use \N{EN DASH}" in _text(tree, "#figures td")
    assert "Loss, mean of both directions \N{EN DASH} Loss" in _text(tree, "#figures td")
    assert "nan" not in tree.html  # type: ignore[operator]


def test_memory_is_drawn_from_zero_in_the_unit_that_suits(tmp_path: Path) -> None:
    rows = [_row(step, memory_bytes=40_000_000_000 + step) for step in (10, 20)]
    tree = _tree(_write(tmp_path / "run" / "train", rows))
    drawn = tree.css("#speed svg")[-1]
    assert [node.text() for node in drawn.css(".label")] == ["step", "GB"]
    numbers = [node.text() for node in drawn.css(".tick")]
    assert numbers[:5] == ["0", "10", "20", "30", "40"]


def test_points_that_are_means_are_said_to_be(tmp_path: Path) -> None:
    few = _tree(_write(tmp_path / "few" / "train", [_row(s) for s in range(1, 301)]))
    many = _tree(_write(tmp_path / "many" / "train", [_row(s) for s in range(1, 302)]))
    assert "is the mean of" not in _text(few, "#learning .note")
    assert "is the mean of 2 lines" in _text(many, "#learning .note")


def test_skipped_steps_are_marked(tmp_path: Path) -> None:
    rows = [_row(step, skipped=(step > 40) + 2 * (step > 70)) for step in range(10, 101, 10)]
    tree = _tree(_write(tmp_path / "run" / "train", rows))
    said = [[cell.text() for cell in row.css("td")] for row in tree.css("#incidents tbody tr")]
    assert said == [
        ["50", "1 skipped: loss or gradient was not finite"],
        ["80", "2 skipped: loss or gradient was not finite"],
    ]
    assert len(tree.css("#learning svg")[0].css(".event")) == 2


def test_the_record_of_incidents_is_shown_in_words(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "train"
    folder.mkdir(parents=True)
    incidents = [
        {"what": "spike", "step": 30, "loss": 9.87654, "steps": 23, "uids": ["ab", "cd"]},
        {"what": "rewind", "step": 35, "time": 1_795_500_000.25, "to_step": 2000},
        {"what": "not finite", "step": 36, "loss": float("nan"), "steps": 1},
        {"what": "<script>alert(1)</script>", "step": 40},
    ]
    lines = [json.dumps(incident) for incident in incidents]
    (folder / "incidents.jsonl").write_text("\n".join([*lines, "[]", '{"what": "torn']))
    tree = _tree(_write(folder, [_row(step, skipped=step) for step in (10, 50)]))
    said = [[cell.text() for cell in row.css("td")] for row in tree.css("#incidents tbody tr")]
    assert said == [
        ["30", "spike: loss 9.877, 23 steps long, a batch of 2 samples"],
        ["35", "rewind: back to step 2,000"],
        ["36", "not finite: loss nan"],
        ["40", "<script>alert(1)</script>"],
    ]
    assert not tree.css("script")


def test_it_needs_the_record_alone_and_is_the_same_again(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "train"
    first = _write(folder, [_row(step) for step in (10, 20)]).read_bytes()
    written = page.write(folder)
    assert written and written.read_bytes() == first
    (folder / "training.json").unlink()
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5, "samples": 64}\n{"step": 2, "lo'
    )
    tree = _tree(page.write(folder) or folder)
    assert _text(tree, ".lead") == "64 pairs seen in 1 step."
    assert "not recorded" in _text(tree, "#settings")


def test_where_nothing_is_recorded_there_is_no_page(tmp_path: Path) -> None:
    assert page.write(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("")
    assert page.write(tmp_path) is None
    assert not (tmp_path / "training.html").exists()


def test_a_page_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run" / "train"
    _write(folder, [_row(10)])
    (folder / "training.html").unlink()
    (folder / "training.html").mkdir()
    assert page.write(folder) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_training_leaves_it_when_it_stops_and_when_it_ends(
    pack: Pack, attempt: Callable[..., Attempt]
) -> None:
    packed = pack(20)
    stopped = attempt(packed, stop=Stopping(6))
    path = stopped.run.stage_folder("train") / "training.html"
    with pytest.raises(Stopped):
        loop.train(stopped)
    assert "48 pairs seen in 6 steps; 14 steps of 20 are left" in _text(_tree(path), ".lead")
    loop.train(attempt(packed))
    assert _text(_tree(path), ".lead") == "160 pairs seen in 20 steps."
    assert set(list(read(path.with_name("metrics.jsonl")))[-1]) == set(page.FIGURES)


@pytest.mark.timeout(170)
def test_chromium_shows_it_without_a_complaint(
    tmp_path: Path, visited: tuple[str, list[str]]
) -> None:
    address, paths = visited
    attack = f'"><img src={address}/stolen><script>document.title="owned"</script>'
    path = _write(
        tmp_path / "run" / "train",
        [_row(step, skipped=step // 50) for step in range(10, 101, 10)],
        device=attack,
        settings={"batch": 64, "model": {"name": attack}},
    )
    dom, log = show(path, tmp_path / "profile")
    assert "CONSOLE" not in log
    assert paths == []
    tree = LexborHTMLParser(dom)
    assert _text(tree, "head > title") == "run · OpenWIT training"
    assert len(tree.css("svg")) == 9 and not tree.css("img, script")
    assert not [
        node
        for node in tree.css("[src], [href]")
        if not (node.attributes.get("src") or node.attributes.get("href") or "").startswith(
            ("data:", "#")
        )
    ]

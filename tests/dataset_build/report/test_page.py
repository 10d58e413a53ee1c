"""The page: whole, self-contained, and inert whatever the captions say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selectolax.lexbor import LexborHTMLParser

from dataset_build import report
from dataset_build.report.gather import gather
from dataset_build.report.page import REFUSALS, SECTIONS, funnel, page
from tests.browser import show, visited
from tests.dataset_build.report.fake_build import HOSTILE, STAGES, BalanceSettings, FakeBuild

__all__ = ["visited"]  # a fixture

README = (Path(__file__).parents[3] / "README.md").read_text()


@pytest.fixture
def hostile(fake_build: FakeBuild) -> FakeBuild:
    """A whole build in which a caption and a domain attack the page."""
    fake_build.captions = (HOSTILE,)
    fake_build.domain = HOSTILE + "{}"
    return fake_build.through("evaluate")


def test_the_page_has_every_section_with_a_way_to_read_it(hostile: FakeBuild) -> None:
    tree = LexborHTMLParser(report.write(hostile.run, STAGES).read_text())
    assert tuple(node.text() for node in tree.css("h2")) == tuple(SECTIONS.values())
    assert [node.text() for node in tree.css("nav a")] == list(SECTIONS.values())
    assert all(len(node.text()) > 40 for node in tree.css("section .how"))
    assert len(tree.css("section .how")) == len(SECTIONS)
    assert not tree.css(".absent, #missing")
    assert len(tree.css("#pictures img")) == 48
    assert len(tree.css("#queries svg")) == 1
    assert len(tree.css("#training svg")) == 2


def test_the_readme_says_how_to_read_every_section() -> None:
    chapter = README.partition("\n## How to read a report\n")[2].partition("\n## ")[0]
    named = re.findall(r"^- \*\*(.+?)\*\*:", chapter, re.MULTILINE)
    assert named == list(SECTIONS.values())


@pytest.mark.parametrize("last", ["queries", "extract"])
def test_a_build_that_was_to_end_early_is_not_called_unfinished(
    fake_build: FakeBuild, last: str
) -> None:
    stages = STAGES[: [stage.name for stage in STAGES].index(last) + 1]
    fake_build.through(last)
    finished = f"Built up to {last}, where until has it end."
    for upto, said in ((stages, finished), (STAGES, "The dataset is not finished")):
        tree = LexborHTMLParser(report.write(fake_build.run, upto).read_text())
        node = tree.css_first(".lead")
        assert node is not None
        assert said in " ".join(node.text().split()), upto


def _figures(tree: LexborHTMLParser) -> dict[str, str]:
    """What stands under each of the large numbers, and the number."""
    tiles = {}
    for tile in tree.css(".tiles div"):
        number, said = tile.css_first("b"), tile.css_first("span")
        assert number is not None and said is not None
        tiles[said.text()] = number.text()
    return tiles


def test_every_accuracy_is_among_the_large_numbers(fake_build: FakeBuild) -> None:
    page = report.write(fake_build.through("evaluate").run, STAGES)
    tiles = _figures(LexborHTMLParser(page.read_text()))
    assert tiles["zero-shot accuracy on sample_web; guessing: 2.1%"] == "71.2%"
    assert tiles["zero-shot accuracy on sample_web_unseen; guessing: 8.3%"] == "40.2%"


def test_a_run_that_only_trains_shows_only_that(fake_build: FakeBuild) -> None:
    row = {"step": 100, "samples": 6400, "loss": 1.23456}
    described = {
        "settings": {"model": {"name": "RN50"}},
        "dataset": "f00d" * 16,
        "pairs": 900,
        "seen": 64_000,
        "device": "cpu",
        "processes": 1,
        "parameters": 5,
    }
    fake_build.publish("train")
    folder = fake_build.run.stage_folder("train")
    (folder / "metrics.jsonl").write_text(json.dumps(row))
    (folder / "training.json").write_text(json.dumps(described))
    tree = LexborHTMLParser(report.write(fake_build.run, STAGES).read_text())
    assert [node.text() for node in tree.css("h2")] == ["Stages", "Training"]
    assert [node.text() for node in tree.css("#stages td.key")] == ["train", "evaluate"]
    lead, missing = tree.css_first(".lead"), tree.css_first("#missing")
    assert lead is not None and missing is not None
    said = "RN50 trained on 900 image\N{EN DASH}text pairs; 6,400 of 64,000 samples are done."
    assert " ".join(lead.text().split()) == said
    assert missing.text().startswith("Not on this page yet: Evaluation, not evaluated yet")
    assert _figures(tree) == {
        "samples trained on, 100 steps": "6.4k",
        "loss, mean of the last steps, nats": "1.23",
    }
    fake_build.make_evaluate()
    tree = LexborHTMLParser(report.write(fake_build.run, STAGES).read_text())
    assert [node.text() for node in tree.css("h2")] == ["Stages", "Training", "Evaluation"]


def test_what_cannot_be_shown_is_named_with_the_reason(fake_build: FakeBuild) -> None:
    page = report.write(fake_build.through("dedup").run, STAGES)
    tree = LexborHTMLParser(page.read_text())
    assert [node.text() for node in tree.css("h2")] == ["Stages", "Funnel", "Queries"]
    (missing,) = tree.css("#missing")
    assert "Downloads, not downloaded yet (download: not started" in missing.text()
    assert "Evaluation, not evaluated yet" in missing.text()


def test_inputs_that_are_not_as_they_should_be_are_named(hostile: FakeBuild) -> None:
    page = report.write(hostile.run, STAGES)
    assert _rows(page, ".warnings") == [[f"{hostile.domain}/cut.warc.gz", "cut off"]]
    assert "extract has read 1 input that is not as it should be" in page.read_text()


def test_every_number_of_the_funnel_is_on_the_page(hostile: FakeBuild) -> None:
    made, *_ = gather(hostile.run, STAGES)
    tree = LexborHTMLParser(report.write(hostile.run, STAGES).read_text())
    section = tree.css_first("#funnel")
    assert section is not None
    cells = [node.text(strip=True) for node in section.css("td")]
    for stage in made["funnel"]:
        assert stage["name"] in cells
        for rows in (stage["rows_in"], stage["rows_out"]):
            assert f"{rows:,}" in cells
        for reason, rows in stage["dropped"].items():
            assert f"\N{MINUS SIGN}{rows:,}" == cells[cells.index(reason) + 1]


def _rows(page: Path, table: str) -> list[list[str]]:
    tree = LexborHTMLParser(page.read_text())
    rows = tree.css(f"{table} tbody tr")
    return [[" ".join(node.text().split()) for node in row.css("td")] for row in rows]


def test_the_head_is_shown_at_every_step_with_three_domains(fake_build: FakeBuild) -> None:
    fake_build.through("pack")
    top = gather(fake_build.run, STAGES).report["queries"]["top"]
    first, second, *others = _rows(report.write(fake_build.run, STAGES), "#top")
    assert first[1:4] == ["750", "500", "40"]
    assert first[4:] == [
        str(top[0][key]) for key in ("downloaded", "packed", "in_union", "in_packed")
    ]
    domains = "photos-1.example 50.0%, photos-2.example 25.0%, photos-3.example 12.5%"
    assert second == [f"word · from {domains}"]
    assert len(others) == 2 * len(top) - 2
    assert others[2][0] == "query 2 capped" and others[-2][0] == "query 29"


def test_a_domains_share_is_of_the_selected(fake_build: FakeBuild) -> None:
    fake_build.through("balance")
    made = gather(fake_build.run, STAGES).report
    made["queries"]["top"][0]["domains"] = [["a.example", 10], ["", 4]]
    assert "<bdi>a.example</bdi> 25.0%, <bdi>no domain</bdi> 10.0%" in page(made, [])


def test_queries_without_a_pair_are_a_table_by_source(fake_build: FakeBuild) -> None:
    fake_build.through("balance")
    rows = _rows(report.write(fake_build.run, STAGES), "#zero")
    assert [row[0] for row in rows] == ["word", "bigram", "title", "wordnet", "all queries"]
    assert rows[0][2:] == ["60", "6", "10.0%"]
    assert rows[-1][2:] == ["120", "12", "10.0%"]


def test_a_step_to_come_says_what_it_waits_for(fake_build: FakeBuild) -> None:
    fake_build.through("balance")
    steps = _rows(report.write(fake_build.run, STAGES), "#steps")[::2]
    assert steps[2][:2] == ["selected", f"{fake_build.selected_count:,}"]
    assert steps[3:] == [
        ["downloaded", "not counted yet (screen: not started)"],
        ["packed", "not counted yet (pack: not started)"],
    ]


def test_before_balancing_no_table_pretends_to_know(fake_build: FakeBuild) -> None:
    fake_build.through("match")
    tree = LexborHTMLParser(report.write(fake_build.run, STAGES).read_text())
    assert not tree.css("#zero, #top, #delta")
    reasons = [node.text() for node in tree.css("#queries .absent")]
    assert reasons == ["No pairs of the queries are counted yet (balance: not started)."]


def test_what_became_no_query_is_explained(fake_build: FakeBuild) -> None:
    page = report.write(fake_build.through("queries").run, STAGES)
    cells = [node.text() for node in LexborHTMLParser(page.read_text()).css("#refused td")]
    assert cells[:3] == ["below_min_count", "1,200", REFUSALS["below_min_count"]]
    assert cells[3:5] == ["over_limit", "34"]
    assert cells[-2:] == ["queries", "120"]


@pytest.mark.parametrize(
    ("delta", "said"),
    [((17, 5), "17 pairs came in and 5 went out"), ((0, 0), "0 pairs came in"), (None, "no earl")],
)
def test_what_came_and_went_is_said(
    fake_build: FakeBuild, delta: tuple[int, int] | None, said: str
) -> None:
    fake_build.delta = delta
    fake_build.through("balance")
    tree = LexborHTMLParser(report.write(fake_build.run, STAGES).read_text())
    (note,) = tree.css("#delta")
    assert said in note.text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "A query selects at most 40 pairs."),
        ({"mode": "attributed"}, "the rarest of its queries only, and that one selects at most 40"),
        ({"mode": "metaclip"}, "a query selects about 40 pairs"),
        ({"spare": 0.5}, "50.0% more than the cap are selected at first"),
        ({"domain_share": 0.1}, "a query takes at most 10.0% of the cap"),
    ],
)
def test_the_limits_are_said_as_they_are_set(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    build = FakeBuild(tmp_path / "run", balance=BalanceSettings(**settings)).through("pack")
    tree = LexborHTMLParser(report.write(build.run, STAGES).read_text())
    lead, section = tree.css_first(".lead"), tree.css_first("#queries")
    assert lead is not None and section is not None
    assert said in " ".join(section.text().split())
    assert ("at first" in section.text()) == ("spare" in settings)
    for text in (lead.text(), section.text()):
        assert ("at most 40" in text) == (settings.get("mode") != "metaclip")


def test_a_step_keeps_its_colour_whatever_else_is_there(fake_build: FakeBuild) -> None:
    fake_build.through("dedup")
    fake_build.publish("balance", lambda f: np.save(f / "counts.npy", fake_build.counts), planned=9)
    tree = LexborHTMLParser(report.write(fake_build.run, STAGES).read_text())
    assert [node.attributes["class"] for node in tree.css("#queries polyline")] == ["line s1"]
    assert [node.text() for node in tree.css("#queries .legend span")] == ["deduplicated"]


def test_hits_of_sets_and_lists_are_on_the_page(fake_build: FakeBuild) -> None:
    fake_build.through("screen")
    tree = LexborHTMLParser(report.write(fake_build.run, STAGES).read_text())
    for table, expected in (
        ("evaluation-sets", ["cifar", "10", *"0000", "imagenet", "90", "2", "0", "5", "7"]),
        ("lists", ["blocked", "2", "0", "1", "0"]),
    ):
        assert [cell.text() for cell in tree.css(f"#{table} td")] == expected
    assert len(tree.css("#screening svg")) == 1


def test_a_hostile_caption_is_text(hostile: FakeBuild) -> None:
    text = report.write(hostile.run, STAGES).read_text()
    tree = LexborHTMLParser(text)
    assert not tree.css("script")
    caption = tree.css_first("#pictures .caption")
    assert caption is not None
    assert caption.text() == HOSTILE
    domain = tree.css_first("#top div bdi")
    assert domain is not None
    assert domain.text() == HOSTILE + "1"
    assert all((img.attributes["src"] or "").startswith("data:") for img in tree.css("img"))
    assert not [name for node in tree.css("*") for name in node.attributes if name[:2] == "on"]


def test_the_page_asks_for_nothing_else(hostile: FakeBuild) -> None:
    text = report.write(hostile.run, STAGES).read_text()
    tree = LexborHTMLParser(text)
    policy = tree.css_first("meta[http-equiv=Content-Security-Policy]")
    assert policy is not None
    assert "default-src 'none'" in (policy.attributes["content"] or "")
    for node in tree.css("[src], [href]"):
        address = node.attributes.get("src") or node.attributes.get("href") or ""
        assert address.startswith(("data:", "#")), address
    assert "url(" not in text
    assert "@import" not in text


def test_writing_again_changes_nothing(hostile: FakeBuild) -> None:
    page = report.write(hostile.run, STAGES)
    first = (page.read_bytes(), (page.parent / "report.json").read_bytes())
    report.write(hostile.run, STAGES)
    assert (page.read_bytes(), (page.parent / "report.json").read_bytes()) == first
    names = ["index.html", "queries.parquet", "report.json"]
    assert sorted(p.name for p in page.parent.iterdir()) == names


def test_bars_are_linear_until_the_smallest_cannot_be_seen() -> None:
    def stage(rows_in: int, rows_out: int) -> dict[str, int]:
        return {"rows_in": rows_in, "rows_out": rows_out}

    near = funnel([stage(1000, 500)])
    assert (near["scale"], near["rows"][0]["out_length"]) == ("linear", 50)
    far = funnel([stage(10**9, 10**6), stage(10**6, 0)])
    assert far["scale"] == "logarithmic"
    assert 60 < far["rows"][0]["out_length"] < 70
    assert far["rows"][1]["out_length"] == 0
    assert funnel([])["rows"] == []


@pytest.mark.timeout(170)
def test_chromium_shows_it_without_a_complaint(
    fake_build: FakeBuild, tmp_path: Path, visited: tuple[str, list[str]]
) -> None:
    address, paths = visited
    attack = f'"><img src={address}/stolen><script>document.title="owned"</script>'
    fake_build.captions = (attack,)
    page = report.write(fake_build.through("evaluate").run, STAGES)
    dom, log = show(page, tmp_path / "profile")
    assert "CONSOLE" not in log
    assert paths == []
    tree = LexborHTMLParser(dom)
    title = tree.css_first("title")
    assert title is not None
    assert title.text() == "run · OpenWIT report"
    assert len(tree.css("#pictures img")) == 48
    # Were the caption not escaped, this test would see it: the policy complains in the console.
    unsafe = tmp_path / "unsafe.html"
    unsafe.write_text(page.read_text().replace("</main>", f"{attack}</main>"))
    dom, log = show(unsafe, tmp_path / "profile")
    assert "CONSOLE" in log
    assert "<title>run · OpenWIT report</title>" in dom  # and stops the script and the request
    assert paths == []

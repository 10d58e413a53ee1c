"""The page: whole, self-contained, and inert whatever the captions say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selectolax.lexbor import LexborHTMLParser

from dataset_build import report
from dataset_build.report.gather import gather
from dataset_build.report.page import funnel, page
from tests.browser import show, visited
from tests.dataset_build.report.fake_build import HOSTILE, STAGES, BalanceSettings, FakeBuild

__all__ = ["visited"]  # a fixture

HEADINGS = (
    *("Stages", "Funnel", "Queries", "Downloads", "Dataset", "Pictures"),
    *("Training", "Evaluation"),
)


@pytest.fixture
def hostile(fake_build: FakeBuild) -> FakeBuild:
    """A whole build in which a caption and a domain attack the page."""
    fake_build.captions = (HOSTILE,)
    fake_build.domain = HOSTILE + "{}"
    return fake_build.through("evaluate")


def test_the_page_has_every_section_with_a_way_to_read_it(hostile: FakeBuild) -> None:
    tree = LexborHTMLParser(report.write(hostile.run, STAGES).read_text())
    assert tuple(node.text() for node in tree.css("h2")) == HEADINGS
    assert all(len(node.text()) > 40 for node in tree.css("section .how"))
    assert len(tree.css("section .how")) == len(HEADINGS)
    assert not tree.css(".absent")
    assert len(tree.css("#pictures img")) == 48
    assert len(tree.css("#queries svg")) == 1
    assert len(tree.css("#training svg")) == 2


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
    assert reasons.count("not counted yet (balance: not started)") == 4  # three steps, zero hits


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

"""The page: whole, self-contained, and inert whatever the captions say."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from selectolax.lexbor import LexborHTMLParser

from dataset_build import report
from dataset_build.report.gather import gather
from dataset_build.report.page import funnel, percent, size
from tests.dataset_build.report.fake_build import HOSTILE, STAGES, FakeBuild

HEADINGS = (
    *("Stages", "Funnel", "Queries", "Downloads", "Dataset", "Pictures"),
    *("Training", "Evaluation"),
)


@pytest.fixture
def hostile(fake_build: FakeBuild) -> FakeBuild:
    """A whole build in which a caption and a drop reason attack the page."""
    fake_build.captions = (HOSTILE,)
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
    made, _ = gather(hostile.run, STAGES)
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


def test_a_hostile_caption_is_text(hostile: FakeBuild) -> None:
    text = report.write(hostile.run, STAGES).read_text()
    tree = LexborHTMLParser(text)
    assert not tree.css("script")
    caption = tree.css_first("#pictures .caption")
    assert caption is not None
    assert caption.text() == HOSTILE
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
    assert sorted(p.name for p in page.parent.iterdir()) == ["index.html", "report.json"]


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


def test_numbers_for_people() -> None:
    assert percent(1, 100_000) == "<0.1%"
    assert percent(99_999, 100_000) == ">99.9%"
    assert (percent(0, 7), percent(7, 7), percent(1, 0)) == ("0.0%", "100.0%", "\N{EN DASH}")
    assert (size(999), size(1_500_000), size(None)) == ("999 B", "1.5 MB", "\N{EN DASH}")


@pytest.fixture
def visited() -> Iterator[tuple[str, list[str]]]:
    """A server on loopback that notes every path it is asked for: its address, and the paths."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()
        thread.join()


def _open(browser: str, page: Path, profile: Path) -> tuple[str, str]:
    """The DOM that Chromium makes of a page, and what it logged."""
    ended = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "--disable-dev-shm-usage",
            ),
            *("--enable-logging=stderr", f"--user-data-dir={profile}"),
            *("--dump-dom", page.resolve().as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=80,
        check=True,
    )
    return ended.stdout, ended.stderr


@pytest.mark.timeout(170)
def test_chromium_shows_it_without_a_complaint(
    fake_build: FakeBuild, tmp_path: Path, visited: tuple[str, list[str]]
) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("chromium is not installed")
    address, paths = visited
    attack = f'"><img src={address}/stolen><script>document.title="owned"</script>'
    fake_build.captions = (attack,)
    page = report.write(fake_build.through("evaluate").run, STAGES)
    dom, log = _open(browser, page, tmp_path / "profile")
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
    dom, log = _open(browser, unsafe, tmp_path / "profile")
    assert "CONSOLE" in log
    assert "<title>run · OpenWIT report</title>" in dom  # and stops the script and the request
    assert paths == []

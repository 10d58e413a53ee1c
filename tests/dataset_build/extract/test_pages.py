"""Pages that are made to be slow, large or worse, and what becomes of the process they are read by.

What happens to a page is what happens to a page of 8 MiB, at smaller sizes and limits.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fastwarc.warc import WarcRecordType

from dataset_build.extract import candidates, pages
from dataset_build.extract import html as html_module
from dataset_build.extract.archive import records
from dataset_build.extract.html import decoded, image_links
from dataset_build.extract.pages import CostlyPage, Reader
from dataset_build.extract.warc import _html
from dataset_build.processes import Killed
from pipeline.stats import Stats
from pipeline.stop import Stopped

from .conftest import Extract, members, page

SIZE = 400_000
LARGE = (
    b"<p>Some words of a page, as pages have.</p>\n" * 2000 + b"<img src=l.jpg alt='A large page'>"
)
SMALL = b"<img src=s.jpg alt='A small page'>"


def repeated(tags: bytes) -> bytes:
    return b"<img src=x>" + tags * (SIZE // len(tags))


def numbered(tag: bytes) -> bytes:
    return b"<img " + b"".join(tag % number for number in range(SIZE // len(tag)))


SLOW = {
    "deep": repeated(b"<div>"),
    "misnested": repeated(b"<a><div>"),
    "attributes": numbered(b"a%d "),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_MAX_PROCESSOR_S", 0.2)


@pytest.mark.usefixtures("short")
def test_a_slow_page_costs_itself_only(tmp_path: Path, extract: Extract) -> None:
    parts = [page("http://a.example/first", LARGE)]
    for name, html in SLOW.items():
        parts += [page(f"http://{name}.example/", html), page("http://a.example/", SMALL)]
    parts.append(page("http://a.example/last", LARGE))
    (tmp_path / "x.warc.gz").write_bytes(b"".join(members(*parts)))
    rows, stats = extract(warc=[f"{tmp_path}/x.warc.gz"], figure_captions=True)
    texts = [row["text"] for row in rows]
    assert texts == ["A large page", *["A small page"] * len(SLOW), "A large page"]
    assert stats.counts["costly_pages"] == len(SLOW)
    assert stats.counts["pages"] == len(SLOW) + 2
    assert stats.counts["bad_records"] == 0
    assert stats.balanced()


@pytest.mark.usefixtures("short")
def test_time_is_a_page_s_own() -> None:
    """Pages that together take longer than the limit are read, and so is one that waits."""
    with Reader() as reader:
        before = time.process_time()
        while time.process_time() - before < 0.5:
            assert reader.links(LARGE, "") == image_links(LARGE.decode())
            image_links(LARGE.decode() * 10)  # as long as that for the other process
        process = reader._process
        assert process is not None
        os.kill(process.pid or 0, signal.SIGSTOP)
        timer = subprocess.Popen(["sh", "-c", f"sleep 0.4; kill -CONT {process.pid}"])
        assert reader.links(LARGE, "") == image_links(LARGE.decode())
        timer.wait()
        assert reader._process is process


def test_a_page_that_takes_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_MAX_MEMORY_BYTES", 256 << 20)
    with Reader() as reader:
        with pytest.raises(CostlyPage):
            reader.links(b"<b><p>" * 500_000, "")
        assert reader.links(LARGE, "") == image_links(LARGE.decode())


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_page_that_the_parser_falls_over(number: signal.Signals) -> None:
    with Reader() as reader:
        process = reader._started()
        os.kill(process.pid or 0, number)
        with pytest.raises(CostlyPage):
            reader.links(LARGE, "")
        assert reader.links(LARGE, "") == image_links(LARGE.decode())


def test_large_pages_are_read_as_small_ones(real_data: Path) -> None:
    archive = real_data / "webarchive" / "news-pages-260.warc.gz"
    large = 0
    with Reader(figure_captions=True) as reader:
        for _, _, body in records(archive, WarcRecordType.response, Stats()):
            html, charset = _html(body)
            assert reader.links(html, charset) == image_links(decoded(html, charset), True)
            large += len(html) > pages._SMALL_BYTES
    assert large > 250


def test_what_is_no_fault_of_a_page_is_an_error() -> None:
    with Reader() as reader:
        with pytest.raises(AttributeError):
            reader.links(LARGE, None)  # type: ignore[arg-type]
        assert reader.links(LARGE, "") == image_links(LARGE.decode())
        process = reader._process
        assert process is not None
        process.kill()
        process.join()
        with pytest.raises(Killed, match="SIGKILL"):
            reader.links(LARGE, "")
        assert reader.links(LARGE, "") == image_links(LARGE.decode())


def test_a_process_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_serve", os.abort)  # which takes no arguments
    with Reader() as reader, pytest.raises(Killed, match="exit code 1"):
        reader.links(LARGE, "")


def test_the_process_ends_where_the_task_stops() -> None:
    pid = 0
    with pytest.raises(Stopped), Reader() as reader:
        reader.links(LARGE, "")
        assert reader._process is not None
        pid = reader._process.pid or 0
        raise Stopped("SIGTERM")
    assert pid
    assert not _running(pid)


@pytest.mark.parametrize("html", [LARGE, SLOW["deep"] * 2], ids=["idle", "busy"])
def test_the_process_ends_where_the_task_is_killed(html: bytes, tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(html)
    script = f"""
import os, pathlib, threading
from dataset_build.extract import pages
pages._MAX_PROCESSOR_S = 60
reader = pages.Reader()
reader._started()
print(reader._process.pid, flush=True)
threading.Timer(0.3, os.kill, (os.getpid(), 9)).start()
reader.links(pathlib.Path({str(tmp_path / "page")!r}).read_bytes(), "")
threading.Event().wait()
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    pid = int(killed.stdout)
    try:
        assert _soon(lambda: not _running(pid)), "the process outlived the task"
    finally:
        if _running(pid):
            os.kill(pid, signal.SIGKILL)


def test_sources_of_a_picture_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    largest = html_module._largest
    monkeypatch.setattr(html_module, "_largest", lambda given: read.append(given) or largest(given))
    html = "<picture>" + "<source srcset='data:,'>" * 50 + "<img>" * 500 + "</picture>"
    assert len(image_links(html)[1]) == 500
    assert len(read) == 550


@pytest.mark.parametrize("srcset", ["," * 20_000, "a," * 10_000, "a 1" * 6000, "\t" * 20_000])
def test_a_srcset_takes_a_time_that_grows_with_its_length(srcset: str) -> None:
    """Some milliseconds; with the square of its length it were two seconds."""
    before = time.process_time()
    image_links(f"<img srcset='{srcset}'>")
    assert time.process_time() - before < 0.5


def test_a_caption_that_many_pictures_have_is_cleaned_once(
    tmp_path: Path, extract: Extract
) -> None:
    images = "".join(f"<img src=x.jpg alt='Picture no {n} of many'>" for n in range(500))
    html = f"<figure>{images}<figcaption>A\u0301 caption</figcaption></figure>"
    (tmp_path / "x.warc").write_bytes(page("http://a.example/", html.encode()))
    candidates._clean.cache_clear()
    _, stats = extract(warc=[f"{tmp_path}/x.warc"], figure_captions=True)
    assert stats.rows_in == 1000
    assert candidates._clean.cache_info().misses == 501


def test_of_a_caption_is_read_what_can_be_stored() -> None:
    html = f"<figure><img><figcaption>{'A b ' * 100_000}</figcaption></figure>"
    ((_, [(_, text)]),) = image_links(html, True)[1]
    assert text == ("A b " * 5000).strip()


def _soon(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not (now := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return now


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

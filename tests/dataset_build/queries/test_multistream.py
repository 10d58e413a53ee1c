"""One dump, read by many tasks: nothing twice, nothing left out."""

from __future__ import annotations

import bz2
import io
import random
from pathlib import Path
from typing import Any

import pytest

from dataset_build.queries.multistream import Part, is_multistream
from dataset_build.queries.wikipedia import pages
from pipeline.stats import Stats

from .conftest import Build, dump

NAME = "enwiki-20240101-pages-articles-multistream{}.{}"


def streams(pages_a_stream: int = 7, count: int = 100) -> list[bytes]:
    """As Wikimedia compresses it: the head, some pages each, the end."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    order = random.Random(0)
    texts = [
        " ".join("".join(order.choices(letters, k=4)) for _ in range(300)) + f" common{n % 7}."
        for n in range(count)
    ]
    whole = dump([(f"Page {n}", 0, text) for n, text in enumerate(texts)]).decode()
    head, *bodies = whole.removesuffix("</mediawiki>").split("<page>")
    groups = [bodies[n : n + pages_a_stream] for n in range(0, count, pages_a_stream)]
    parts = [head, *("".join(f"<page>{body}" for body in group) for group in groups)]
    return [bz2.compress(part.encode()) for part in [*parts, "</mediawiki>"]]


@pytest.fixture
def multistream(tmp_path: Path) -> Path:
    path = tmp_path / NAME.format("", "xml.bz2")
    path.write_bytes(b"".join(streams()))
    (tmp_path / NAME.format("-index", "txt.bz2")).write_bytes(bz2.compress(b"..."))
    return path


def titles(path: Path, start: int, end: int, stats: Stats | None = None) -> list[str]:
    with path.open("rb") as raw:
        return [page.title for page in pages(raw, path.name, stats or Stats(), (start, end))]


@pytest.mark.parametrize("parts", [1, 2, 3, 16, 1000])
def test_every_page_is_in_one_part(multistream: Path, parts: int) -> None:
    size = multistream.stat().st_size
    edges = [part * size // parts for part in range(parts + 1)]
    found = [titles(multistream, *edges[n : n + 2]) for n in range(parts)]
    assert [title for part in found for title in part] == [f"Page {n}" for n in range(100)]


def test_it_is_read_like_a_file(multistream: Path) -> None:
    size = multistream.stat().st_size
    whole = bz2.decompress(multistream.read_bytes())
    for step in (1, 1000, -1):
        with multistream.open("rb") as raw:
            part, found = Part(raw, 0, size, Stats()), io.BytesIO()
            while data := part.read(step):
                found.write(data)
        assert found.getvalue() == whole


@pytest.mark.parametrize("fault", ["flipped", "cut", "headless"])
def test_a_damaged_stream_loses_itself(multistream: Path, fault: str) -> None:
    data, broken = bytearray(multistream.read_bytes()), streams()
    start = sum(map(len, broken[:4]))
    if fault == "headless":
        data[start + 5] ^= 1
    elif fault == "flipped":
        data[start + len(broken[4]) // 2] ^= 1
    else:
        data = data[: start + len(broken[4]) // 2]
    multistream.write_bytes(data)
    stats = Stats()
    found = titles(multistream, 0, len(data), stats)
    lost = set(range(21, 100 if fault == "cut" else 28))
    assert found == [f"Page {n}" for n in range(100) if n not in lost]
    assert stats.counts["broken_streams"] == 1
    first, second = (Stats(), Stats())
    halves = titles(multistream, 0, start, first) + titles(multistream, start, len(data), second)
    assert halves == found
    assert first.counts["broken_streams"] + second.counts["broken_streams"] == 1


def test_a_stream_that_expands_without_end_is_broken(
    multistream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = streams()
    bomb = bz2.compress(bytes(100 << 20))
    multistream.write_bytes(b"".join([*parts[:3], bomb, *parts[3:]]))
    monkeypatch.setattr("dataset_build.queries.multistream._MOST", 1 << 20)
    stats = Stats()
    assert len(titles(multistream, 0, multistream.stat().st_size, stats)) == 100
    assert stats.counts["broken_streams"] == 1


def test_only_with_an_index_streams_are_known_to_begin_with_pages(multistream: Path) -> None:
    assert is_multistream(multistream)
    other = multistream.with_name(NAME.format("1", "xml-p1p41242.bz2"))
    other.write_bytes(b"".join(streams()[:3]))
    assert not is_multistream(other)
    other.with_name(NAME.format("-index1", "txt-p1p41242.bz2")).write_bytes(b"")
    assert is_multistream(other)
    plain = multistream.with_name("enwiki-pages-articles.xml.bz2")
    plain.write_bytes(b"")
    assert not is_multistream(plain)


@pytest.mark.parametrize("content", ["one stream", "damaged head", "empty"])
def test_streams_that_begin_elsewhere_are_no_parts(multistream: Path, content: str) -> None:
    """As where a program compressed a dump anew, and the index of before still lies beside it."""
    data = multistream.read_bytes()
    other = {
        "one stream": bz2.compress(bz2.decompress(data)),
        "damaged head": data[:20] + data[24:],
    }
    multistream.write_bytes(other.get(content, b""))
    assert not is_multistream(multistream)


def test_a_missing_end_is_said_however_it_is_read(multistream: Path, build: Build) -> None:
    multistream.write_bytes(b"".join(streams()[:9]))
    size = multistream.stat().st_size
    for most in (size, size // 3):
        run = multistream.parent / f"run-{most}"
        _, stats = build(
            wikipedia=[str(multistream)], bytes_per_task=most, min_word_count=2, run=run
        )
        assert stats.counts["articles"] == 7 * 8
        assert stats.counts["truncated_files"] == 1
        assert "cut off" in stats.warnings[str(multistream)]


def test_tasks_of_any_number_give_the_same_bytes(multistream: Path, build: Build) -> None:
    def made(most: int) -> tuple[bytes, Any]:
        run = multistream.parent / f"run-{most}"
        given = {"wikipedia": [str(multistream)], "bytes_per_task": most}
        _, stats = build(**given, min_word_count=2, min_bigram_count=2, run=run)
        return (run / "queries/out/queries.parquet").read_bytes(), stats

    size = multistream.stat().st_size
    whole, stats = made(size)
    assert stats.counts["articles"] == 100
    for tasks in (2, 16):
        again, split = made(-(-size // tasks))
        assert again == whole
        assert split.counts["articles"] == 100

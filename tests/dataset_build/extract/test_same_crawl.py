"""A real crawl's pages and its metadata of them: both readers say the same of the same page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from warcio.archiveiterator import ArchiveIterator

from dataset_build.extract import ExtractSettings, warc, wat
from dataset_build.extract.candidates import Candidates
from dataset_build.extract.urls import canonical
from dataset_build.text import clean

AUSTRALIA = "http://0pointer.de/photos/?gallery=Australia&photo=496"
THAILAND = (
    "http://0pointer.de/photos/?gallery=Thailand%202011-01&photo=726&show_thumbs=yes&exif_style="
)
WIKI = "http://0x20.be/Special:WhatLinksHere/Thread:Talk:Gentse_feesten/foo"


class Links(Candidates):
    """Remembers what a reader puts to it, before it is judged."""

    def __init__(self, target: Path) -> None:
        super().__init__(target, ExtractSettings(), "x")
        self.links: list[tuple[str, str, str, str]] = []

    def row(self, url: str, raw: str, source: str, page_url: str, base: str = "") -> None:
        """Page, address, kind of text, text."""
        self.links.append((page_url, canonical(url, base)[0], source, clean(raw)))


@pytest.fixture
def crawl(real_data: Path) -> Path:
    return real_data / "webarchive" / "commoncrawl-2014-35.warc"


@pytest.fixture
def metadata(crawl: Path) -> Path:
    return crawl.with_name(f"{crawl.name}.wat")


def told(extract: Callable[..., None], path: Path, folder: Path) -> Links:
    with Links(folder / "candidates.parquet") as links:
        extract(path, links, lambda position: None)
    return links


def described(metadata: Path) -> list[tuple[str, str]]:
    """Kind and page of each record that the metadata are of; read by warcio."""
    with metadata.open("rb") as file:
        heads = [
            json.loads(record.content_stream().read())["Envelope"]["WARC-Header-Metadata"]
            for record in ArchiveIterator(file)
            if record.rec_type == "metadata"
        ]
    return [(head["WARC-Type"], head.get("WARC-Target-URI", "")) for head in heads]


def test_pages_and_metadata_agree(crawl: Path, metadata: Path, tmp_path: Path) -> None:
    of_pages = told(warc.extract, crawl, tmp_path).links
    of_metadata = told(wat.extract, metadata, tmp_path).links
    pages = {page for kind, page in described(metadata) if kind == "response"}
    assert of_metadata == [link for link in of_pages if link[0] in pages]
    photos = "http://0pointer.de/photos/galleries/Australia"
    assert of_metadata == [
        (AUSTRALIA, f"{photos}/lq/img-496.jpg", "alt", "496"),
        (AUSTRALIA, f"{photos}/thumbs/img-495.jpg", "alt", "Previous"),
        (AUSTRALIA, f"{photos}/thumbs/img-497.jpg", "alt", "Next"),
        (
            *(AUSTRALIA, "http://creativecommons.org/images/public/somerights20.png"),
            *("alt", "Creative Commons License"),
        ),
    ]


def test_what_the_metadata_lack_is_what_they_are_not_of(
    crawl: Path, metadata: Path, tmp_path: Path
) -> None:
    """The file of metadata was cut between the request for a page and the page itself."""
    assert described(metadata)[-1] == ("request", THAILAND)
    links = told(warc.extract, crawl, tmp_path)
    assert links.stats.counts["pages"] == 3
    found = Counter(page for page, *_ in links.links)
    assert found == {AUSTRALIA: 4, THAILAND: 854, WIKI: 3}

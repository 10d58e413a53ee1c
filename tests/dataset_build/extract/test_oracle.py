"""Real pages, read a second way: warcio, lxml and urllib, nothing of ours.

libxml2 reads HTML 4, where `<template>` is a tag like others and `<image>` is unknown.
"""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import lxml.html
import pytest
from fastwarc.warc import WarcRecordType
from warcio.archiveiterator import ArchiveIterator

from dataset_build.extract.archive import records
from dataset_build.extract.html import decoded, image_links
from dataset_build.extract.urls import canonical
from dataset_build.extract.warc import _html
from pipeline.stats import Stats

Texts = dict[str, Counter[tuple[str, str]]]

# Pages of neither valid UTF-8 nor windows-1252: what they say themselves.
ENCODINGS = {"www.he.xinhuanet.com": "gbk", "www.maescot.de": "utf-8"}


@pytest.fixture
def archive() -> Path:
    if not (folder := os.environ.get("OPENWIT_DATA")):
        pytest.skip("OPENWIT_DATA is not set: no real archives to read")
    return Path(folder) / "webarchive" / "news-pages-260.warc.gz"


def pages(archive: Path) -> Iterator[tuple[str, lxml.html.HtmlElement]]:
    """Address and tree of each page; `<image>` outside of drawings is made `<img>`."""
    with archive.open("rb") as file:
        for record in ArchiveIterator(file):
            if record.rec_type != "response":
                continue
            url = record.rec_headers["WARC-Target-URI"]
            html = record.content_stream().read()
            try:
                html.decode()
                encoding = "utf-8"
            except UnicodeDecodeError:
                named = [code for host, code in ENCODINGS.items() if f"/{host}/" in url]
                encoding = named[0] if named else "cp1252"
            parser = lxml.html.HTMLParser(encoding=encoding, huge_tree=True)
            root = lxml.html.document_fromstring(html, parser=parser)
            for image in root.xpath("//image[not(ancestor::svg)]"):
                image.tag = "img"
            yield url, root


def links(archive: Path) -> Iterator[tuple[str, str, list[tuple[str, list[tuple[str, str]]]]]]:
    """Address, base as written and pictures of each page, as the stage reads them."""
    for _, record, body in records(archive, WarcRecordType.response, Stats()):
        url = record.headers["WARC-Target-URI"].replace(" ", "%20")  # as warcio does
        yield url, *image_links(decoded(*_html(body)))


def test_texts_of_pictures(archive: Path) -> None:
    """Of each page, each text of a picture, as often as it is there, and no other."""
    mine: Texts = {
        url: Counter(text for _, texts in images for text in texts)
        for url, _, images in links(archive)
    }
    other: Texts = {
        url: Counter(
            (name, text)
            for image in root.iter("img")
            for name in ("alt", "title")
            if (text := image.get(name))
        )
        for url, root in pages(archive)
    }
    assert len(mine) == len(other) == 260
    assert sum(map(Counter.total, other.values())) > 4400
    assert mine == other


def test_addresses_of_pictures(archive: Path) -> None:
    """Where a picture has `src` alone, it is what urllib makes of it."""
    mine = {}
    for url, base, images in links(archive):
        base = (base and canonical(base, url)[0]) or url
        mine[url] = {canonical(address, base)[0] for address, _ in images}
    checked, missed = 0, Counter[str]()
    for url, root in pages(archive):
        bases = root.xpath("//base/@href")
        base = urljoin(url, bases[0].strip()) if bases else url
        for image in root.iter("img"):
            given = image.get("src", "").strip()
            others = [name for name in image.attrib if re.match("data-|srcset", name)]
            if not given.startswith("#") and given and not others:
                address = quote(urljoin(base, given), safe=string.punctuation)
                if address.startswith("http") and "{" not in address:  # a script's template
                    checked += 1
                    missed[urlsplit(url).netloc] += address not in mine[url]
    assert checked > 3300
    # urljoin makes one slash of the base's two; "https:///na/" names no host with a dot.
    assert +missed == {"www.sonnenenergie.de": 10, "nachtkritik.de": 1}

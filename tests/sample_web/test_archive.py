"""WARC and WAT: readable by the field's reader, and telling the same story."""

from __future__ import annotations

import gzip
import html
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from fastwarc.warc import ArchiveIterator
from selectolax.lexbor import LexborHTMLParser

from sample_web import pages
from sample_web.archive import SNAPSHOTS


@pytest.fixture(scope="module")
def pairs_of_files(web: Any) -> list[tuple[Path, Path]]:
    root = web.out / "archive"
    listed = [
        gzip.decompress((root / f"{k}.paths.gz").read_bytes()).decode() for k in ("warc", "wat")
    ]
    warcs, wats = ([root / line for line in text.splitlines()] for text in listed)
    return list(zip(warcs, wats, strict=True))


def read(path: Path) -> list[tuple[dict[str, str], bytes, int]]:
    """(headers, block, offset) of every record."""
    found = []
    with path.open("rb") as stream:
        for record in ArchiveIterator(stream, parse_http=False):
            found.append((dict(record.headers), record.reader.read(), record.stream_pos))
    return found


def test_paths_name_the_files_there_are(web: Any, pairs_of_files: list[tuple[Path, Path]]) -> None:
    root = web.out / "archive"
    there = {path for path in root.rglob("*.gz") if "crawl-data" in path.parts}
    assert there == {path for pair in pairs_of_files for path in pair}
    crawls = {path.relative_to(root).parts[1] for path in there}
    assert crawls == set(SNAPSHOTS)


def test_records_come_in_the_order_of_a_crawl(pairs_of_files: list[tuple[Path, Path]]) -> None:
    kinds = [head["WARC-Type"] for head, _, _ in read(pairs_of_files[0][0])]
    assert kinds[0] == "warcinfo"
    assert kinds[1:] == ["request", "response", "metadata"] * (len(kinds) // 3)


def test_every_record_is_a_gzip_member(pairs_of_files: list[tuple[Path, Path]]) -> None:
    for path in pairs_of_files[1]:
        data = path.read_bytes()
        while data:
            member = zlib.decompressobj(31)
            text = member.decompress(data)
            assert member.eof
            assert text.startswith(b"WARC/1.0\r\n")
            assert text.endswith(b"\r\n\r\n")
            data = member.unused_data


def test_the_wat_describes_each_record_of_the_warc(
    pairs_of_files: list[tuple[Path, Path]],
) -> None:
    for warc, wat in pairs_of_files:
        records = read(warc)
        info, *described = read(wat)
        assert info[0]["WARC-Type"] == "warcinfo"
        assert len(described) == len(records)
        for (head, block, offset), (about, text, _) in zip(records, described, strict=True):
            told = json.loads(text)
            assert about["WARC-Refers-To"] == head["WARC-Record-ID"]
            assert int(told["Container"]["Offset"]) == offset
            assert told["Container"]["Filename"] == warc.name
            assert told["Envelope"]["WARC-Header-Metadata"]["WARC-Type"] == head["WARC-Type"]
            assert int(told["Envelope"]["Actual-Content-Length"]) == len(block)


def test_the_wat_has_the_images_that_the_html_has(
    pairs_of_files: list[tuple[Path, Path]],
) -> None:
    forms = {"//": 0, "/": 0, "http://": 0, "../": 0, "data:": 0, "base": 0, "title": 0, "&": 0}
    lazy = captions = 0
    for warc, wat in pairs_of_files:
        bodies = [b for head, b, _ in read(warc) if head["WARC-Type"] == "response"]
        answers = [json.loads(text) for _, text, _ in read(wat)[1:]]
        told = [
            found["HTML-Metadata"]
            for answer in answers
            if (found := answer["Envelope"]["Payload-Metadata"].get("HTTP-Response-Metadata"))
        ]
        for body, metadata in zip(bodies, told, strict=True):
            tree = LexborHTMLParser(body.partition(b"\r\n\r\n")[2])
            links = [link for link in metadata["Links"] if link["path"] == "IMG@/src"]
            tags = tree.css("img")
            assert len(tags) == len(links)
            for tag, link in zip(tags, links, strict=True):
                assert tag.attributes["src"] == html.unescape(link["url"])
                alt = (tag.attributes["alt"] or "").replace("\ufffd", "\x00")
                assert alt == html.unescape(link.get("alt", "")).replace("\r", "\n")
                forms["title"] += "title" in link
                forms["&"] += "&" in link["url"]
                for start in ("//", "/", "http://", "../", "data:"):
                    if link["url"].startswith(start):
                        forms[start] += 1
                        break
                lazy += tag.attributes["src"] == pages.LAZY and "data-src" in tag.attributes
            base = tree.css_first("base")
            assert (base.attributes["href"] if base else None) == metadata["Head"].get("Base")
            forms["base"] += base is not None
            captions += len(tree.css("figcaption"))
    assert all(forms.values()), forms
    assert lazy > 0
    assert captions > 0

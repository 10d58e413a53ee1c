"""Image links from Common Crawl's WAT files: page metadata as one JSON record a page.

A byte search skips the pages without pictures, before any JSON is parsed; of the others' JSON
Python objects are made only for what is asked of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from fastwarc.warc import WarcRecordType

from dataset_build.extract.archive import records
from dataset_build.extract.candidates import Candidates
from dataset_build.extract.urls import of_page

_IMAGE = "IMG@/src"
_MARK = _IMAGE.encode()


class _Link(msgspec.Struct, gc=False):
    path: Any = None
    url: Any = None
    alt: Any = None
    title: Any = None


class _Head(msgspec.Struct):
    base: Any = msgspec.field(name="Base", default=None)


class _Html(msgspec.Struct):
    links: list[_Link] = msgspec.field(name="Links")
    head: _Head | None = msgspec.field(name="Head", default=None)


class _Answer(msgspec.Struct):
    html: _Html = msgspec.field(name="HTML-Metadata")


class _Payload(msgspec.Struct):
    answer: _Answer = msgspec.field(name="HTTP-Response-Metadata")


class _Header(msgspec.Struct):
    url: str = msgspec.field(name="WARC-Target-URI")


class _Envelope(msgspec.Struct):
    header: _Header = msgspec.field(name="WARC-Header-Metadata")
    payload: _Payload = msgspec.field(name="Payload-Metadata")


class _Document(msgspec.Struct):
    """What is read of a record; the names are the extractor's (`ia-web-commons`)."""

    envelope: _Envelope = msgspec.field(name="Envelope")


_DECODER = msgspec.json.Decoder(_Document)


def extract(path: Path, candidates: Candidates, progress: Callable[[int], None]) -> None:
    """Put every image link of a WAT file to `candidates`; a bad record costs itself only."""
    counts = candidates.stats.counts
    kind = WarcRecordType.metadata
    for position, _, body in records(path, kind, candidates.stats):
        progress(position)
        if _MARK not in body:
            continue
        try:
            page = _parsed(body).envelope
        except (ValueError, RecursionError):
            counts["bad_records"] += 1
            continue
        counts["pages"] += 1
        html = page.payload.answer.html
        base = html.head.base if html.head else None
        base = base if isinstance(base, str) else ""
        page_url, base = of_page(page.header.url.strip(), base)
        images = [link for link in html.links if link.path == _IMAGE]
        described = [link for link in images if link.alt or link.title]  # most are not
        candidates.without_text(len(images) - len(described))
        for link in described:
            url = link.url if isinstance(link.url, str) else ""
            candidates.link(url, _texts(link), page_url, base)


def _parsed(body: bytes) -> _Document:
    try:
        return _DECODER.decode(body)
    except msgspec.DecodeError:
        # Half a surrogate pair, where a text was cut, is no fault of the rest.
        text = json.dumps(json.loads(body), ensure_ascii=False)
        return _DECODER.decode(text.encode(errors="ignore"))


def _texts(link: _Link) -> list[tuple[str, str]]:
    texts = (("alt", link.alt), ("title", link.title))
    return [(name, text) for name, text in texts if text and isinstance(text, str)]

"""Image links from Common Crawl's WAT files: page metadata as one JSON record a page.

A byte search skips the pages without pictures, before any JSON is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from fastwarc.warc import WarcRecordType

from dataset_build.extract.archive import records
from dataset_build.extract.candidates import Candidates
from dataset_build.extract.urls import canonical

_IMAGE = "IMG@/src"
_MARK = _IMAGE.encode()


def extract(path: Path, candidates: Candidates, progress: Callable[[int], None]) -> None:
    """Put every image link of a WAT file to `candidates`; a bad record costs itself only."""
    counts = candidates.stats.counts
    kind = WarcRecordType.metadata
    for position, _, body in records(path, kind, candidates.stats):
        progress(position)
        if _MARK not in body:
            continue
        try:
            page_url, base, links = _page(_parsed(body))
        except (ValueError, KeyError, TypeError, AttributeError):
            counts["bad_records"] += 1
            continue
        counts["pages"] += 1
        for url, texts in links:
            candidates.link(url, texts, page_url, base)


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return json.loads(body)  # forgives half a surrogate pair, where a text was cut


def _page(document: Any) -> tuple[str, str, list[tuple[str, list[tuple[str, str]]]]]:
    """Address, base and image links of one page."""
    envelope = document["Envelope"]
    page_url = str(envelope["WARC-Header-Metadata"]["WARC-Target-URI"]).strip()
    page_url = page_url.encode(errors="ignore").decode()
    html = envelope["Payload-Metadata"]["HTTP-Response-Metadata"]["HTML-Metadata"]
    base = (html.get("Head") or {}).get("Base")
    base = canonical(base, page_url)[0] if isinstance(base, str) else ""
    links = []
    for link in [link for link in html["Links"] if link.get("path") == _IMAGE]:
        texts = [("alt", link.get("alt")), ("title", link.get("title"))]
        strings = [(name, text) for name, text in texts if text and isinstance(text, str)]
        url = link.get("url")
        links.append((url if isinstance(url, str) else "", strings))
    return page_url, base or page_url, links

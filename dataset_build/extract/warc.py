"""Image links from archived HTML pages themselves (WARC response records).

Sees what WAT metadata leaves out: lazily loaded pictures (`data-src`) and `srcset`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path

from fastwarc.warc import WarcRecordType

from dataset_build.extract.archive import records
from dataset_build.extract.candidates import Candidates
from dataset_build.extract.pages import MAX_PAGE_BYTES, CostlyPage, Reader
from dataset_build.extract.urls import of_page

_HTML_TYPES = frozenset([b"text/html", b"application/xhtml+xml"])
_IMAGE = re.compile(rb"<im(?:g|age)[\s/]", re.IGNORECASE)  # HTML takes <image> for <img>
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]*\r\n")
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?([\w:.-]+)", re.IGNORECASE)


def extract(
    path: Path,
    candidates: Candidates,
    progress: Callable[[int], None],
    figure_captions: bool = False,
) -> None:
    """Put every image link of the HTML pages in a WARC file to `candidates`.

    A bad page costs itself only, and so does one that takes too long to parse (`costly_pages`);
    records are skipped that are no HTML or answer with an error.
    """
    counts = candidates.stats.counts
    with Reader(figure_captions) as reader:
        for position, record, body in records(path, WarcRecordType.response, candidates.stats):
            progress(position)
            try:
                page_url = (record.headers["WARC-Target-URI"] or "").strip(" <>")
                html, charset = _html(body)
                if not html or not page_url:
                    counts["other_records"] += 1
                    continue
                base, links = reader.links(html, charset) if _IMAGE.search(html) else ("", [])
            except (zlib.error, ValueError, KeyError, RuntimeError):
                counts["bad_records"] += 1
                continue
            except CostlyPage:
                counts["costly_pages"] += 1
                continue
            counts["pages"] += 1
            page_url, base = of_page(page_url, base)
            for url, texts in links:
                candidates.link(url, texts, page_url, base)


def _html(message: bytes) -> tuple[bytes, str]:
    """Payload and declared charset of an HTTP answer; both empty unless it is 200 and HTML.

    Archives differ in whether they keep a transfer's coding or undo it, and in whether the header
    still tells of it (Common Crawl of 2014 does, wrongly); so the payload has the last word.
    """
    if (end := _HEAD_END.search(message)) is None:
        return b"", ""
    status, *lines = message[: end.start()].splitlines()
    if status.split()[1:2] != [b"200"]:
        return b"", ""
    headers = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    content_type = headers.get(b"content-type", b"")
    kind = content_type.partition(b";")[0].strip().lower()
    if kind and kind not in _HTML_TYPES:
        return b"", ""
    payload = message[end.end() :]
    if b"chunked" in headers.get(b"transfer-encoding", b"").lower() and _CHUNK.match(payload):
        payload = _without_chunks(payload)
    if payload[:2] == b"\x1f\x8b":
        payload = zlib.decompressobj(wbits=31).decompress(payload, MAX_PAGE_BYTES)
    payload = payload[:MAX_PAGE_BYTES]
    if not kind and b"<html" not in payload[:4096].lower():
        return b"", ""
    charset = _CHARSET.search(content_type)
    return payload, charset[1].decode("ascii", "ignore") if charset else ""


def _without_chunks(payload: bytes) -> bytes:
    """The payload of a chunked transfer (RFC 9112, §7.1); what follows a broken chunk is lost."""
    parts = []
    position = 0
    while (match := _CHUNK.match(payload, position)) and (length := int(match[1], 16)):
        parts.append(payload[match.end() : match.end() + length])
        position = match.end() + length + 2
    return b"".join(parts)

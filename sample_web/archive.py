"""The web archive: pages as WARC, and the WAT made from it, laid out as Common Crawl does.

Every record is a gzip member of its own. The formats: WARC 1.0 (ISO 28500), and the JSON of
Common Crawl's WAT files, in which attribute values stay escaped as they stand in the HTML.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sample_web.pages import Page, markup, pages
from sample_web.vocabulary import number

if TYPE_CHECKING:
    from sample_web.stage import SampleWebSettings

SNAPSHOTS = ("CC-MAIN-2026-05", "CC-MAIN-2026-09")
_DATES = ("2026-01-24T11:{:02d}:{:02d}Z", "2026-02-21T07:{:02d}:{:02d}Z")
_AGENT = "CCBot/2.0 (https://commoncrawl.example/faq/)"


def names(settings: SampleWebSettings, file: int) -> tuple[str, str]:
    """Paths of a file's WARC and WAT below the archive's root, as the `*.paths.gz` list them."""
    crawl = _crawl(settings, file)
    segment = f"17690{number(settings.seed, 'segment', crawl) % 10**8:08d}.{10 + file}"
    stem = f"CC-MAIN-2026{('0124', '0221')[crawl]}110000-2026{('0124', '0221')[crawl]}140000"
    folder = f"crawl-data/{SNAPSHOTS[crawl]}/segments/{segment}"
    name = f"{stem}-{file:05d}.warc"
    return f"{folder}/warc/{name}.gz", f"{folder}/wat/{name}.wat.gz"


def write_paths(root: Path, settings: SampleWebSettings) -> None:
    """Write `warc.paths.gz` and `wat.paths.gz`."""
    every = [names(settings, file) for file in range(settings.archive_files)]
    for column, kind in enumerate(("warc", "wat")):
        text = "".join(f"{pair[column]}\n" for pair in every)
        (root / f"{kind}.paths.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def write_file(
    root: Path, settings: SampleWebSettings, file: int, beat: Callable[[int], None]
) -> tuple[int, int]:
    """Write one WARC and its WAT; the numbers of pages and of `<img>` tags."""
    warc_name, wat_name = names(settings, file)
    date = _DATES[_crawl(settings, file)]
    for name in (warc_name, wat_name):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    page_count = images = 0
    with (root / warc_name).open("xb") as warc, (root / wat_name).open("xb") as wat:
        writer = _Writer(warc, wat, f"{settings.seed}/{file}", warc_name.rpartition("/")[2])
        writer.info(date.format(0, 0))
        for page in pages(settings, file):
            writer.page(page, date.format(page_count // 60 % 60, page_count % 60))
            page_count += 1
            images += len(page.images)
            beat(images)
    return page_count, images


def _crawl(settings: SampleWebSettings, file: int) -> int:
    """Which of the two snapshots a file belongs to."""
    return 0 if file < (settings.archive_files + 1) // 2 else 1


class _Writer:
    """Writes records to a WARC and what the WAT says of each."""

    def __init__(self, warc: BinaryIO, wat: BinaryIO, key: str, filename: str) -> None:
        self._warc, self._wat = warc, wat
        self._key, self._filename = key, filename
        self._serial = 0
        self._info = self._identity()

    def info(self, date: str) -> None:
        """The two `warcinfo` records at the head of the files."""
        fields = {
            "isPartOf": self._filename[:7],
            "publisher": "sample web",
            "description": "A made-up web of coloured shapes",
            "software": "sample_web",
            "format": "WARC File Format 1.0",
        }
        block = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode()
        head = {"WARC-Type": "warcinfo", "WARC-Date": date, "WARC-Record-ID": self._info}
        head |= {"Content-Type": "application/warc-fields", "WARC-Filename": self._filename}
        wat_head = head | {
            "WARC-Record-ID": self._identity(),
            "WARC-Filename": self._filename.replace(".gz", ".wat.gz"),
        }
        software = b"Software-Info: sample_web\r\nExtracted-Date: " + date.encode() + b"\r\n"
        self._wat.write(_member(_record(wat_head, software)))
        payload = {"WARC-Info-Metadata": fields, "Actual-Content-Type": "application/warc-fields"}
        self._both(head, block, self._filename, payload)

    def page(self, page: Page, date: str) -> None:
        """Request, response and metadata of one page."""
        host, _, path = page.url[7:].partition("/")
        shared = {"WARC-Date": date, "WARC-Warcinfo-ID": self._info}
        body = markup(page).encode()
        request = f"GET /{path} HTTP/1.1\r\nUser-Agent: {_AGENT}\r\nHost: {host}\r\n\r\n".encode()
        asked, answered = self._identity(), self._identity()
        head = {
            "WARC-Type": "request",
            **shared,
            "WARC-Record-ID": asked,
            "WARC-Concurrent-To": answered,
            "WARC-IP-Address": "192.0.2.7",
            "WARC-Target-URI": page.url,
            "Content-Type": "application/http; msgtype=request",
        }
        message = {"Method": "GET", "Path": f"/{path}", "Version": "HTTP/1.1"}
        metadata: dict[str, Any] = {"Headers": {"User-Agent": _AGENT, "Host": host}}
        metadata["Request-Message"] = message
        kind = {"Actual-Content-Type": head["Content-Type"]}
        self._both(head, request, page.url, kind | {"HTTP-Request-Metadata": metadata})

        answer = {
            "Server": "sample-web",
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": str(len(body)),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in answer.items())
        http = f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode()
        head = {
            "WARC-Type": "response",
            **shared,
            "WARC-Record-ID": answered,
            "WARC-IP-Address": "192.0.2.7",
            "WARC-Target-URI": page.url,
            "WARC-Payload-Digest": _digest(body),
            "WARC-Block-Digest": _digest(http + body),
            "WARC-Identified-Payload-Type": "text/html",
            "Content-Type": "application/http; msgtype=response",
        }
        metadata = {
            "Response-Message": {"Version": "HTTP/1.1", "Status": "200", "Reason": "OK"},
            "Headers": answer,
            "Headers-Length": str(len(http)),
            "Entity-Length": str(len(body)),
            "Entity-Digest": _digest(body),
            "HTML-Metadata": html_metadata(page),
        }
        kind = {"Actual-Content-Type": head["Content-Type"], "Trailing-Slop-Length": "4"}
        self._both(head, http + body, page.url, kind | {"HTTP-Response-Metadata": metadata})

        fields = {"fetchTimeMs": str(20 + len(body) % 300), "charset-detected": "UTF-8"}
        block = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode()
        head = {
            "WARC-Type": "metadata",
            **shared,
            "WARC-Record-ID": self._identity(),
            "WARC-Concurrent-To": answered,
            "WARC-Target-URI": page.url,
            "Content-Type": "application/warc-fields",
        }
        kind = {"Actual-Content-Type": "application/metadata-fields"}
        records = [{"Name": name, "Value": value} for name, value in fields.items()]
        about = {"WARC-Metadata-Metadata": {"Metadata-Records": records}}
        self._both(head, block, page.url, kind | about)

    def _both(self, head: dict[str, str], block: bytes, uri: str, payload: dict[str, Any]) -> None:
        """Write a WARC record, and the WAT record that describes it."""
        record = _record(head, block)
        member = _member(record)
        offset = self._warc.tell()
        self._warc.write(member)
        described = {
            "Container": {
                "Filename": self._filename,
                "Compressed": True,
                "Offset": str(offset),
                "Gzip-Metadata": {
                    "Header-Length": "10",
                    "Footer-Length": "8",
                    "Deflate-Length": str(len(member)),
                    "Inflated-Length": str(len(record)),
                    "Inflated-CRC": str(zlib.crc32(record) - (zlib.crc32(record) >> 31 << 32)),
                },
            },
            "Envelope": {
                "Format": "WARC",
                "WARC-Header-Length": str(record.index(b"\r\n\r\n") + 4),
                "Actual-Content-Length": str(len(block)),
                "Block-Digest": _digest(block),
                "WARC-Header-Metadata": head | {"Content-Length": str(len(block))},
                "Payload-Metadata": payload,
            },
        }
        about = {
            "WARC-Type": "metadata",
            "WARC-Target-URI": uri,
            "WARC-Date": head["WARC-Date"],
            "WARC-Record-ID": self._identity(),
            "WARC-Refers-To": head["WARC-Record-ID"],
            "Content-Type": "application/json",
        }
        text = json.dumps(described, ensure_ascii=False, separators=(",", ":"))
        self._wat.write(_member(_record(about, text.encode())))

    def _identity(self) -> str:
        self._serial += 1
        name = hashlib.md5(f"{self._key}/{self._serial}".encode(), usedforsecurity=False)
        return f"<urn:uuid:{uuid.UUID(bytes=name.digest(), version=4)}>"


def html_metadata(page: Page) -> dict[str, Any]:
    """The `HTML-Metadata` of a page: values as the HTML writes them, empty attributes left out."""
    head: dict[str, Any] = {"Title": page.title}
    if page.base:
        head["Base"] = page.base
    head["Metas"] = [{"charset": "utf-8"}]
    head["Link"] = [{"path": "LINK@/href", "url": "/style.css", "rel": "stylesheet"}]
    links = [{"path": "A@/href", "url": href, "text": text} for href, text in page.links]
    return {"Head": head, "Links": [*links, *_image_links(page)]}


def _image_links(page: Page) -> Iterator[dict[str, str]]:
    for image in page.images:
        link = {"path": "IMG@/src", "url": image.source}
        if image.alt:
            link["alt"] = image.alt
        if image.title:
            link["title"] = image.title
        yield link


def _record(head: dict[str, str], block: bytes) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    start = f"WARC/1.0\r\n{lines}Content-Length: {len(block)}\r\n\r\n"
    return start.encode() + block + b"\r\n\r\n"


def _member(record: bytes) -> bytes:
    return gzip.compress(record, 6, mtime=0)


def _digest(data: bytes) -> str:
    return "sha1:" + base64.b32encode(hashlib.sha1(data, usedforsecurity=False).digest()).decode()

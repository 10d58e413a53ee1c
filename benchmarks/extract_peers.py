"""How others read a WAT file, and how fast it can be read at all, for `benchmarks.extract`.

Both are told here after their published code, without what is no reading: MetaCLIP's language
identification and matching, cc2dataset's Spark, which drops equal rows over the network. What a
peer does not do and ours does is in its docstring.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pyarrow as pa
import pyarrow.parquet as pq
from fastwarc.warc import ArchiveIterator, WarcRecordType

_TEXTS = ("alt", "title", "data-image-title")
_TARGET = "WARC-Target-URI: "


def metaclip(wat: Path, out: Path) -> int:
    """MetaCLIP (`curation/parse_wat.py`): gzip by lines, json, all texts of a picture; a JSON list.

    Rows written: pictures with a text. Leaves out: damaged members, the record's bounds, `<base>`,
    canonical addresses, entities, mojibake and white space of texts, all judging of texts and
    addresses, equal texts of a picture, counts of what was dropped.
    """
    found: list[dict[str, Any]] = []
    page_url, awaited = "", False
    with gzip.open(wat) as lines:
        for raw in lines:
            try:
                line = raw.decode().strip()
            except UnicodeDecodeError:
                continue
            if line.startswith("WARC-Target-URI"):
                page_url, awaited = line[len(_TARGET) :], True
            if awaited and line.startswith("{"):
                awaited = False
                found += _metaclip_page(line, page_url)
    with out.open("w") as file:
        json.dump(found, file)
    return len(found)


def _metaclip_page(line: str, page_url: str) -> list[dict[str, Any]]:
    try:
        document = json.loads(line)
    except ValueError:
        return []
    payload = document["Envelope"]["Payload-Metadata"]
    found = []
    for link in _links(payload):
        path = link.get("path") if link else None
        if path is None or not path.startswith("IMG@/src") or "url" not in link:
            continue
        try:
            url = urljoin(page_url, link["url"])
        except ValueError:
            continue
        uuid = _metaclip_id(url)
        texts = []
        for key in _TEXTS:
            if (text := link.get(key)) is not None:
                text = text.replace("\n", " ").replace("\r", " ").strip()
                if text:
                    texts.append([key, text])
        if uuid is not None and texts:
            found.append({"url": url, "texts": texts, "uuid": uuid})
    return found


def _metaclip_id(url: str) -> str | None:
    try:
        spaceless = url.replace("\t", "").replace(" ", "")
        return hashlib.sha224(spaceless.encode()).hexdigest()[:24]
    except UnicodeEncodeError:
        return None


def _links(payload: Any) -> Any:
    """The list of a page's links, as both peers look for it."""
    said = payload.get("HTTP-Response-Metadata", {}).get("HTML-Metadata", {})
    return said.get("Links", ())


def cc2dataset(wat: Path, out: Path) -> int:
    """cc2dataset 1.5 (`main.py`): the file in memory, FastWARC, pysimdjson, `alt` only; parquet.

    Rows written: pictures with an `alt` and an address of http. Leaves out: `title`, damaged
    members (an error loses the whole file), canonical addresses, entities, mojibake and white space
    of texts, all judging of texts and addresses, counts of what was dropped.
    """
    import simdjson

    rows: list[dict[str, str]] = []
    stream = BytesIO(wat.read_bytes())
    for record in ArchiveIterator(stream, record_types=WarcRecordType.metadata, parse_http=False):
        try:
            document = simdjson.load(record.reader)
        except ValueError:
            continue
        envelope = document["Envelope"]
        links = _links(envelope["Payload-Metadata"])
        if not links:
            continue
        page_url = base = envelope["WARC-Header-Metadata"]["WARC-Target-URI"]
        said = envelope["Payload-Metadata"]["HTTP-Response-Metadata"]["HTML-Metadata"]
        if "Head" in said and "Base" in said["Head"]:
            try:
                base = urljoin(base, said["Head"]["Base"])
            except ValueError:
                pass
        pictures = [
            {"url": _absolute(link["url"], base), "alt": link["alt"]}
            for link in links
            if link.get("path", "") == "IMG@/src" and len(link.get("alt", "")) > 0
        ]
        for row in pictures:
            if row["url"].startswith(("http://", "https://")):
                row["uid"] = hashlib.md5((row["alt"] + row["url"]).encode()).hexdigest()
                row["cc_filename"] = document["Container"]["Filename"]
                row["page_url"] = page_url
                rows.append(row)
    names = ["uid", "url", "alt", "cc_filename", "page_url"]
    schema = pa.schema([(name, pa.string()) for name in names])
    pq.write_table(pa.Table.from_pylist(rows, schema), out)
    return len(rows)


def _absolute(url: str, base: str) -> str:
    if url.startswith(("http://", "https://")):
        return url
    try:
        return urljoin(base, url)
    except ValueError:
        return url


def decompression(wat: Path, out: Path) -> int:
    """The file's bytes by Python's gzip, thrown away. Rows: bytes."""
    size = 0
    with gzip.open(wat) as stream:
        while chunk := stream.read(1 << 20):
            size += len(chunk)
    return size


def fastwarc(wat: Path, out: Path) -> int:
    """The bodies of the file's metadata records by FastWARC, thrown away. Rows: records."""
    found = 0
    with wat.open("rb") as stream:
        for record in ArchiveIterator(
            stream, record_types=WarcRecordType.metadata, parse_http=False
        ):
            record.reader.read()
            found += 1
    return found

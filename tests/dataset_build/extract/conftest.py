"""Archives made by hand: every record a gzip member of its own, as crawlers write them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dataset_build.extract import STAGE, ExtractSettings
from pipeline.config import Settings
from pipeline.manifest import Manifest
from pipeline.stage import Run, Stage
from pipeline.stats import Stats

Extracted = tuple[list[dict[str, Any]], Stats]
Extract = Callable[..., Extracted]


class Root(Settings):
    """A configuration of this stage alone."""

    extract: ExtractSettings = ExtractSettings()


def record(kind: str, url: str, body: bytes) -> bytes:
    """One uncompressed WARC record."""
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n"
        f"WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:{len(body):032x}>\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def page(url: str, html: bytes, headers: str = "Content-Type: text/html") -> bytes:
    """A response record with an HTML page."""
    return record("response", url, b"HTTP/1.1 200 OK\r\n" + headers.encode() + b"\r\n\r\n" + html)


def metadata(url: str, images: list[dict[str, Any]], base: str | None = None) -> bytes:
    """A WAT record of a page with these image links."""
    links = [{"path": "A@/href", "url": "/"}, *({"path": "IMG@/src", **link} for link in images)]
    html = {"Head": {"Base": base} if base else {}, "Links": links}
    envelope = {
        "WARC-Header-Metadata": {"WARC-Target-URI": url},
        "Payload-Metadata": {"HTTP-Response-Metadata": {"HTML-Metadata": html}},
    }
    return record("metadata", url, json.dumps({"Envelope": envelope}).encode())


def members(*records: bytes) -> list[bytes]:
    """Each record compressed on its own."""
    return [gzip.compress(one) for one in records]


@pytest.fixture
def extract(tmp_path: Path, run_stage: Callable[[Run, Stage], list[Manifest]]) -> Extract:
    """`extract(wat=[...], min_words=1, ...)`: the candidates and the statistics of a run."""

    def run_extract(**settings: Any) -> Extracted:
        run = Run(tmp_path / "run", Root(extract=ExtractSettings(**settings)))
        manifests = run_stage(run, STAGE)
        rows = []
        for reference in run.find("extract:candidates-*"):
            rows += pq.read_table(run.path(reference)).to_pylist()
        return rows, sum((m.stats for m in manifests), Stats())

    return run_extract

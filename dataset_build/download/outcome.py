"""What became of one address: the row of `records.FETCHED` that its pairs share, and its counts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from dataset_build.download import REASONS
from pipeline.stats import Stats

NO_OUTCOME: dict[str, Any] = {
    "status": "",
    "error": "",
    "http_status": 0,
    "final_url": "",
    "fetched": 0,
    "bytes": 0,
    "format": "",
    "sha256": bytes(32),
    "width": 0,
    "height": 0,
    "original_width": 0,
    "original_height": 0,
    "blurred": 0,
    "staged": "",
    "staged_offset": 0,
    "staged_bytes": 0,
    "staged_sha256": bytes(32),
}
"""The columns of `records.FETCHED` that are an outcome, of an address that has none."""

_DECODER = {
    "image too small": "too_small",
    "image area too large": "too_many_pixels",
    "aspect ratio too large": "too_long",
}
"""Our names for img2dataset's; the true size may differ from what the header claimed."""


@dataclass(frozen=True)
class Fetched:
    """What became of one address before its picture was decoded."""

    reason: str
    detail: str
    status: int
    final_url: str
    received: int
    requests: int
    sha256: bytes = bytes(32)
    bytes: int = 0
    kind: str = ""
    time: int = 0
    """When it ended, Unix seconds."""
    blurred: int = 0
    """How much was found in it that shall not be recognised."""


def outcome(url: str, fetched: Fetched, stored: bytes | None, meta: dict[str, Any]) -> Any:
    """What is to be remembered of an address: `NO_OUTCOME`'s columns but for where it is staged,
    its address, and what it cost.

    `stored` is the picture as it will be stored, `meta` what img2dataset says of it, or why there
    is none.
    """
    reason, detail = fetched.reason, fetched.detail
    if stored is None and reason == "ok":
        detail = str(meta["error_message"])[:200]
        reason = _DECODER.get(detail, "undecodable")
    assert reason == "ok" or reason in REASONS, reason
    result = {
        **NO_OUTCOME,
        "url": url,
        "status": reason,
        "error": detail,
        "http_status": fetched.status,
        "final_url": fetched.final_url,
        "fetched": fetched.time,
        "bytes": fetched.bytes,
        "format": fetched.kind,
        "sha256": fetched.sha256,
        "requests": fetched.requests,
        "received": fetched.received,
    }
    if stored is not None:
        sizes = ("width", "height", "original_width", "original_height")
        result |= {name: meta[name] for name in sizes}
        result |= {
            "blurred": fetched.blurred,
            "staged_bytes": len(stored),
            "staged_sha256": hashlib.sha256(stored).digest(),
        }
    return {name: result[name] for name in result if name not in ("staged", "staged_offset")}


def count(stats: Stats, outcome: dict[str, Any]) -> None:
    """Add an address to the task's account."""
    stats.counts["addresses"] += 1
    stats.counts["requests"] += outcome["requests"]
    stats.counts["bytes_received"] += outcome["received"]
    stats.observe("http_status", outcome["http_status"] or "none")
    if outcome["status"] == "ok":
        stats.counts["pictures"] += 1
        stats.counts["picture_bytes"] += outcome["bytes"]
        if outcome["blurred"]:
            stats.counts["pictures_blurred"] += 1
        stats.observe("format", outcome["format"])
        short = min(outcome["original_width"], outcome["original_height"])
        stats.observe("original_smaller_side", f"{1 << (short.bit_length() - 1)}+")
        stats.observe("file_bytes", f"{1 << (outcome['bytes'].bit_length() - 1)}+")

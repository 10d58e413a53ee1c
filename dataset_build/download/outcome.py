"""What became of one address: the row of `records.FETCHED` that its pairs share, and its counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_build.download import REASONS
from pipeline.manifest import Stats

if TYPE_CHECKING:
    from dataset_build.download.staging import Picture


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
    "staged": "",
    "staged_offset": 0,
    "staged_bytes": 0,
    "staged_sha256": bytes(32),
}
"""The columns of `records.FETCHED` that are an outcome, of an address that has none."""


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


def outcome_row(
    reason: str, detail: str, outcome: Fetched, picture: Picture | None, tar: Path, offset: int
) -> dict[str, Any]:
    """A row of `records.FETCHED` but for the pair's own columns."""
    assert reason == "ok" or reason in REASONS, reason
    result = {
        **NO_OUTCOME,
        "status": "ok" if picture else reason,
        "error": detail,
        "http_status": outcome.status,
        "final_url": outcome.final_url,
        "fetched": outcome.time,
        "bytes": outcome.bytes,
        "format": outcome.kind,
        "sha256": outcome.sha256,
    }
    if picture:
        result |= {
            "width": picture.width,
            "height": picture.height,
            "original_width": picture.original_width,
            "original_height": picture.original_height,
            "staged": tar.name,
            "staged_offset": offset,
            "staged_bytes": picture.stored_bytes,
            "staged_sha256": picture.digest,
        }
    return result


def count(stats: Stats, outcome: Fetched, picture: Picture | None) -> None:
    """Add an address to the task's account."""
    stats.counts["addresses"] += 1
    stats.counts["requests"] += outcome.requests
    stats.counts["bytes_received"] += outcome.received
    stats.observe("http_status", outcome.status or "none")
    if picture:
        stats.counts["pictures"] += 1
        stats.counts["picture_bytes"] += outcome.bytes
        stats.observe("format", outcome.kind)
        short = min(picture.original_width, picture.original_height)
        stats.observe("original_smaller_side", f"{1 << (short.bit_length() - 1)}+")
        stats.observe("file_bytes", f"{1 << (outcome.bytes.bit_length() - 1)}+")


def decoder_reason(failure: str | None) -> str:
    """Our name for img2dataset's; the true size may differ from what the header claimed."""
    names = {
        "image too small": "too_small",
        "image area too large": "too_many_pixels",
        "aspect ratio too large": "too_long",
    }
    return names.get(failure or "", "undecodable")

"""One download task: a range of uids becomes `staged-*.tar` and one outcome per pair.

An address that several pairs of the task share is fetched once. What img2dataset says it wrote is
not believed: the tar is read back and compared with what was handed to it, picture by picture.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build import records, uid_range
from dataset_build.download import REASONS, DownloadSettings, probe
from dataset_build.download.connection import Detour
from dataset_build.download.transport import Transport
from pipeline.manifest import Damaged, Stats
from pipeline.stage import Attempt

if TYPE_CHECKING:
    from dataset_build.download.staging import Ledger, Picture


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


def fetch_shard(attempt: Attempt) -> Stats:
    """Fetch, resize, stage and verify the task's pairs. Raises `Stopped` if asked to stop."""
    settings: DownloadSettings = attempt.settings
    part, parts = attempt.task.params["part"], attempt.task.params["parts"]
    first, last = uid_range.bounds(part, parts)
    columns = ("uid", "url", "text")
    rows = uid_range.read(attempt.inputs(), first, last, columns, attempt.stop.check)
    pairs = rows.to_pylist()
    addresses: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        addresses[pair["url"]].append(index)

    tar = attempt.folder / f"staged-{part:05d}.tar"
    fetched: dict[int, Fetched] = {}
    if pairs:
        ledger = _stage(attempt, settings, pairs, addresses, fetched, tar)
        attempt.stop.check()
        _verify(tar, ledger)
    else:
        ledger = None
        tarfile.open(tar, "w").close()
    stats = Stats(rows_in=len(pairs))
    outcomes: list[dict[str, Any]] = [{}] * len(pairs)
    for row, indices in enumerate(addresses.values()):
        assert ledger is not None
        outcome, failure = fetched[row], ledger.failed.get(row)
        picture = ledger.stored.get(row)
        _count(stats, outcome, picture)
        reason, detail = outcome.reason, outcome.detail
        if picture is None and reason == "ok":
            reason, detail = _decoder_reason(failure), failure or ""
        for index in indices:
            outcomes[index] = _record(pairs[index]["uid"], reason, detail, outcome, picture, tar)
        if picture is None:
            stats.drop(reason, len(indices))
        else:
            stats.rows_out += len(indices)
    table = pa.Table.from_pylist(outcomes, schema=records.FETCHED)
    target = attempt.folder / f"fetched-{part:05d}.parquet"
    pq.write_table(table, target, compression="zstd", row_group_size=1 << 16)
    return stats


def _stage(
    attempt: Attempt,
    settings: DownloadSettings,
    pairs: list[dict[str, Any]],
    addresses: dict[str, list[int]],
    fetched: dict[int, Fetched],
    tar: Path,
) -> Ledger:
    """Run img2dataset over the addresses; fills `fetched`, leaves `tar`."""
    # Read when the libraries load. albumentations would ask a package index for its newest version;
    # OpenCV's own limit stands behind ours.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(settings.max_pixels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations among its dependencies are not ours to mend
        from dataset_build.download import staging

    groups = [
        [staging.Pair(pairs[index]["uid"].hex(), pairs[index]["text"]) for index in indices]
        for indices in addresses.values()
    ]
    total = len(groups)
    ledger = staging.Ledger(groups, written=lambda done: attempt.progress(done, total, "addresses"))
    table = pa.table({"row": pa.array(range(total), pa.int64()), "url": list(addresses)})
    source = attempt.folder / "addresses.feather"
    with pa.OSFile(str(source), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)

    setting = os.environ.get("OPENWIT_CONNECT_TO", "")
    stopping = attempt.stop.__bool__
    transport = Transport(settings, Detour.parse(setting) if setting else None, stopping)

    def fetch(address: tuple[int, str]) -> tuple[int, io.BytesIO | None, str | None]:
        row, url = address
        if stopping():
            return row, None, "stopped"
        fetched[row], body = _fetch(transport, settings, url)
        if fetched[row].reason != "ok":
            return row, None, fetched[row].reason
        return row, io.BytesIO(body), None

    downloader = staging.GuardedDownloader(
        fetch,
        sample_writer_class=lambda *arguments: staging.FailStopWriter(ledger, *arguments),
        resizer=staging.EightBitResizer(
            settings.image_size,
            settings.resize_mode,
            settings.resize_only_if_bigger,
            encode_quality=settings.encode_quality,
            min_image_size=settings.min_side,
            max_image_area=settings.max_pixels,
            max_aspect_ratio=settings.max_aspect_ratio,
        ),
        thread_count=min(settings.threads, total),
        save_caption=True,
        extract_exif=False,
        output_folder=str(attempt.folder),
        column_list=["row", "url"],
        timeout=settings.timeout_s,
        number_sample_per_shard=max(total, 10),
        oom_shard_count=5,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    try:
        downloader.download_shard((0, str(source)))
    finally:
        transport.close()
    (attempt.folder / "00000.tar").rename(tar)
    for leftover in ("00000.parquet", "00000_stats.json"):
        (attempt.folder / leftover).unlink()
    return ledger


def _fetch(transport: Transport, settings: DownloadSettings, url: str) -> tuple[Fetched, bytes]:
    """One address, and the checks that come before a decoder sees it. Never raises."""
    try:
        answer = transport.fetch(url)
    except Exception as error:  # one address must never cost its neighbours
        return Fetched("fetch_failed", f"{type(error).__name__}: {error}"[:200], 0, url, 0, 0), b""
    reason, detail, kind = answer.reason, answer.detail, ""
    sha256 = bytes(32)
    if reason == "ok":
        sha256 = hashlib.sha256(answer.body).digest()
        try:
            found = probe.probe(answer.body)
            kind = found.kind
            reason, detail = _size_reason(settings, found)
        except probe.NotPicture as refused:
            reason, detail = refused.reason, str(refused)
    fetched = Fetched(
        reason,
        detail,
        answer.status,
        answer.url,
        answer.received,
        answer.requests,
        sha256,
        len(answer.body),
        kind,
    )
    return fetched, answer.body


def _size_reason(settings: DownloadSettings, found: probe.Probe) -> tuple[str, str]:
    short, long = sorted((found.width, found.height))
    size = f"{found.width} x {found.height}"
    if short * long > settings.max_pixels:
        return "too_many_pixels", size
    if short < settings.min_side:
        return "too_small", size
    if long > short * settings.max_aspect_ratio:
        return "too_long", size
    return "ok", ""


def _decoder_reason(failure: str | None) -> str:
    """Our name for img2dataset's; the true size may differ from what the header claimed."""
    names = {
        "image too small": "too_small",
        "image area too large": "too_many_pixels",
        "aspect ratio too large": "too_long",
    }
    return names.get(failure or "", "undecodable")


def _verify(tar: Path, ledger: Ledger) -> None:
    """Read the tar back; raises `Damaged` unless it holds exactly what the ledger says."""
    claimed = {
        pair.uid: picture.digest
        for row, picture in ledger.stored.items()
        for pair in ledger.pairs[row]
    }
    if (rows := len(ledger.stored) + len(ledger.failed)) != len(ledger.pairs):
        raise Damaged(f"{tar}: {rows} of {len(ledger.pairs)} addresses have an outcome")
    found = 0
    with tarfile.open(tar, "r:") as stream:
        for member in stream:
            uid, _, extension = member.name.partition(".")
            if extension != "jpg":
                continue
            content = stream.extractfile(member)
            data = content.read() if content else b""
            if claimed.get(uid) != hashlib.sha256(data).digest():
                raise Damaged(f"{tar}: {member.name} is not what was written")
            found += 1
    if found != len(claimed):
        raise Damaged(f"{tar}: {found} pictures read, {len(claimed)} written")


def _record(
    uid: bytes, reason: str, detail: str, outcome: Fetched, picture: Picture | None, tar: Path
) -> dict[str, Any]:
    assert reason == "ok" or reason in REASONS, reason
    return {
        "uid": uid,
        "status": "ok" if picture else reason,
        "error": detail,
        "http_status": outcome.status,
        "final_url": outcome.final_url,
        "sha256": outcome.sha256,
        "width": picture.width if picture else 0,
        "height": picture.height if picture else 0,
        "original_width": picture.original_width if picture else 0,
        "original_height": picture.original_height if picture else 0,
        "staged": tar.name if picture else "",
    }


def _count(stats: Stats, outcome: Fetched, picture: Picture | None) -> None:
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

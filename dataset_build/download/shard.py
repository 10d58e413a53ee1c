"""One download task: a range of uids becomes `staged-*.tar` and one outcome per pair.

An address that several pairs share is fetched once, and its picture staged once. What img2dataset
says it wrote is not believed: the tar is read back and compared with what was handed to it, picture
by picture.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from dataset_build import dedup, records, uid_range
from dataset_build.download import STAGE, DownloadSettings, probe
from dataset_build.download.connection import Detour
from dataset_build.download.earlier import Earlier, metadata
from dataset_build.download.outcome import (
    NO_OUTCOME,
    Fetched,
    count,
    decoder_reason,
    outcome_row,
)
from dataset_build.download.transport import Transport
from pipeline.manifest import Damaged, Stats
from pipeline.stage import Attempt

if TYPE_CHECKING:
    from dataset_build.download.staging import Ledger


def fetch_shard(attempt: Attempt) -> Stats:
    """Fetch, resize, stage and verify the task's pairs. Raises `Stopped` if asked to stop."""
    settings: DownloadSettings = attempt.settings
    part, parts = attempt.task.params["part"], attempt.task.params["parts"]
    first, last = uid_range.bounds(part, parts)
    marks = metadata(settings, STAGE.version)
    earlier = Earlier(attempt, first, last, marks)
    pairs = _pairs(attempt, earlier, first, last)
    addresses: dict[bytes, dict[str, Any]] = {}
    for pair in pairs:
        if pair["uid"][:8] not in earlier.by_address:
            addresses.setdefault(pair["uid"][:8], pair)
    stats = Stats(rows_in=len(pairs))
    outcomes = _fetch_all(attempt, settings, addresses, stats)

    fetched = []
    for pair in pairs:
        address = pair["uid"][:8]
        known = earlier.by_uid.get(pair["uid"]) or earlier.by_address.get(address)
        stats.counts["pairs_known"] += known is not None
        outcome = known or outcomes[address]
        if pair["url"] != (known or addresses[address])["url"]:  # 1 pair in 10⁹, among 10¹⁰
            outcome = {**NO_OUTCOME, "status": "fetch_failed", "error": "the hash is taken"}
        record = {name: pair[name] for name in (*records.TEXTS.names, "texts")}
        fetched.append({**outcome, **record})
        if outcome["status"] == "ok":
            stats.rows_out += 1
        else:
            stats.drop(outcome["status"])
    wanted = {pair["uid"] for pair in pairs}
    unused = [row for uid, row in sorted(earlier.by_uid.items()) if uid not in wanted]
    for row in (*fetched, *unused):
        if row["staged"] in earlier.tars:
            earlier.keep(row["staged"])
    digits = max(5, len(str(parts)))
    name = f"{part:0{digits}d}-of-{parts:0{digits}d}.parquet"
    for kind, rows in (("fetched", fetched), ("unused", unused)):
        if rows or kind == "fetched":
            table = pa.Table.from_pylist(rows, schema=records.FETCHED.with_metadata(marks))
            path = attempt.folder / f"{kind}-{name}"
            pq.write_table(table, path, compression="zstd", row_group_size=1 << 16)
    return stats


def _pairs(attempt: Attempt, earlier: Earlier, first: bytes, last: bytes) -> list[dict[str, Any]]:
    """The selected pairs with their records, sorted by uid.

    A record is read from `dedup` only if no earlier download has it from the very same file.
    """
    task, check = attempt.task, attempt.stop.check
    paths = dict(zip(task.reads, attempt.inputs(), strict=True))
    selected = list(paths.values())[: task.params["groups"]]
    rows = uid_range.read(selected, first, last, ("uid", "snapshot"), check)
    groups = dedup.group_of(attempt.run, rows["uid"]).tolist()
    new: dict[str, list[bytes]] = defaultdict(list)
    records_of: dict[bytes, dict[str, Any]] = {}
    identities = {name: attempt.run.identity(name) for name in paths}
    for row, group in zip(rows.to_pylist(), groups, strict=True):
        holder = f"dedup:texts-{row['snapshot']}-{group:05d}.parquet"
        known = earlier.by_uid.get(row["uid"])
        if known is not None and known["texts"] == identities[holder]:
            records_of[row["uid"]] = known
        else:
            new[holder].append(row["uid"])
    for holder, uids in new.items():
        among = pa.array(uids, records.UID)
        names = records.TEXTS.names
        table = uid_range.read([paths[holder]], uids[0], uids[-1], names, check, among)
        for row in table.to_pylist():
            records_of[row["uid"]] = {**row, "texts": identities[holder]}
    return [records_of[uid] for uid in rows["uid"].to_pylist()]


def _fetch_all(
    attempt: Attempt,
    settings: DownloadSettings,
    addresses: dict[bytes, dict[str, Any]],
    stats: Stats,
) -> dict[bytes, dict[str, Any]]:
    """Fetch addresses into one tar; what became of each."""
    if not addresses:
        return {}
    # Another list of addresses is another tar, so earlier ones can stand beside it.
    key = xxhash.xxh3_64_hexdigest(b"".join(sorted(addresses)))
    tar = attempt.folder / f"staged-{attempt.task.params['part']:05d}-{key}.tar"
    fetched: dict[int, Fetched] = {}
    ledger = _stage(attempt, settings, addresses, fetched, tar)
    attempt.stop.check()
    offsets = _verify(tar, ledger)
    outcomes = {}
    for row, address in enumerate(addresses):
        outcome, failure = fetched[row], ledger.failed.get(row)
        picture = ledger.stored.get(row)
        count(stats, outcome, picture)
        reason, detail = outcome.reason, outcome.detail
        if picture is None and reason == "ok":
            reason, detail = decoder_reason(failure), failure or ""
        offset = offsets[address] if picture else 0
        outcomes[address] = outcome_row(reason, detail, outcome, picture, tar, offset)
    return outcomes


def _stage(
    attempt: Attempt,
    settings: DownloadSettings,
    addresses: dict[bytes, dict[str, Any]],
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

    pictures = [staging.Sample(key.hex(), pair["text"]) for key, pair in addresses.items()]
    total = len(pictures)
    ledger = staging.Ledger(
        pictures, written=lambda done: attempt.progress(done, total, "addresses")
    )
    urls = [pair["url"] for pair in addresses.values()]
    table = pa.table({"row": pa.array(range(total), pa.int64()), "url": urls})
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
        detail = f"{type(error).__name__}: {error}"[:200]
        return Fetched("fetch_failed", detail, 0, url, 0, 0, time=int(time.time())), b""
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
        int(time.time()),
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


def _verify(tar: Path, ledger: Ledger) -> dict[bytes, int]:
    """Read the tar back: where each address's picture lies in it.

    Raises `Damaged` unless it holds exactly what the ledger says.
    """
    claimed = {ledger.samples[row].key: p.digest for row, p in ledger.stored.items()}
    if (rows := len(ledger.stored) + len(ledger.failed)) != len(ledger.samples):
        raise Damaged(f"{tar}: {rows} of {len(ledger.samples)} addresses have an outcome")
    offsets = {}
    with tarfile.open(tar, "r:") as stream:
        for member in stream:
            key, _, extension = member.name.partition(".")
            if extension != "jpg":
                continue
            content = stream.extractfile(member)
            data = content.read() if content else b""
            if claimed.get(key) != hashlib.sha256(data).digest():
                raise Damaged(f"{tar}: {member.name} is not what was written")
            offsets[bytes.fromhex(key)] = member.offset_data
    if len(offsets) != len(claimed):
        raise Damaged(f"{tar}: {len(offsets)} pictures read, {len(claimed)} written")
    return offsets

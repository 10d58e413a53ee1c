"""One download task: a range of uids becomes `staged-*.tar` and one outcome per pair.

An address that several pairs share is fetched once, and its picture staged once. What img2dataset
says it wrote is not believed: the tar is read back and compared with what was handed to it, picture
by picture.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from dataset_build import records, removed, uid_range
from dataset_build.download import LISTED, STAGE, DownloadSettings, expected, guard, pairs, probe
from dataset_build.download.connection import Detour
from dataset_build.download.earlier import MARK, Earlier, metadata
from dataset_build.download.journal import Journal, Unfinished, share
from dataset_build.download.outcome import NO_OUTCOME, Fetched, count, outcome
from dataset_build.download.transport import Transport
from dataset_build.lists import Lists
from dataset_build.removed import Tombstones
from pipeline.manifest import Damaged, Stats
from pipeline.stage import Attempt

Address = dict[str, Any]
"""One pair of an address: its url is what is asked for."""


def fetch_shard(attempt: Attempt) -> Stats:
    """Fetch, resize, stage and verify the task's pairs. Raises `Stopped` if asked to stop."""
    settings: DownloadSettings = attempt.settings
    part, parts = attempt.task.params["part"], attempt.task.params["parts"]
    first, last = uid_range.bounds(part, parts)
    known_bytes = [attempt.run.identity(name) for name in expected(attempt.run)]
    marks = metadata(settings, STAGE.version, known_bytes)
    earlier = Earlier(attempt, first, last, marks)
    lists, tombstones = Lists.of(attempt), Tombstones(attempt.run.folder)
    selected = pairs.selected(attempt, earlier, first, last)
    gone = set()
    for pair in selected:
        known = earlier.by_uid.get(pair["uid"]) or earlier.by_address.get(pair["uid"][:8])
        if tombstones.cover(pair, known):
            gone.add(pair["uid"])
            if known and known["staged"] in earlier.tars:
                earlier.keep(known["staged"])  # else nobody finds the picture that is in it
        elif known and not _is_as_listed(known, lists):
            earlier.forget(pair["uid"])
    addresses: dict[bytes, Address] = {}
    for pair in selected:
        if pair["uid"] not in gone and pair["uid"][:8] not in earlier.by_address:
            addresses.setdefault(pair["uid"][:8], pair)
    stats = Stats(rows_in=len(selected))
    outcomes = _fetch_all(attempt, addresses, marks, lists, tombstones, stats)

    fetched = []
    for pair in selected:
        address = pair["uid"][:8]
        if pair["uid"] in gone:
            row = {**NO_OUTCOME, **earlier.by_uid.get(pair["uid"], {}), **pair}
            fetched.append(removed.redacted(row, records.FETCHED.names))
            stats.drop(removed.STATUS)
            continue
        known = earlier.by_uid.get(pair["uid"]) or earlier.by_address.get(address)
        stats.counts["pairs_known"] += known is not None
        row = known or outcomes[address]
        if pair["url"] != row["url"]:  # 1 pair in 10⁹, among 10¹⁰
            row = {**NO_OUTCOME, "status": "fetch_failed", "error": "the hash is taken"}
        row = {**row, **{name: pair[name] for name in (*records.TEXTS.names, "texts")}}
        if row["status"] == removed.STATUS:  # as its file showed
            row = removed.redacted(row, records.FETCHED.names)
        fetched.append(row)
        if row["status"] == "ok":
            stats.rows_out += 1
        else:
            stats.drop(row["status"])
    assert len({row["uid"] for row in fetched}) == stats.rows_in, "an outcome for every pair"
    wanted = {pair["uid"] for pair in selected}
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


def _is_as_listed(known: dict[str, Any], lists: Lists) -> bool:
    """Whether an outcome is what the lists say by now; an address that leads to a listed one is
    as good as listed."""
    reason = lists.reason_of_address(known["url"]) or lists.reason_of_address(known["final_url"])
    return reason == (known["status"] if known["status"] in LISTED else "")


def _fetch_all(
    attempt: Attempt,
    addresses: dict[bytes, Address],
    marks: dict[bytes, bytes],
    lists: Lists,
    tombstones: Tombstones,
    stats: Stats,
) -> dict[bytes, dict[str, Any]]:
    """Fetch addresses into one tar; what became of each."""
    if not addresses:
        return {}
    # Another list of addresses is another tar, so earlier ones can stand beside it.
    key = xxhash.xxh3_64_hexdigest(b"".join(sorted(addresses)))
    path = attempt.folder / f"staged-{attempt.task.params['part']:05d}-{key}.tar"
    mark = marks[MARK].decode()[:16]
    with Unfinished(attempt, mark, addresses) as unfinished, Journal(path) as journal:
        share(attempt, path, mark)
        ended = {
            address: known
            for address, known in unfinished.outcomes.items()
            if _is_as_listed(known, lists)
            and not tombstones.cover_file(known["sha256"], known["final_url"])
        }
        left = {a: pair for a, pair in addresses.items() if a not in ended}
        stats.counts["addresses_resumed"] = len(addresses) - len(left)
        if left:
            _stage(attempt, left, journal, lists, tombstones, len(addresses))
        attempt.stop.check()
        for address, known in ended.items():
            journal.end(address, known, unfinished.picture(address))
    outcomes = {}
    for address, (known, offset) in journal.verified().items():
        count(stats, known)
        staged = {"staged": path.name, "staged_offset": offset} if known["status"] == "ok" else {}
        outcomes[address] = {**NO_OUTCOME, **known, **staged}
    if outcomes.keys() != addresses.keys():
        raise Damaged(f"{path}: {len(outcomes)} of {len(addresses)} addresses have an outcome")
    return outcomes


def _stage(
    attempt: Attempt,
    addresses: dict[bytes, Address],
    journal: Journal,
    lists: Lists,
    tombstones: Tombstones,
    total: int,
) -> None:
    """Run img2dataset over the addresses; each ends in the journal, unless a stop is asked for."""
    settings: DownloadSettings = attempt.settings
    # Read when the libraries load. albumentations would ask a package index for its newest version;
    # OpenCV's own limit stands behind ours.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(settings.max_pixels))
    with warnings.catch_warnings(), absent("torch"):  # a task needs 470 MB less without it
        warnings.simplefilter("ignore")  # deprecations among its dependencies are not ours to mend
        from dataset_build.download import staging

    hashes = list(addresses)
    urls = [pair["url"] for pair in addresses.values()]
    table = pa.table({"row": pa.array(range(len(urls)), pa.int64()), "url": urls})
    source = attempt.folder / "addresses.feather"
    with pa.OSFile(str(source), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)

    def stopping() -> bool:
        return bool(attempt.stop) or journal.failed

    setting = os.environ.get("OPENWIT_CONNECT_TO", "")
    detour = Detour.parse(setting) if setting else None
    folder = attempt.run.stage_folder("download")
    transport = Transport(settings, detour, stopping, lists, folder)
    digests = pairs.expected_digests(attempt, hashes[0] + bytes(8), hashes[-1] + b"\xff" * 8)
    fetched: dict[int, Fetched] = {}
    done = total - len(addresses)
    attempt.progress(done, total, "addresses")

    def fetch(address: tuple[int, str]) -> tuple[int, io.BytesIO | None, str | None]:
        row, url = address
        if stopping():
            return row, None, "stopped"
        fetched[row], body = _fetch(transport, settings, tombstones, url, digests.get(hashes[row]))
        if fetched[row].reason != "ok":
            return row, None, fetched[row].reason
        return row, io.BytesIO(body), None

    def end(row: int, stored: bytes | None, meta: dict[str, Any]) -> None:
        nonlocal done
        result = fetched.pop(row, None)
        # A stop cuts transfers short, and their retries: such an address has not ended.
        if result is None or (result.reason != "ok" and stopping()):
            return
        journal.end(hashes[row], outcome(urls[row], result, stored, meta), stored)
        done += 1
        attempt.progress(done, total, "addresses")

    downloader = staging.GuardedDownloader(
        fetch,
        sample_writer_class=lambda *arguments: staging.FailStopWriter(end),
        resizer=staging.EightBitResizer(
            settings.image_size,
            settings.resize_mode,
            settings.resize_only_if_bigger,
            encode_quality=settings.encode_quality,
            min_image_size=settings.min_side,
            max_image_area=settings.max_pixels,
            max_aspect_ratio=settings.max_aspect_ratio,
        ),
        thread_count=min(settings.threads, len(urls)),
        save_caption=False,
        extract_exif=False,
        output_folder=str(attempt.folder),
        column_list=["row", "url"],
        timeout=settings.timeout_s,
        number_sample_per_shard=max(len(urls), 10),
        oom_shard_count=5,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    try:
        with guard.confined(settings, attempt.run.folder, len(addresses)):
            downloader.download_shard((0, str(source)))
    finally:
        transport.close()
    (attempt.folder / "00000_stats.json").unlink()


@contextmanager
def absent(name: str) -> Iterator[None]:
    """Let what is imported do without an optional package, unless that is there already.

    webdataset loads torch if it can, and uses it for nothing that a download does.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _fetch(
    transport: Transport,
    settings: DownloadSettings,
    tombstones: Tombstones,
    url: str,
    digests: Collection[bytes] | None,
) -> tuple[Fetched, bytes]:
    """One address, and the checks that come before a decoder sees it. Never raises.

    Of `digests`, if there are any, the SHA-256 of the file must be one.
    """
    try:
        answer = transport.fetch(url)
    except Exception as error:  # one address must never cost its neighbours
        detail = f"{type(error).__name__}: {error}"[:200]
        return Fetched("fetch_failed", detail, 0, url, 0, 0, time=int(time.time())), b""
    reason, detail, kind = answer.reason, answer.detail, ""
    sha256 = bytes(32)
    if reason == "ok":
        sha256 = hashlib.sha256(answer.body).digest()
        if tombstones.cover_file(sha256, answer.url):
            return Fetched(removed.STATUS, "", answer.status, "", answer.received, answer.requests,
                           sha256, time=int(time.time())), b""  # fmt: skip
    if reason == "ok" and digests is not None and sha256 not in digests:
        reason, detail = "changed", f"SHA-256 {sha256.hex()}"
    if reason == "ok":
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

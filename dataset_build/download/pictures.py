"""Addresses become pictures: img2dataset is run over them, with our transport and our journal.

An address ends by an answer, or because it is not asked. Whatever else goes wrong is no address's
doing: the first such error ends the attempt, and nothing that came after it is believed.
"""

from __future__ import annotations

import gc
import hashlib
import io
import os
import sys
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dataset_build import functions, removed
from dataset_build.download import DownloadSettings, guard, pairs, probe
from dataset_build.download.connection import Detour
from dataset_build.download.deaths import DETAIL, Deaths
from dataset_build.download.journal import Journal
from dataset_build.download.outcome import Fetched, outcome
from dataset_build.download.silence import Silence
from dataset_build.download.transport import Transport
from dataset_build.lists import Lists
from dataset_build.removed import Tombstones
from pipeline.stage import Attempt

Address = dict[str, Any]
"""One pair of an address: its url is what is asked for."""


def stage(
    attempt: Attempt,
    addresses: dict[bytes, Address],
    journal: Journal,
    lists: Lists,
    tombstones: Tombstones,
    total: int,
) -> None:
    """Ask for the addresses; each ends in the journal, unless a stop is asked for.

    `total` counts those that had ended before too. Raises what goes wrong here, and `NoNetwork`.
    """
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

    find = None
    if settings.blur:
        find = functions.load("download.blur", settings.blur, attempt.task.params["blur"])
    failures: list[BaseException] = []

    def stopping() -> bool:
        return bool(attempt.stop or failures)

    setting = os.environ.get("OPENWIT_CONNECT_TO", "")
    detour = Detour.parse(setting) if setting else None
    folder = attempt.run.stage_folder("download")
    transport = Transport(settings, detour, stopping, lists, folder)
    digests = pairs.expected_digests(attempt, hashes[0] + bytes(8), hashes[-1] + b"\xff" * 8)
    threads = min(settings.threads, len(urls))
    silence, deaths = Silence(threads), Deaths(attempt.partial, attempt.folder.name)
    fetched: dict[int, Fetched] = {}
    done = total - len(addresses)
    attempt.progress(done, total, "addresses")

    @contextmanager
    def noted() -> Iterator[None]:
        """img2dataset would print an error and carry on, or wait for ever for its threads."""
        try:
            yield
        except BaseException as failure:
            failures.append(failure)

    def fetch(address: tuple[int, str]) -> tuple[int, io.BytesIO | None, str | None]:
        row, url = address
        with noted():
            if not stopping():
                result, body = _fetch(
                    transport, settings, tombstones, url, digests.get(hashes[row])
                )
                if result.reason == "ok" and hashes[row] in deaths.condemned:
                    result = replace(result, reason="undecodable", detail=DETAIL)
                fetched[row] = result
                if result.reason == "ok":
                    return row, staging.File(body, row), None
                return row, None, result.reason
        return row, None, "stopped"

    def resize(file: staging.File, boxes: object = None) -> Any:
        with noted(), deaths.decoding(hashes[file.row]):
            result = resizer(file)
            if len(resizer.boxes):
                fetched[file.row] = replace(fetched[file.row], blurred=len(resizer.boxes))
            return result
        return None, None, None, None, None, "stopped"

    def end(row: int, stored: bytes | None, meta: dict[str, Any]) -> None:
        nonlocal done
        result = fetched.pop(row, None)
        # A stop cuts transfers short, and their retries: such an address has not ended.
        if result is None or failures or (result.reason != "ok" and stopping()):
            return
        with noted():
            ended = hashes[row], outcome(urls[row], result, stored, meta), stored
            for each in silence.after(ended):
                journal.end(*each)
            done += 1
            attempt.progress(done, total, "addresses")

    resizer = staging.EightBitResizer(
        settings.image_size,
        settings.resize_mode,
        settings.resize_only_if_bigger,
        encode_quality=settings.encode_quality,
        min_image_size=settings.min_side,
        max_image_area=settings.max_pixels,
        max_aspect_ratio=settings.max_aspect_ratio,
        find=find,
    )
    downloader = staging.GuardedDownloader(
        fetch,
        sample_writer_class=lambda *arguments: staging.Writer(end),
        resizer=resize,
        thread_count=threads,
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
        with unscanned(), deaths, guard.confined(settings, attempt.run.folder, len(addresses)):
            downloader.download_shard((0, str(source)))
        if failures:
            raise failures[0]
    finally:
        transport.close()
    attempt.stop.check()
    for each in silence.rest():
        journal.end(*each)
    (attempt.folder / "00000_stats.json").unlink()


@contextmanager
def unscanned() -> Iterator[None]:
    """Let the garbage collector leave alone what there is by now: the libraries, for the most part.

    It would look through them again and again; to do so took a thirtieth of the time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
    """One address, and the checks that come before a decoder sees it.

    Of `digests`, if there are any, the SHA-256 of the file must be one.
    """
    answer = transport.fetch(url)
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

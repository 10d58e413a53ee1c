from __future__ import annotations

import errno
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from dataset_build import download, records
from dataset_build.download import DownloadSettings, shard
from pipeline.manifest import Damaged, Manifest, Stats
from pipeline.stage import Attempt, Run
from pipeline.stop import StopFlag, Stopped

RunStage = Callable[..., list[Manifest]]


def uid_of(url: str, text: str) -> bytes:
    return xxhash.xxh3_128_digest(url.encode() + b"\0" + text.encode())


def selected(folder: Path, rows: list[tuple[str, str]], files: int = 2) -> None:
    for number in range(files):
        table = pa.Table.from_pylist(
            [
                {"uid": uid_of(url, text), "url": url, "text": text, "selected_by": [0]}
                for url, text in rows[number::files]
            ],
            schema=records.SELECTED,
        )
        pq.write_table(table, folder / f"selected-{number:05d}.parquet", row_group_size=3)


@pytest.fixture
def fetch_all(
    tmp_path: Path,
    web: Any,
    make_run: Callable[..., Run],
    publish_files: Callable[..., Manifest],
    run_stage: RunStage,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[dict[str, Any], list[Manifest], Run]]:
    """Download pairs of (url, text); outcomes by url, manifests, run."""

    def go(rows: list[tuple[str, str]], name: str = "run", **settings: Any) -> Any:
        monkeypatch.setenv("OPENWIT_CONNECT_TO", web.connect_to)
        settings = {"timeout_s": 2.0, "max_bytes": 1 << 20, "threads": 8, **settings}
        run = make_run(tmp_path / name, download=DownloadSettings(**settings))
        publish_files(run, "balance", lambda folder: selected(folder, rows))
        manifests = run_stage(run, download.STAGE)
        tables = [
            pq.read_table(run.path(reference)) for reference in run.find("download:fetched-*")
        ]
        by_uid = {row["uid"]: row for row in pa.concat_tables(tables).to_pylist()}
        return {url: by_uid[uid_of(url, text)] for url, text in rows}, manifests, run

    return go


def staged(run: Run) -> dict[str, bytes]:
    members = {}
    for reference in run.find("download:staged-*"):
        with tarfile.open(run.path(reference)) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                members[member.name] = content.read()
    return members


EXPECTED = {
    "/ok.jpg": "ok",
    "/ok.png": "ok",
    "/ok.webp": "ok",
    "/large.jpg": "ok",
    "/deep.png": "ok",
    "/redirect?to=/ok.jpg": "ok",
    "/ok.gif": "not_an_image",
    "/page.html": "not_an_image",
    "/drawing.svg": "not_an_image",
    "/scan.tiff": "not_an_image",
    "/empty.jpg": "not_an_image",
    "/gzip": "not_an_image",
    "/half.jpg": "truncated",
    "/half.png": "truncated",
    "/half.webp": "truncated",
    "/short": "truncated",
    "/bomb.png": "too_many_pixels",
    "/tiny.png": "too_small",
    "/long.png": "too_long",
    "/corrupt.png": "undecodable",
    "/status/404": "dead_link",
    "/status/403": "forbidden",
    "/status/418": "client_error",
    "/status/429": "too_many_requests",
    "/status/500": "server_error",
    "/ok.jpg?header=X-Robots-Tag:%20noai": "opt_out",
    "/endless": "too_large",
    "/huge": "too_large",
    "/drip-body": "timeout",
    "/loop": "too_many_redirects",
    "/hangup": "connection_lost",
    "/redirect?to=file:///etc/hostname": "blocked_scheme",
}


def test_every_outcome_is_named_and_counted(fetch_all: Any) -> None:
    rows = [(f"http://site{i % 5}.example{path}", path) for i, path in enumerate(EXPECTED)]
    outcomes, (manifest,), run = fetch_all(rows)
    assert {text: outcomes[url]["status"] for url, text in rows} == EXPECTED
    kept = {uid_of(url, text).hex() for url, text in rows if EXPECTED[text] == "ok"}
    assert {name.partition(".")[0] for name in staged(run)} == kept
    stats = manifest.stats
    assert stats.rows_in == len(rows)
    assert stats.rows_out == len(kept)
    reasons = [reason for reason in EXPECTED.values() if reason != "ok"]
    assert stats.dropped == {reason: reasons.count(reason) for reason in reasons}
    assert [output.name for output in manifest.outputs] == [
        "fetched-00000.parquet",
        "staged-00000.tar",
    ]


def test_pictures_are_resized_and_deep_ones_are_scaled(fetch_all: Any) -> None:
    rows = [("http://a.example/large.jpg", "large"), ("http://a.example/deep.png", "deep")]
    outcomes, _, run = fetch_all(rows)
    from PIL import Image

    large = outcomes["http://a.example/large.jpg"]
    assert (large["width"], large["height"]) == (341, 256)
    assert (large["original_width"], large["original_height"]) == (800, 600)
    deep = Image.open(io.BytesIO(staged(run)[f"{uid_of(*rows[1]).hex()}.jpg"]))
    assert deep.size == (64, 64)
    assert deep.getpixel((30, 30)) == 128  # 0x8010 of 0xFFFF


def test_an_address_with_many_captions_is_fetched_once(fetch_all: Any, web: Any) -> None:
    url = "http://a.example/picture/1"
    rows = [(url, f"caption {i}") for i in range(5)]
    _, (manifest,), run = fetch_all(rows)
    assert web.hits == ["/picture/1"]
    assert manifest.stats.rows_out == 5
    assert manifest.stats.counts["pictures"] == 1
    members = staged(run)
    pictures = {members[f"{uid_of(*row).hex()}.jpg"] for row in rows}
    assert len(pictures) == 1
    assert {members[f"{uid_of(*row).hex()}.txt"].decode() for row in rows} == {t for _, t in rows}


def test_tasks_partition_the_pairs_and_give_the_same_outcomes(fetch_all: Any) -> None:
    rows = [(f"http://a.example/picture/{i}", "x") for i in range(30)]
    rows += [(f"http://a.example/status/404?{i}", "x") for i in range(5)]
    rows = [(url.replace("?", "%3F") if "status" in url else url, text) for url, text in rows]
    whole, one, run_one = fetch_all(rows, "one", polite_connections=8)
    parts, many, run_many = fetch_all(rows, "many", pairs_per_task=9, polite_connections=8)
    assert len(one) == 1
    assert len(many) == 4
    assert {url: {**row, "staged": ""} for url, row in whole.items()} == {
        url: {**row, "staged": ""} for url, row in parts.items()
    }
    pictures_one = {n: d for n, d in staged(run_one).items() if not n.endswith(".json")}
    pictures_many = {n: d for n, d in staged(run_many).items() if not n.endswith(".json")}
    assert pictures_one == pictures_many
    assert sum((manifest.stats for manifest in many), Stats()) == one[0].stats


def test_an_empty_range_publishes_an_empty_shard(fetch_all: Any) -> None:
    rows = [("http://a.example/ok.jpg", "x"), ("http://a.example/ok.png", "y")]
    _, manifests, _ = fetch_all(rows, pairs_per_task=1)
    assert sorted(m.stats.rows_in for m in manifests) in ([1, 1], [0, 2])


@pytest.mark.parametrize("write", [0, 1, 7, 15])
def test_any_failed_write_fails_the_shard(
    fetch_all: Any, write: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The Nth write to the tar reports a full disk; later ones succeed, as when space returns."""
    from dataset_build.download import staging

    written = []
    own = staging.FailStopWriter.__init__

    def sabotage(writer: Any, *arguments: Any) -> None:
        own(writer, *arguments)
        honest = writer.tar_fd.write

        class Full:
            def write(self, data: bytes) -> int:
                written.append(len(data))
                if len(written) == write + 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return int(honest(data))

        writer.tarwriter = staging.TarWriter(Full(), mtime=0)

    monkeypatch.setattr(staging.FailStopWriter, "__init__", sabotage)
    rows = [(f"http://a.example/picture/{i}", "x") for i in range(60)]
    with pytest.raises(OSError, match="No space left"):
        fetch_all(rows, polite_connections=8)
    assert len(written) >= write + 1
    assert not list((tmp_path / "run" / "download").glob("done/*"))


def test_a_picture_that_reads_back_differently_is_damage(tmp_path: Path) -> None:
    from dataset_build.download.staging import Ledger, Pair, Picture

    uid = "00" * 16
    ledger = Ledger([[Pair(uid, "x")]], stored={0: Picture(1, 1, 1, 1, bytes(32))})
    path = tmp_path / "staged.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo(f"{uid}.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(Damaged, match="not what was written"):
        shard._verify(path, ledger)
    tarfile.open(path, "w").close()
    with pytest.raises(Damaged, match="0 pictures read, 1 written"):
        shard._verify(path, ledger)


def test_a_stop_ends_the_shard_soon_and_publishes_nothing(
    make_run: Callable[..., Run],
    tmp_path: Path,
    web: Any,
    monkeypatch: pytest.MonkeyPatch,
    publish_files: Any,
) -> None:
    import threading
    import time

    monkeypatch.setenv("OPENWIT_CONNECT_TO", web.connect_to)
    run = make_run(tmp_path, download=DownloadSettings(timeout_s=20, slow_s=20))
    rows = [(f"http://a{i}.example/mute", "x") for i in range(4)]
    publish_files(run, "balance", lambda folder: selected(folder, rows))
    (planned,) = download.STAGE.planned(run, 0, 0)
    folder = tmp_path / "private"
    folder.mkdir()
    flag = StopFlag()
    timer = threading.Timer(1.0, lambda: setattr(flag, "signal", 15))
    timer.start()
    start = time.monotonic()
    with pytest.raises(Stopped):
        download.STAGE.work(Attempt(run, planned.task, folder, flag))
    timer.join()
    assert time.monotonic() - start < 8


def test_staged_metadata_holds_no_exif(fetch_all: Any) -> None:
    _, _, run = fetch_all([("http://a.example/ok.jpg", "x")])
    (meta,) = [json.loads(data) for name, data in staged(run).items() if name.endswith("json")]
    assert "exif" not in meta
    assert meta["url"] == "http://a.example/ok.jpg"


def test_img2dataset_still_looks_its_transport_up_where_we_put_ours() -> None:
    import inspect

    from dataset_build.download.staging import img2dataset

    source = inspect.getsource(img2dataset.downloader.Downloader.download_shard)
    assert "download_image_with_retry(" in source
    parameters = inspect.signature(img2dataset.downloader.download_image_with_retry).parameters
    assert next(iter(parameters)) == "row"

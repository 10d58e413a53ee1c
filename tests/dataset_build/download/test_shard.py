from __future__ import annotations

import errno
import inspect
import io
import json
import re
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataset_build import download
from dataset_build.download import DownloadSettings
from dataset_build.download.journal import Journal
from dataset_build.lists import ListSettings, ListsSettings
from pipeline.manifest import Damaged, Manifest
from pipeline.stage import Attempt, Run
from pipeline.stats import Stats
from pipeline.stop import StopFlag, Stopped
from tests.dataset_build.hand_made import Config, Pair, balance_of, dedup_of

RunStage = Callable[..., list[Manifest]]


def key_of(url: str) -> str:
    """What the members of a staged tar are named by."""
    return Pair(url).uid[:8].hex()


@pytest.fixture
def fetch_all(
    tmp_path: Path, web: Any, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, Any], list[Manifest], Run]]:
    """Download pairs of (url, text); outcomes by url, manifests, run."""

    def go(
        rows: list[tuple[str, str]],
        name: str = "run",
        lists: ListsSettings | None = None,
        **settings: Any,
    ) -> Any:
        monkeypatch.setenv("OPENWIT_CONNECT_TO", web.connect_to)
        rules = {"robots": "ignore", "requests_per_s": None}
        settings = {"timeout_s": 2.0, "max_bytes": 1 << 20, "threads": 8, **rules, **settings}
        settings.setdefault("allow_networks", ("127.0.0.0/8",))
        config = Config(download=DownloadSettings(**settings), lists=lists or ListsSettings())
        run = Run(tmp_path / name, config)
        pairs = [Pair(*row) for row in rows]
        run_stage(run, dedup_of(pairs))
        run_stage(run, balance_of(pairs))
        manifests = run_stage(run, download.STAGE)
        tables = [pq.read_table(run.path(r)) for r in run.find("download:fetched-*")]
        found = pa.concat_tables(tables).to_pylist()
        assert [row["uid"] for row in found] == sorted(pair.uid for pair in pairs)
        by_uid = {row["uid"]: row for row in found}
        return {pair.url: by_uid[pair.uid] for pair in pairs}, manifests, run

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
    kept = {key_of(url) for url, text in rows if EXPECTED[text] == "ok"}
    members = staged(run)
    assert {name.partition(".")[0] for name in members if name.endswith(".jpg")} == kept
    assert {name for name in members if name.endswith(".json")} == {
        f"{key_of(url)}.json" for url, _ in rows
    }
    for url, text in rows:
        record = {name: outcomes[url][name] for name in ("url", "text", "page_url", "snapshot")}
        expected = {"url": url, "text": text, "page_url": "http://page.example/A", "snapshot": "A"}
        assert record == expected
    stats = manifest.stats
    assert stats.rows_in == len(rows)
    assert stats.rows_out == len(kept)
    reasons = [reason for reason in EXPECTED.values() if reason != "ok"]
    assert stats.dropped == {reason: reasons.count(reason) for reason in reasons}
    fetched, tar = (output.name for output in manifest.outputs)
    assert fetched == "fetched-00000-of-00001.parquet"
    assert re.fullmatch(r"staged-00000-[0-9a-f]{16}\.tar", tar)
    assert {row["staged"] for row in outcomes.values()} == {tar, ""}


def test_pictures_are_resized_and_deep_ones_are_scaled(fetch_all: Any) -> None:
    rows = [("http://a.example/large.jpg", "large"), ("http://a.example/deep.png", "deep")]
    outcomes, _, run = fetch_all(rows)
    large = outcomes["http://a.example/large.jpg"]
    assert (large["width"], large["height"]) == (341, 256)
    assert (large["original_width"], large["original_height"]) == (800, 600)
    deep = Image.open(io.BytesIO(staged(run)[f"{key_of(rows[1][0])}.jpg"]))
    assert deep.size == (64, 64)
    assert deep.getpixel((30, 30)) == 128  # 0x8010 of 0xFFFF


def test_an_address_with_many_captions_is_fetched_once(fetch_all: Any, web: Any) -> None:
    url = "http://a.example/picture/1"
    rows = [(url, f"caption {i}") for i in range(5)]
    _, (manifest,), run = fetch_all(rows)
    assert web.hits == ["/picture/1"]
    assert manifest.stats.rows_out == 5
    assert manifest.stats.counts["pictures"] == manifest.stats.counts["addresses"] == 1
    (fetched,) = (pq.read_table(run.path(r)) for r in run.find("download:fetched-*"))
    assert set(fetched["text"].to_pylist()) == {text for _, text in rows}
    assert len(set(fetched["sha256"].to_pylist())) == 1
    members = staged(run)
    assert sorted(members) == [f"{key_of(url)}.{kind}" for kind in ("jpg", "json")]


def timeless(outcomes: dict[str, Any]) -> dict[str, Any]:
    """Outcomes but for when they came to be, and where the pictures lie."""
    varying = {"fetched", "staged", "staged_offset"}
    return {
        url: {name: value for name, value in row.items() if name not in varying}
        for url, row in outcomes.items()
    }


def test_tasks_partition_the_pairs_and_give_the_same_outcomes(fetch_all: Any) -> None:
    rows = [(f"http://a.example/picture/{i}", "x") for i in range(30)]
    rows += [(f"http://a.example/status/404?{i}", "x") for i in range(5)]
    rows = [(url.replace("?", "%3F") if "status" in url else url, text) for url, text in rows]
    whole, one, run_one = fetch_all(rows, "one", polite_connections=8)
    parts, many, run_many = fetch_all(rows, "many", pairs_per_task=9, polite_connections=8)
    assert len(one) == 1
    assert len(many) == 4
    assert timeless(whole) == timeless(parts)
    pictures_one = {n: d for n, d in staged(run_one).items() if not n.endswith(".json")}
    pictures_many = {n: d for n, d in staged(run_many).items() if not n.endswith(".json")}
    assert pictures_one == pictures_many
    assert sum((manifest.stats for manifest in many), Stats()) == one[0].stats


def test_an_empty_range_publishes_no_rows_and_no_tar(fetch_all: Any) -> None:
    rows = [(f"http://a.example/ok.jpg?{i}", "x") for i in range(60)]
    low = [row for row in rows if Pair(*row).uid < b"\x80"][:2]
    _, manifests, _ = fetch_all(low, pairs_per_task=1)
    assert [m.stats.rows_in for m in manifests] == [2, 0]
    (output,) = manifests[1].outputs
    assert (output.name, output.rows) == ("fetched-00001-of-00002.parquet", 0)


@pytest.mark.parametrize("write", [0, 1, 7, 29])
def test_any_failed_write_fails_the_shard_and_ends_its_fetches(
    fetch_all: Any, web: Any, write: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The Nth write to the tar reports a full disk; later ones succeed, as when space returns."""
    written = []

    class Full:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def write(self, data: bytes) -> int:
            written.append(len(data))
            if len(written) == write + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self._stream.write(data))

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            self._stream.close()

    own = Journal.__init__

    def sabotage(journal: Any, path: Path) -> None:
        own(journal, path)
        journal._stream = Full(journal._stream)

    monkeypatch.setattr(Journal, "__init__", sabotage)
    rows = [(f"http://a.example/picture/{i}", "x") for i in range(60)]
    with pytest.raises(OSError, match="No space left"):
        fetch_all(rows, polite_connections=8)
    assert len(written) == write + 1, "nothing is written after a failure"
    assert len(web.hits) <= write + 1 + 3 * 8  # threads at work, and as many waiting twice over
    assert not list((tmp_path / "run" / "download").glob("done/*"))


def test_a_row_that_img2dataset_loses_fails_the_shard(
    fetch_all: Any, monkeypatch: pytest.MonkeyPatch, staging: Any
) -> None:
    """It prints what goes wrong with a row and carries on."""

    own = staging.Writer.write

    def loses(writer: Any, picture: bytes | None, *rest: Any) -> None:
        if picture is not None:
            raise MemoryError
        own(writer, picture, *rest)

    monkeypatch.setattr(staging.Writer, "write", loses)
    with pytest.raises(Damaged, match="1 of 2 addresses have an outcome"):
        fetch_all([("http://a.example/ok.jpg", "x"), ("http://a.example/status/404", "x")])


@pytest.mark.timeout(60)
def test_a_log_that_cannot_be_written_does_not_hang_the_shard(
    fetch_all: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of a task lies on the disk that is full."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def fails(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "end", fails)
    monkeypatch.setattr("sys.stdout", Full())
    monkeypatch.setattr("sys.stderr", Full())
    rows = [(f"http://a.example/picture/{i}", "x") for i in range(60)]
    with pytest.raises(OSError, match="No space left"):
        fetch_all(rows, polite_connections=8, threads=4)


def test_a_stop_ends_the_shard_soon_and_publishes_nothing(
    tmp_path: Path, web: Any, monkeypatch: pytest.MonkeyPatch, run_stage: RunStage
) -> None:
    monkeypatch.setenv("OPENWIT_CONNECT_TO", web.connect_to)
    networks = ("127.0.0.0/8",)
    config = Config(download=DownloadSettings(timeout_s=20, slow_s=20, allow_networks=networks))
    run = Run(tmp_path, config)
    pairs = [Pair(f"http://a{i}.example/mute") for i in range(4)]
    run_stage(run, dedup_of(pairs))
    run_stage(run, balance_of(pairs))
    run = Run(tmp_path, config)
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
    assert not [name for name in meta if "exif" in name]
    assert meta["url"] == "http://a.example/ok.jpg"


def test_img2dataset_still_calls_its_writer_as_ours_is_called(staging: Any) -> None:
    source = inspect.getsource(staging.img2dataset.downloader.Downloader.download_shard)
    assert re.findall(r"sample_writer\.(\w+)\(", source) == [*["write"] * 4, "close"]
    from img2dataset.writer import WebDatasetSampleWriter as Theirs

    for name in ("write", "close"):
        theirs, ours = (getattr(kind, name) for kind in (Theirs, staging.Writer))
        assert (
            inspect.signature(theirs).parameters.keys() == inspect.signature(ours).parameters.keys()
        )


def test_what_is_listed_is_not_asked_for(fetch_all: Any, web: Any, tmp_path: Path) -> None:
    blocked, opted_out = tmp_path / "blocked.txt", tmp_path / "opted_out.txt"
    blocked.write_text("http://a.example/large.jpg\n")
    opted_out.write_text("gone.example\n")
    lists = ListsSettings(
        blocked=ListSettings(addresses=(str(blocked),)),
        opted_out=ListSettings(domains=(str(opted_out),)),
    )
    expected = {
        "http://a.example/large.jpg": ("blocked", 0),
        "http://x.gone.example/ok.jpg": ("opted_out", 0),
        "http://a.example/redirect?to=http://b.example/redirect%3Fto%3Dhttp://gone.example/": (
            "opted_out",
            2,
        ),
        "http://a.example/redirect?to=https://a.example/large.jpg": ("blocked", 1),
        "http://a.example/ok.jpg": ("ok", 1),
    }
    rows = [(url, "x") for url in expected]
    outcomes, (manifest,), run = fetch_all(rows, lists=lists)
    assert {url: row["status"] for url, row in outcomes.items()} == {
        url: reason for url, (reason, _) in expected.items()
    }
    asked = [hit for hit in web.hits if not hit.startswith("/redirect")]
    assert asked == ["/ok.jpg"]
    assert len(web.hits) == sum(requests for _, requests in expected.values())
    assert manifest.stats.counts["requests"] == len(web.hits)
    assert manifest.stats.dropped == {"blocked": 2, "opted_out": 2}
    assert [name for name in staged(run) if name.endswith("jpg")] == [
        f"{key_of('http://a.example/ok.jpg')}.jpg"
    ]

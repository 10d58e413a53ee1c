"""Archives in a bucket: a real client against a server of its protocol, on loopback."""

from __future__ import annotations

import gzip
import logging
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dataset_build.extract import STAGE, ExtractSettings, plan
from pipeline import remote
from pipeline.config import ConfigError, MissingInput, UserError
from pipeline.manifest import Manifest
from pipeline.pace import Pace
from pipeline.stage import Run, Stage

from .conftest import Root
from .test_remote import CRAWL, NAME, archive

BODY = archive()
SECOND = NAME.replace("a.warc", "b.warc")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """s3fs's filesystem, with two archives and their list in the bucket `crawl`."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    # Servers of one process share what they hold.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", b"").close()
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("crawl")
    filesystem.pipe(f"crawl/{NAME}", BODY)
    filesystem.pipe(f"crawl/{SECOND}", archive(1))
    listed = f"{NAME}\n{SECOND}\n".encode()
    filesystem.pipe(f"crawl/{CRAWL}/wat.paths.gz", gzip.compress(listed))
    try:
        yield filesystem
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def references(tmp_path: Path, **settings: object) -> list[str]:
    root = Root(extract=ExtractSettings(**settings))
    return [task.reads[0] for task in plan(Run(tmp_path / "run", root))]


def test_files_are_found_by_list_glob_folder_and_name(bucket: Any, tmp_path: Path) -> None:
    both = [f"s3://crawl/{NAME}", f"s3://crawl/{SECOND}"]
    for pattern in (
        f"s3://crawl/{CRAWL}/wat.paths.gz",
        f"s3://crawl/{CRAWL}/**/*.warc.wat.gz",
        "s3://crawl/crawl-data",
    ):
        assert references(tmp_path, wat=[pattern]) == both
    assert references(tmp_path, wat=[both[0]]) == both[:1]
    (tmp_path / "wat.paths").write_text(f"{NAME}\n")
    settings = {"wat": [f"{tmp_path}/wat.paths"], "base_url": "s3://crawl"}
    assert references(tmp_path, **settings) == both[:1]


def test_the_same_rows_as_of_local_files(
    bucket: Any, tmp_path: Path, run_stage: Callable[[Run, Stage], list[Manifest]]
) -> None:
    for name, body in ((NAME, BODY), (SECOND, archive(1))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(body)
    contents = []
    for pattern in (f"{tmp_path}/crawl-data", f"s3://crawl/{CRAWL}/wat.paths.gz"):
        run = Run(tmp_path / f"run{len(contents)}", Root(extract=ExtractSettings(wat=[pattern])))
        run_stage(run, STAGE)
        found = run.find("extract:candidates-*")
        contents.append([run.path(reference).read_bytes() for reference in found])
    assert len(contents[0]) == 2
    assert contents[0] == contents[1]


def test_what_is_not_there_is_named(bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"s3://crawl/none\.warc\.wat\.gz: "):
        remote.fetch("s3://crawl/none.warc.wat.gz", tmp_path / "file")
    with pytest.raises(MissingInput, match=r"extract\.wat: s3://crawl/none/\*\.gz: no such input"):
        references(tmp_path, wat=["s3://crawl/none/*.gz"])
    with pytest.raises(UserError, match=r"extract\.wat: s3://nowhere/\*\.gz: "):
        references(tmp_path, wat=["s3://nowhere/*.gz"])


@pytest.mark.parametrize("changed", [False, True])
def test_it_goes_on_where_it_was_cut(
    changed: bool, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks, each a request that waits for its turn; never parts of two files."""
    monkeypatch.setattr(remote, "_BLOCK", 50_000)
    other = archive(2)
    turns: list[str] = []

    def turn(pace: Pace, host: str, stopping: object) -> None:
        turns.append(host)
        if len(turns) == 3:  # after the head and the first block
            if changed:
                bucket.pipe(f"crawl/{NAME}", other)
            else:
                raise remote.Cut("by the test")

    monkeypatch.setattr(Pace, "wait", turn)
    remote.fetch(f"s3://crawl/{NAME}", tmp_path / "file", Pace(tmp_path / "pace", 1, "x"))
    whole = other if changed else BODY
    assert (tmp_path / "file").read_bytes() == whole
    assert set(turns) == {"crawl"}
    blocks = -(-len(whole) // 50_000)
    assert len(turns) == 3 + 1 + (blocks if changed else blocks - 1)


def test_without_the_client_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec  # noqa: F401

    monkeypatch.setitem(sys.modules, "s3fs", None)
    known = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(known, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"s3://crawl/\*\.gz: .*pip install -e '\.\[s3\]'"):
        references(tmp_path, wat=["s3://crawl/*.gz"])

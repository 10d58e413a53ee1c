"""Bytes of shards: from files, from memory, over HTTP; tried again, bounded in time, named."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest

from pipeline.config import ConfigError, MissingInput
from train.data import storage
from train.data.index import DatasetError


@dataclass
class Server:
    """An HTTP server on loopback that honours Range, and can be told to fail."""

    folder: Path
    address: str = ""
    refusals: int = 0
    """Requests of ranges that are answered with 503 from now on."""
    honours_ranges: bool = True
    delay_s: float = 0.0
    ranges: list[str] = field(default_factory=list)

    def handler(server) -> type[http.server.BaseHTTPRequestHandler]:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                path = server.folder / self.path.lstrip("/")
                if not path.is_file():
                    self._send(404, b"", body)
                    return
                data = path.read_bytes()
                wanted = self.headers.get("Range")
                if not wanted or not server.honours_ranges:
                    self._send(200, data, body)
                    return
                server.ranges.append(wanted)
                time.sleep(server.delay_s)
                if server.refusals:
                    server.refusals -= 1
                    self._send(503, b"busy", body)
                    return
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                self._send(206, data[int(first) : int(last) + 1], body, f"{wanted}/{len(data)}")

            def _send(self, status: int, data: bytes, body: bool, part: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Accept-Ranges", "bytes")
                if part:
                    self.send_header("Content-Range", part.replace("=", " "))
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    serving = Server(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serving.handler()) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        serving.address = f"http://127.0.0.1:{listening.server_port}"
        yield serving
        listening.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_PAUSE_S", 0.02)


BYTES = bytes(range(256)) * 40


def test_a_range_is_the_same_from_everywhere(server: Server) -> None:
    (server.folder / "x.tar").write_bytes(BYTES)
    fsspec.filesystem("memory").pipe("/ranges/x.tar", BYTES)
    for address in (f"{server.folder}/x.tar", "memory://ranges/x.tar", f"{server.address}/x.tar"):
        for offset, size in ((0, 1), (300, 4000), (10_000, 240)):
            data = storage.read(address, offset, size, timeout_s=9)
            assert data == BYTES[offset : offset + size]
    assert server.ranges == ["bytes=0-0", "bytes=300-4299", "bytes=10000-10239"]


def test_a_server_that_refuses_twice_is_asked_again(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    (server.folder / "x.tar").write_bytes(BYTES)
    server.refusals = 2
    assert storage.read(f"{server.address}/x.tar", 5, 9, timeout_s=9) == BYTES[5:14]
    assert len(server.ranges) == 3
    assert caplog.text.count("x.tar: bytes 5 to 13: try") == 2


def test_a_server_that_always_refuses_ends_the_run_in_time(server: Server) -> None:
    (server.folder / "x.tar").write_bytes(BYTES)
    server.refusals = 1000
    began = time.monotonic()
    with pytest.raises(
        DatasetError, match=r"x\.tar: bytes 5 to 13 could not be read in 1 s, \d tries: .*503"
    ):
        storage.read(f"{server.address}/x.tar", 5, 9, timeout_s=1)
    assert time.monotonic() - began < 5


def test_a_server_that_hangs_ends_the_run_in_time(server: Server) -> None:
    (server.folder / "x.tar").write_bytes(BYTES)
    server.delay_s = 3
    began = time.monotonic()
    with pytest.raises(DatasetError, match=r"bytes 5 to 13 could not .*TimeoutError.*raise train"):
        storage.read(f"{server.address}/x.tar", 5, 9, timeout_s=0.6)
    assert time.monotonic() - began < 2.9


def test_whole_files_instead_of_ranges_are_refused(server: Server) -> None:
    (server.folder / "x.tar").write_bytes(BYTES)
    server.honours_ranges = False
    with pytest.raises(DatasetError, match=r"bytes 5 to 13 cannot be read: .*whole files"):
        storage.read(f"{server.address}/x.tar", 5, 9, timeout_s=9)


@pytest.mark.parametrize("where", ["file", "memory", "http"])
def test_what_is_not_there_is_said_at_once(server: Server, where: str) -> None:
    address = {
        "file": f"{server.folder}/none.tar",
        "memory": "memory://nowhere/none.tar",
        "http": f"{server.address}/none.tar",
    }[where]
    began = time.monotonic()
    with pytest.raises(DatasetError, match=r"none\.tar: bytes 0 to 8 cannot be read"):
        storage.read(address, 0, 9, timeout_s=60)
    with pytest.raises(MissingInput, match=r"none\.tar: no such file or folder"):
        storage.find(address, timeout_s=60)
    assert time.monotonic() - began < 10


def test_a_shard_that_ends_early_is_named(server: Server) -> None:
    (server.folder / "x.tar").write_bytes(BYTES)
    fsspec.filesystem("memory").pipe("/short/x.tar", BYTES)
    with pytest.raises(DatasetError, match=r"x\.tar: ends at byte 10240"):
        storage.read(f"{server.folder}/x.tar", 10_200, 100, timeout_s=9)
    with pytest.raises(DatasetError, match=r"x\.tar: bytes 10200 to 10299 could .* 40 of 100"):
        storage.read("memory://short/x.tar", 10_200, 100, timeout_s=0.3)


def test_shards_are_found_by_folder_glob_braces_and_name(server: Server) -> None:
    folder = server.folder / "found"
    folder.mkdir()
    memory = fsspec.filesystem("memory")
    for name in ("00000.tar", "00001.tar", "00002.tar", "00000.parquet"):
        (folder / name).write_bytes(BYTES)
        memory.pipe(f"/found/{name}", BYTES)
    for base in (str(folder), "memory://found", f"{server.address}/found"):

        def names(pattern: str, base: str = base) -> list[str]:
            found = storage.find(f"{base}{pattern}", timeout_s=9)
            assert all(shard.bytes == len(BYTES) for shard in found)
            for shard in found:
                assert storage.read(shard.address, 3, 4, timeout_s=9) == BYTES[3:7]
            return [Path(shard.address).name for shard in found]

        assert names("/{00001..00002}.tar") == ["00001.tar", "00002.tar"]
        assert names("/00001.tar") == ["00001.tar"]
        with pytest.raises(MissingInput, match=r"00003\.tar: no such file"):
            names("/{00001..00003}.tar")
        if not base.startswith("http"):  # has no listing
            assert names("") == ["00000.tar", "00001.tar", "00002.tar"]
            assert names("/*1.tar") == ["00001.tar"]
    with pytest.raises(MissingInput, match="no tars there"):
        storage.find(f"{server.folder}/*.tar", timeout_s=9)
    with pytest.raises(ConfigError, match="nowhere://x"):
        storage.find("nowhere://x", timeout_s=9)


def test_a_file_that_is_written_again_has_another_stamp(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(BYTES)
    (first,) = storage.find(str(path), timeout_s=9)
    path.write_bytes(bytes(len(BYTES)))
    (second,) = storage.find(str(path), timeout_s=9)
    assert first.bytes == second.bytes
    assert first.stamp != second.stamp

"""Servers whose answers are not what was asked for: never a file that is not theirs, and an end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dataset_build.extract import STAGE, ExtractSettings
from pipeline import remote
from pipeline.config import UserError
from pipeline.manifest import Manifest
from pipeline.stage import Run, Stage

from . import archive_server as faulty
from .archive_server import ArchiveServer, Fault, Handler, serving
from .conftest import Root, members, metadata

BODY = bytes(range(256)) * 40
NAME = "a.warc.wat.gz"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ArchiveServer]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    with serving() as server:
        server.files[f"/{NAME}"] = BODY
        yield server


def fetched(server: ArchiveServer, folder: Path, *faults: Fault) -> bytes:
    server.faults[f"/{NAME}"] += faults
    remote.fetch(f"{server.url}/{NAME}", folder / "file")
    return (folder / "file").read_bytes()


def part(start: int, end: int, size: int | str, extra: bytes = b"") -> Fault:
    """These bytes of a file of `size`, whatever was asked for, without an ETag; `extra` follows."""

    def give(handler: Handler, body: bytes) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        handler.send_header("Content-Length", str(end - start + len(extra)))
        handler.end_headers()
        handler.wfile.write(body[start:end] + extra)

    return give


def chunked_cut(at: int) -> Fault:
    """A body of unknown length without its end, of a file that has an ETag."""

    def send(handler: Handler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("ETag", '"one"')
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\n" % (at, body[:at]))
        handler.close_connection = True

    return send


def ranges(server: ArchiveServer) -> list[str]:
    return [request.range.removeprefix("bytes=") for request in server.requests]


def test_a_short_part_is_not_the_rest_of_a_file_of_unknown_size(
    server: ArchiveServer, tmp_path: Path
) -> None:
    assert fetched(server, tmp_path, chunked_cut(3000), part(3000, 4000, len(BODY))) == BODY
    assert ranges(server) == ["", "3000-", "4000-"]


def test_a_size_that_is_not_told_again_is_still_known(
    server: ArchiveServer, tmp_path: Path
) -> None:
    assert fetched(server, tmp_path, faulty.cut(3000), part(3000, 4000, "*")) == BODY
    assert ranges(server) == ["", "3000-", "4000-"]


def test_a_part_where_the_whole_was_asked_for(server: ArchiveServer, tmp_path: Path) -> None:
    assert fetched(server, tmp_path, part(0, 100, len(BODY)), part(0, 100, 100)) == BODY
    assert ranges(server) == ["", "", ""]


@pytest.mark.parametrize("size", [len(BODY) - 1, len(BODY) + 1, 100])
def test_a_part_of_a_file_of_another_size(size: int, server: ArchiveServer, tmp_path: Path) -> None:
    assert fetched(server, tmp_path, faulty.cut(3000), part(3000, len(BODY), size)) == BODY
    assert ranges(server) == ["", "3000-", ""]


def test_more_than_the_file_has_is_never_taken(server: ArchiveServer, tmp_path: Path) -> None:
    too_much = part(3000, len(BODY), len(BODY), extra=b"x")
    assert fetched(server, tmp_path, faulty.cut(3000), too_much) == BODY
    assert ranges(server) == ["", "3000-", ""]


def test_a_server_that_sends_a_byte_too_many_is_given_up(
    server: ArchiveServer, tmp_path: Path
) -> None:
    too_much = part(3000, len(BODY), len(BODY), extra=b"x")
    with pytest.raises(UserError, match=r"not fetched in \d+ tries, 3000 bytes at most"):
        fetched(server, tmp_path, *[faulty.cut(3000), too_much] * 100)
    assert len(server.requests) <= 2 * remote.FRUITLESS_TRIES


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_statuses_that_are_asked_again(code: int, server: ArchiveServer, tmp_path: Path) -> None:
    assert fetched(server, tmp_path, faulty.status(code)) == BODY
    assert len(server.requests) == 2


def test_redirects_in_a_circle_have_an_end(server: ArchiveServer, tmp_path: Path) -> None:
    around = faulty.status(302, Location=f"/{NAME}")
    with pytest.raises(UserError, match=rf"^{server.url}/{NAME}: cannot be fetched .*redirects"):
        fetched(server, tmp_path, *[around] * 100)
    assert len(server.requests) < 10


def test_a_user_and_password_are_sent_but_not_told(
    server: ArchiveServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[str | None] = []

    def refuse(handler: Handler, body: bytes) -> None:
        sent.append(handler.headers["Authorization"])
        handler.refuse(503 if len(sent) == 1 else 403)

    server.faults[f"/{NAME}"] += [refuse] * 2
    address = server.url.replace("://", "://user:secret@")
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as caught:
        remote.fetch(f"{address}/{NAME}", tmp_path / "file")
    assert sent == ["Basic dXNlcjpzZWNyZXQ="] * 2
    assert str(caught.value).startswith(f"{server.url}/{NAME}: HTTP 403")
    assert f"{server.url}/{NAME}: HTTP 503" in caplog.text
    assert "secret" not in caplog.text


def test_warnings_do_not_tell_a_password(
    server: ArchiveServer, tmp_path: Path, run_stage: Callable[[Run, Stage], list[Manifest]]
) -> None:
    server.files["/b.warc.wat.gz"] = b"".join(members(metadata("http://a.example/", [])))
    server.files["/c.warc.wat.gz"] = b"no archive"
    address = server.url.replace("://", "://user:secret@")
    wat = [f"{address}/{name}.warc.wat.gz" for name in "bcd"]
    settings = ExtractSettings(wat=wat, files_per_task=3, max_failed_files=0.7)
    (manifest,) = run_stage(Run(tmp_path / "run", Root(extract=settings)), STAGE)
    told = str(manifest.stats.warnings)
    for name, what in (("b", "no page"), ("c", "left out"), ("d", "left out")):
        assert f"{server.url}/{name}.warc.wat.gz" in told and what in told
    assert "secret" not in told

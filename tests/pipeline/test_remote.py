"""Addresses that are none, and files on filesystems of other kinds."""

from __future__ import annotations

import errno
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pipeline import http, remote
from pipeline.config import ConfigError, MissingInput
from pipeline.pace import Pace

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fsspec's filesystem in memory, with one file, read in blocks of 10,000 bytes."""
    import fsspec

    monkeypatch.setattr(remote, "_BLOCK", 10_000)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/folder/file", CONTENT)
    yield filesystem
    filesystem.rm("/folder", recursive=True)


@pytest.mark.parametrize("address", ["https://[x/a.gz", "http://\u2100/a.gz", "s3://[x/a.gz"])
def test_what_is_no_address_is_named(address: str, tmp_path: Path) -> None:
    wanted = rf"^{address.replace('[', '.')}: not an address: "
    calls: list[Callable[[], object]] = [lambda: remote.fetch(address, tmp_path / "file")]
    if not address.startswith("s3"):
        calls += [lambda: remote.find(address), lambda: remote.name_of(address)]
        calls.append(lambda: http.HttpFile(address, io.BytesIO(), lambda: False))
    for call in calls:
        with pytest.raises(ConfigError, match=wanted):
            call()


def test_a_filesystem_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"no archive")
    (tmp_path / "some.zip").mkdir()
    for address in (
        "github://a/b",
        f"zip://x::file://{tmp_path}/no.zip",
        f"tar://x::file://{tmp_path}/no.zip",
        f"zip://x::file://{tmp_path}/some.zip",
        f"zip://x::file://{tmp_path}/none.zip",
        "zzz://a/b",
    ):
        for call in (lambda a: remote.fetch(a, tmp_path / "file"), lambda a: remote.find(f"{a}*")):
            with pytest.raises(ConfigError) as caught:
                call(address)
            assert str(caught.value).startswith((f"{address}: ", f"{address}*: "))
            assert ": no such kind of address, or it cannot be opened: " in str(caught.value)


def test_a_file_in_an_archive_is_fetched(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x", CONTENT)
    address = f"zip://x::file://{tmp_path}/a.zip"
    remote.fetch(address, tmp_path / "file", Pace(tmp_path / "pace", 1000, "x"))
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_an_address_without_a_host_is_fetched(scheme: str, tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(CONTENT)
    pace = Pace(tmp_path / "pace", 0.001, "x")
    for _ in range(2):
        remote.fetch(f"{scheme}://{tmp_path}/from", tmp_path / "file", pace)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("cut", [False, True])
def test_a_file_of_unknown_size_is_read_until_it_ends(
    cut: bool, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was cut off it starts over: such files cannot be entered in their middle."""
    info, opened = type(memory).info, type(memory).open
    starts: list[int] = []

    def cut_once(self: Any, path: str, *args: Any, **options: Any) -> Any:
        stream = opened(self, path, *args, **options)
        read, seek = stream.read, stream.seek
        answers = [read(10_000), TimeoutError()] if cut and not starts else iter(read, None)
        seek(0)
        stream = mock.MagicMock(wraps=stream)
        stream.__enter__.return_value = stream
        stream.read.side_effect = answers if isinstance(answers, list) else read
        stream.seek.side_effect = lambda at: starts.append(at) or seek(at)
        return stream

    monkeypatch.setattr(type(memory), "open", cut_once)
    monkeypatch.setattr(type(memory), "info", lambda *a, **k: {**info(*a, **k), "size": None})
    remote.fetch("memory://folder/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert starts == [0] * (1 + cut)


def test_a_full_disk_is_nobody_elses_fault(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where a file that has changed is begun anew, either."""
    disk = mock.Mock(wraps=io.BytesIO())
    disk.truncate.side_effect = OSError(errno.ENOSPC, "No space left on device")
    file = remote._StoredFile("memory://folder/file", disk, lambda: False)
    turns = iter([None, None, remote.Cut("by the test")])

    def pace() -> None:
        if turn := next(turns, None):
            raise turn

    with pytest.raises(remote.Cut, match="by the test"):
        file.read(pace)
    assert file.position == 10_000
    memory.pipe("/folder/file", CONTENT[:-1])
    with pytest.raises(OSError, match="No space left") as caught:
        file.read(pace)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://u:p@h.example/a@b", "https://h.example/a@b"),
        ("zip://x::https://u:p@ss@h/a", "zip://x::https://h/a"),
        ("https://h.example/a?to=u@h", "https://h.example/a?to=u@h"),
        ("https://h.example: mail a@b.example", "https://h.example: mail a@b.example"),
        ("HTTP 401 of 's3://key:secret@bucket'", "HTTP 401 of 's3://bucket'"),
        ("some/path@x", "some/path@x"),
    ],
)
def test_what_is_shown_of_an_address(text: str, told: str) -> None:
    assert remote.shown(text) == told


def test_no_error_tells_a_password(memory: Any, tmp_path: Path) -> None:
    for address in (
        "https://u:secret@[x/a",
        "https://u:secret@h.example/*.gz",
        "https://u:secret@127.0.0.1:1/a.gz",
        "memory://u:secret@folder/none",
        "memory://u:secret@folder/none*",
        "zzz://u:secret@h/a",
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote, "FRUITLESS_TRIES", 1)
            with pytest.raises((ConfigError, MissingInput, remote.UserError)) as caught:
                remote.fetch(remote.find(address)[0], tmp_path / "file")
        assert "secret" not in str(caught.value), address

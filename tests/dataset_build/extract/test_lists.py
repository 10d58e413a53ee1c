"""Lists of paths: what is none is told, and never kept."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset_build.extract import ExtractSettings, inputs
from pipeline import remote
from pipeline.config import ConfigError, MissingInput, UserError
from pipeline.stage import Run

from .archive_server import ArchiveServer, Handler, serving
from .conftest import Root

LIST = b"crawl-data/a.warc.wat.gz\ncrawl-data/b.warc.wat.gz\n"
BASE = "https://data.example/"
FOUND = [BASE + line for line in LIST.decode().split()]


def flipped(content: bytes) -> bytes:
    """With a bit of the deflated data changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


NO_LISTS = {
    "cut off": gzip.compress(LIST)[:-12],
    "a changed bit": flipped(gzip.compress(LIST)),
    "not deflated": gzip.compress(LIST)[:10] + b"\xff" * 30,
    "a page": b"<html>\nSign in to this network\n</html>\n",
    "a packed page": gzip.compress(b"\n\n  <!doctype html>\n"),
    "not UTF-8": "crawl-data/ä.wat.gz".encode("latin-1"),
    "another UTF": LIST.decode().encode("utf-16-le"),
    "control characters": b"crawl-data/a.wat.gz\ncrawl-data/\x07.wat.gz\n",
}


@pytest.fixture
def server() -> Iterator[ArchiveServer]:
    with serving() as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "run").mkdir()
    return Run(tmp_path / "run", Root())


def references(run: Run, *wat: str) -> list[str]:
    settings = ExtractSettings(wat=wat, base_url=BASE)
    return inputs.references(Run(run.folder, Root(extract=settings)), "wat")


@pytest.mark.parametrize("content", NO_LISTS.values(), ids=NO_LISTS.keys())
@pytest.mark.parametrize("name", ["wat.paths", "wat.paths.gz"])
def test_what_is_no_list_is_told_and_not_kept(
    content: bytes, name: str, run: Run, server: ArchiveServer, tmp_path: Path
) -> None:
    address, path = f"{server.url}/{name}", tmp_path / name
    server.files[f"/{name}"] = content
    path.write_bytes(content)
    for where in (address, str(path)):
        with pytest.raises(ConfigError, match=rf"^extract\.wat: {where}: not a list of paths \("):
            references(run, where)
    server.files[f"/{name}"] = LIST  # the same command finds it, once it is there
    assert references(run, address) == FOUND


def test_an_empty_list_is_told_and_not_kept(run: Run, server: ArchiveServer) -> None:
    server.files["/wat.paths.gz"] = gzip.compress(b"\n \n")
    with pytest.raises(MissingInput, match=r"wat\.paths\.gz: a list without any path"):
        references(run, f"{server.url}/wat.paths.gz")
    server.files["/wat.paths.gz"] = gzip.compress(LIST)
    assert references(run, f"{server.url}/wat.paths.gz") == FOUND


def test_a_kept_list_that_was_damaged_names_its_file(run: Run, server: ArchiveServer) -> None:
    server.files["/wat.paths"] = LIST
    references(run, f"{server.url}/wat.paths")
    (kept,) = (run.folder / "extract/lists").iterdir()
    kept.write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match=rf"/wat\.paths, kept as {kept}: not a list of paths"):
        references(run, f"{server.url}/wat.paths")


@pytest.mark.parametrize("name", ["wat.paths", "wat.paths.gz", "WAT.PATHS.GZ", "wat.paths.gz?a=b"])
@pytest.mark.parametrize("packed", [False, True])
def test_whether_a_list_is_packed_is_told_by_its_content(
    name: str, packed: bool, run: Run, server: ArchiveServer, tmp_path: Path
) -> None:
    content = gzip.compress(LIST[:30]) + gzip.compress(LIST[30:]) if packed else LIST
    server.files[f"/{name.partition('?')[0]}"] = content
    assert references(run, f"{server.url}/{name}") == FOUND
    path = tmp_path / name.partition("?")[0]
    path.write_bytes(content.replace(b"\n", b"\r\n") if not packed else content)
    assert references(run, str(path)) == FOUND


@pytest.mark.parametrize("packed", [False, True])
def test_a_list_has_a_bound(
    packed: bool, run: Run, server: ArchiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MOST_OF_A_LIST", 100_000)
    for name, count in (("fits.paths", 100_000), ("large.paths", 100_001)):
        content = b"a" * count
        server.files[f"/{name}"] = gzip.compress(content) if packed else content
        (tmp_path / name).write_bytes(server.files[f"/{name}"])
    for folder in (server.url, tmp_path):
        assert references(run, f"{folder}/fits.paths") == [f"{BASE}{'a' * 100_000}"]
        with pytest.raises(
            ConfigError, match=rf"{folder}/large\.paths: not .* \(more than 100,000"
        ):
            references(run, f"{folder}/large.paths")


def test_a_list_without_end_is_not_fetched_to_its_end(
    server: ArchiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MOST_OF_A_LIST", 1_000_000)
    sent = 0

    def endless(handler: Handler, body: bytes) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while sent < 200_000_000:
            handler.wfile.write(b"%x\r\n%s\r\n" % (1 << 16, b"x" * (1 << 16)))
            sent += 1 << 16
        handler.close_connection = True

    server.files["/wat.paths"] = b""
    server.faults["/wat.paths"].append(endless)
    with pytest.raises(ConfigError, match=r"wat\.paths: not a list of paths \(more than 1,000,000"):
        remote.read(f"{server.url}/wat.paths")
    assert sent < 100_000_000
    assert len(server.requests) == 1


@pytest.mark.parametrize("base", ["https://[x/", BASE])
def test_a_line_that_is_no_address_is_named(base: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "wat.paths").write_text("a.wat.gz\n" if base != BASE else "https://[x/a.wat.gz\n")
    settings = ExtractSettings(wat=[f"{tmp_path}/wat.paths"], base_url=base)
    with pytest.raises(ConfigError, match=r"^extract\.wat: https://\[x/a\.wat\.gz: not an address"):
        inputs.references(Run(run.folder, Root(extract=settings)), "wat")


def test_a_list_that_may_not_be_read_is_told(tmp_path: Path, run: Run) -> None:
    (tmp_path / "wat.paths").write_bytes(LIST)

    def refuse(*_: object) -> object:
        raise PermissionError(13, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(MissingInput, match=r"wat\.paths: cannot be read \(Permission denied\)"):
            references(run, f"{tmp_path}/wat.paths")


def test_a_user_and_password_are_told_to_nobody(server: ArchiveServer, run: Run) -> None:
    address = server.url.replace("://", "://user:secret@") + "/wat.paths"
    server.files["/wat.paths"] = b"<html>"
    with pytest.raises(UserError, match=rf"{server.url}/wat\.paths: not a list") as caught:
        references(run, address)
    assert "secret" not in str(caught.value)

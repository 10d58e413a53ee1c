"""Archives at http addresses: the same rows as of local files, or an error that names the file."""

from __future__ import annotations

import errno
import gzip
import io
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from dataset_build.extract import STAGE, ExtractSettings, inputs, plan
from pipeline import http, remote
from pipeline.config import MissingInput, UserError
from pipeline.executor import NEVER_RETRIED
from pipeline.manifest import Manifest
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stop import StopFlag, Stopped

from . import archive_server as faulty
from .archive_server import ArchiveServer, serving
from .conftest import Root, members, metadata

CRAWL = "crawl-data/CC-MAIN-2024-10"
NAME = f"{CRAWL}/segments/1/wat/a.warc.wat.gz"
Extract = Callable[..., bytes]


def archive(seed: int = 0, pages: int = 300) -> bytes:
    """Pages of words that do not compress well."""
    numbers = random.Random(seed)
    records = []
    for page in range(pages):
        words = " ".join(f"{numbers.getrandbits(40):x}" for _ in range(20))
        image = {"url": f"/{numbers.getrandbits(60)}.jpg", "alt": f"about {words}"}
        records.append(metadata(f"http://a{page}.example/", [image]))
    return b"".join(members(*records))


BODY = archive()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ArchiveServer]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(http, "STALL_S", 1)
    with serving() as server:
        server.files[f"/{NAME}"] = BODY
        yield server


@pytest.fixture
def extract(tmp_path: Path, run_stage: Callable[[Run, Stage], list[Manifest]]) -> Extract:
    """`extract(wat=[...])`: the one candidates file of a run, after a look for what was left."""

    def extract_one(**settings: object) -> bytes:
        run = Run(tmp_path / f"run{time.monotonic_ns()}", Root(extract=ExtractSettings(**settings)))
        run_stage(run, STAGE)
        scratch = [p for p in (run.folder / "extract").rglob("*") if "fetched" in p.parts[-1]]
        assert scratch == []
        (reference,) = run.find("extract:candidates-*")
        return run.path(reference).read_bytes()

    return extract_one


@pytest.fixture
def local(tmp_path: Path, extract: Extract) -> Callable[[bytes], bytes]:
    """The candidates of a local file with this content."""

    def extract_local(content: bytes) -> bytes:
        path = tmp_path / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return extract(wat=[str(path)])

    return extract_local


NUMBERS = random.Random(4)
CUTS = [[NUMBERS.randrange(1, len(BODY) // count) for _ in range(count)] for count in (1, 2, 5, 9)]


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([], 1),
        ([faulty.status(503)] * 3, 4),
        ([faulty.status(500), faulty.status(408), faulty.cut(0)], 4),
        ([faulty.status(429, Retry_After="1")], 2),
        ([faulty.stall(None)], 2),
        ([faulty.stall(500)], 2),
        ([faulty.chunked_cut(5000)], 2),
        ([faulty.cut(9000), faulty.refuses_parts(412), faulty.refuses_parts(412)], 3),
        ([faulty.cut(9000), *[faulty.refuses_parts(416)] * 9], 3),
        ([faulty.cut(9000), faulty.wrong_range], 3),
        ([faulty.cut(9000), faulty.half_of_the_rest, faulty.half_of_the_rest], 4),
        *(([faulty.cut(at) for at in cuts], len(cuts) + 1) for cuts in CUTS),
    ],
)
def test_faults_that_pass(
    faults: list[faulty.Fault],
    requests: int,
    server: ArchiveServer,
    extract: Extract,
    local: Callable[[bytes], bytes],
) -> None:
    server.faults[f"/{NAME}"] += faults
    assert extract(wat=[f"{server.url}/{NAME}"]) == local(BODY)
    assert len(server.requests) == requests


def test_it_goes_on_where_it_was_cut(server: ArchiveServer, tmp_path: Path) -> None:
    server.faults[f"/{NAME}"] += [faulty.cut(1000), faulty.cut(2000)]
    remote.fetch(f"{server.url}/{NAME}", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert [request.range for request in server.requests] == ["", "bytes=1000-", "bytes=3000-"]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_it_starts_over(
    etag: str | None, server: ArchiveServer, tmp_path: Path
) -> None:
    server.etag = etag
    server.faults[f"/{NAME}"] += [faulty.cut(1000), faulty.cut(2000)]
    remote.fetch(f"{server.url}/{NAME}", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert [request.range for request in server.requests] == [""] * 3


def test_a_server_without_ranges(server: ArchiveServer, tmp_path: Path) -> None:
    server.honours_range = False
    server.faults[f"/{NAME}"] += [faulty.cut(1000), faulty.cut(900)]
    remote.fetch(f"{server.url}/{NAME}", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY


def test_another_file_in_its_place(server: ArchiveServer, tmp_path: Path) -> None:
    """Never the beginning of the one and the end of the other, whether longer or shorter."""
    address, target = f"{server.url}/{NAME}", tmp_path / "file"
    other = archive(1)
    shorter = archive(2, 100)
    server.faults[f"/{NAME}"] += [
        faulty.changes('"two"', other, faulty.cut(20_000)),
        faulty.changes('"three"', shorter, faulty.cut(15_000)),
    ]
    remote.fetch(address, target)
    assert target.read_bytes() == shorter
    # What has changed is sent whole in answer to the request for its rest.
    assert [request.range for request in server.requests] == ["", "bytes=20000-", "bytes=15000-"]


def test_a_changed_etag_is_seen_where_the_condition_is_ignored(
    server: ArchiveServer, tmp_path: Path
) -> None:
    other = BODY[::-1]  # of the same size

    def unconditional(handler: faulty.Handler, body: bytes) -> None:
        del handler.headers["If-Range"]
        handler.give(body)

    server.faults[f"/{NAME}"] += [
        faulty.changes('"two"', other, faulty.cut(20_000)),
        unconditional,
    ]
    remote.fetch(f"{server.url}/{NAME}", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == other
    assert [request.range for request in server.requests] == ["", "bytes=20000-", ""]


def test_a_file_that_is_cut_off_on_the_server(
    server: ArchiveServer, extract: Extract, local: Callable[[bytes], bytes]
) -> None:
    """It has the size that the server says, so it is read and accounted for as a local one."""
    server.faults[f"/{NAME}"] += [faulty.short_length(len(BODY) // 2)]
    remotely = extract(wat=[f"{server.url}/{NAME}"])
    assert remotely == local(BODY[: len(BODY) // 2])
    assert remotely != local(BODY)


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_refusal_is_final(code: int, server: ArchiveServer, extract: Extract) -> None:
    server.faults[f"/{NAME}"] += [faulty.status(code)]
    with pytest.raises(MissingInput, match=rf"{server.url}/{NAME}: HTTP {code}: "):
        extract(wat=[f"{server.url}/{NAME}"])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "fault", [faulty.status(503), faulty.cut(100), faulty.status(429, Retry_After="0")]
)
def test_tries_are_bounded(
    fault: faulty.Fault, server: ArchiveServer, extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that come again and again, of a file that never comes whole, are no progress."""
    monkeypatch.setattr(remote, "LONGEST_PAUSE_S", 0.02)
    server.honours_range = False
    server.faults[f"/{NAME}"] += [fault] * 50
    with pytest.raises(UserError, match=rf"{server.url}/{NAME}: not fetched in \d+ tries"):
        extract(wat=[f"{server.url}/{NAME}"])
    assert remote.FRUITLESS_TRIES <= len(server.requests) <= remote.FRUITLESS_TRIES + 1


def test_a_server_that_wants_to_be_left_alone_for_hours(
    server: ArchiveServer, extract: Extract
) -> None:
    server.faults[f"/{NAME}"] += [faulty.status(503, Retry_After="7200")]
    with pytest.raises(UserError, match=rf"{NAME}: HTTP 503, and its server .* for 7200 s"):
        extract(wat=[f"{server.url}/{NAME}"])


def test_retry_after_is_awaited(server: ArchiveServer, extract: Extract) -> None:
    server.faults[f"/{NAME}"] += [faulty.status(503, Retry_After="2")]
    extract(wat=[f"{server.url}/{NAME}"])
    first, second = server.requests
    assert second.time - first.time >= 2


def test_nobody_there(extract: Extract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    with serving() as gone:
        pass
    with pytest.raises(UserError, match=rf"{gone.url}/{NAME}: not fetched in 8 tries"):
        extract(wat=[f"{gone.url}/{NAME}"])


def test_what_is_no_archive_is_named_by_its_address(
    server: ArchiveServer, extract: Extract
) -> None:
    server.files[f"/{NAME}"] = b"<html>welcome</html>" * 1000
    with pytest.raises(UserError, match=rf"^{server.url}/{NAME}: not a WARC or WAT archive") as it:
        extract(wat=[f"{server.url}/{NAME}"])
    assert it.value.exit_code not in NEVER_RETRIED  # another time the server may have it


@pytest.mark.parametrize("at", ["write", "truncate"])
def test_a_full_disk_is_nobody_elses_fault(at: str, server: ArchiveServer) -> None:
    """It is told as it is, not tried again: the runner knows it by its number."""

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    disk = mock.Mock(wraps=io.BytesIO(), **{f"{at}.side_effect": refuse})
    file = http.HttpFile(f"{server.url}/{NAME}", disk, lambda: False)
    with pytest.raises(OSError, match="No space left") as caught:
        file.read(lambda: None)
    assert caught.value.errno == errno.ENOSPC


def test_a_stop_ends_a_fetch(server: ArchiveServer, tmp_path: Path) -> None:
    server.faults[f"/{NAME}"] += [faulty.stall(5000)]
    stop = StopFlag()
    root = Root(extract=ExtractSettings(wat=["x"]))
    task = Task("extract", 0, (f"{server.url}/{NAME}",))
    attempt = Attempt(Run(tmp_path / "run", root), task, tmp_path / "store", stop)
    fetched = inputs.fetched(attempt)
    _, get = next(fetched)
    stop.signal = 15
    began = time.monotonic()
    with pytest.raises(Stopped):
        get()
    fetched.close()
    assert time.monotonic() - began < 5
    assert not list(tmp_path.glob("*fetched"))


def test_many_files_of_one_task(server: ArchiveServer, tmp_path: Path) -> None:
    """They come in order, the next one early, and not more than two are there at once."""
    names = [f"{number}.wat.gz" for number in range(5)]
    for name in names:
        server.files[f"/{name}"] = name.encode()
    (tmp_path / "local.wat").write_text("here")
    reads = (*(f"{server.url}/{name}" for name in names[:3]), str(tmp_path / "local.wat"))
    reads += tuple(f"{server.url}/{name}" for name in names[3:])
    root = Root(extract=ExtractSettings(wat=["x"], max_requests_per_s=1000))
    run = Run(tmp_path / "run", root)
    attempt = Attempt(run, Task("extract", 0, reads), tmp_path / "store", StopFlag())
    contents, most = [], 0
    for reference, get in inputs.fetched(attempt):
        path = get()
        time.sleep(0.1)
        most = max(most, len(list((tmp_path / "store.fetched").glob("*"))))
        contents.append((reference, path.read_text()))
    assert contents == [
        (name, "here" if name.endswith("local.wat") else name.rpartition("/")[2]) for name in reads
    ]
    assert most == 2
    assert not (tmp_path / "store.fetched").exists()
    assert (tmp_path / "local.wat").exists()


def references(tmp_path: Path, **settings: object) -> list[str]:
    root = Root(extract=ExtractSettings(**settings))
    return [task.reads[0] for task in plan(Run(tmp_path / "run", root))]


def test_a_list_at_an_address(server: ArchiveServer, tmp_path: Path, extract: Extract) -> None:
    content = gzip.compress(f"{NAME}\n".encode())
    server.files[f"/mirror/{CRAWL}/wat.paths.gz"] = content
    server.files[f"/mirror/{NAME}"] = BODY
    address = f"{server.url}/mirror/{CRAWL}/wat.paths.gz"
    assert references(tmp_path, wat=[address]) == [f"{server.url}/mirror/{NAME}"]
    server.faults[f"/mirror/{CRAWL}/wat.paths.gz"] += [faulty.status(503), faulty.cut(9)]
    assert extract(wat=[address]) == extract(wat=[f"{server.url}/{NAME}"])


def test_a_run_asks_for_a_list_once(server: ArchiveServer, tmp_path: Path) -> None:
    """So what is done can be planned again without the network, and no file is asked about."""
    server.files[f"/{CRAWL}/wat.paths.gz"] = gzip.compress(f"{NAME}\n".encode())
    root = Root(extract=ExtractSettings(wat=[f"{server.url}/{CRAWL}/wat.paths.gz"]))
    run = Run(tmp_path / "run", root)
    run.folder.mkdir()
    first = STAGE.planned(run, 0, 0)
    assert STAGE.planned(run, 0, 0) == first
    assert [request.path for request in server.requests] == [f"/{CRAWL}/wat.paths.gz"]


def test_a_missing_list_is_named(server: ArchiveServer, tmp_path: Path) -> None:
    address = f"{server.url}/{CRAWL}/wat.paths.gz"
    with pytest.raises(MissingInput, match=rf"extract\.wat: {address}: HTTP 404"):
        references(tmp_path, wat=[address])

"""Of the files of a task some may be of no use: they are named, and cost themselves only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset_build.extract import ExtractSettings
from pipeline import remote
from pipeline.config import BadInput, MissingInput, UserError
from tests.dataset_build.extract import archive_server as faulty
from tests.dataset_build.extract.archive_server import ArchiveServer, serving
from tests.dataset_build.extract.conftest import Extract, members, metadata


def archive(number: int, broken: int = 0) -> bytes:
    """A WAT file of twenty pages of a picture each, the last `broken` of which are damaged."""
    pages = members(
        *(
            metadata(f"http://a{i}.example/", [{"url": "/x.jpg", "alt": f"dog {i} of {number}"}])
            for i in range(20)
        )
    )
    for i in range(20 - broken, 20):
        pages[i] = pages[i][:20] + bytes(len(pages[i]) - 20)
    return b"".join(pages)


def texts(number: int, pages: int = 20) -> list[str]:
    return [f"dog {i} of {number}" for i in range(pages)]


@pytest.fixture
def server() -> Iterator[ArchiveServer]:
    with serving() as made:
        yield made


def test_files_of_no_use_are_left_out_as_far_as_may_be(tmp_path: Path, extract: Extract) -> None:
    contents = [archive(0), b"<html>no archive</html>" * 9, archive(2, broken=5), archive(3)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.wat.gz").write_bytes(content)
    patterns = {"wat": [f"{tmp_path}/*.wat.gz"], "files_per_task": 4}
    with pytest.raises(BadInput, match=r"1\.wat\.gz: not a WARC or WAT archive"):
        extract(**patterns)
    with pytest.raises(BadInput, match=r"2\.wat\.gz: 5 damaged records;.*max_lost is 5\.0%"):
        extract(**patterns, max_failed_files=0.3)
    rows, stats = extract(**patterns, max_failed_files=0.5)
    assert [row["text"] for row in rows] == [*texts(0), *texts(2, 15), *texts(3)]
    assert stats.counts["failed_files"] == 2
    assert stats.balanced()
    one, two = (stats.warnings[f"{tmp_path}/{number}.wat.gz"] for number in (1, 2))
    assert one.startswith("left out, by extract.max_failed_files: not a WARC or WAT archive")
    assert two.startswith("left out, by extract.max_failed_files: 5 damaged records")
    assert len(stats.warnings) == 2


def test_a_file_alone_in_its_task_fails_it(tmp_path: Path, extract: Extract) -> None:
    (tmp_path / "a.wat.gz").write_bytes(b"no archive")
    with pytest.raises(BadInput):
        extract(wat=[f"{tmp_path}/a.wat.gz"], max_failed_files=0.99)


def test_what_a_server_does_not_have_is_left_out_and_what_it_may_have_is_not(
    server: ArchiveServer, tmp_path: Path, extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    server.files |= {f"/{n}.wat.gz": archive(n) for n in (0, 2, 3)} | {"/4.wat.gz": b"<html>" * 9}
    (tmp_path / "wat.paths").write_text("".join(f"{n}.wat.gz\n" for n in range(5)))
    listed = {"wat": [f"{tmp_path}/wat.paths"], "base_url": server.url, "files_per_task": 5}
    with pytest.raises(MissingInput, match=rf"{server.url}/1\.wat\.gz: HTTP 404"):
        extract(**listed)
    with pytest.raises(UserError, match=rf"{server.url}/4\.wat\.gz: not a WARC") as caught:
        extract(**listed, max_failed_files=0.2)
    assert not isinstance(caught.value, BadInput)  # another time it may come whole
    rows, stats = extract(**listed, max_failed_files=0.4)
    assert [row["text"] for row in rows] == [*texts(0), *texts(2), *texts(3)]
    assert stats.counts["failed_files"] == 2
    server.faults["/2.wat.gz"] += [faulty.status(503)] * 99
    server.files["/4.wat.gz"] = archive(4)
    with pytest.raises(UserError, match=rf"{server.url}/2\.wat\.gz: not fetched in"):
        extract(**listed, max_failed_files=0.4)


def test_how_many_may_fail_decides_no_result() -> None:
    assert ExtractSettings(max_failed_files=0.5).identity() == ExtractSettings().identity()

"""A build whose tasks, each a process, fetch from one server."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset_build.extract import STAGE, ExtractSettings
from pipeline import recipe, runner
from pipeline.config import dump
from pipeline.local import LocalExecutor, LocalSettings
from pipeline.stage import Run
from pipeline.stop import StopFlag

from . import archive_server as faulty
from .archive_server import ArchiveServer, serving
from .test_remote import archive


def extract(run: Run, workers: int, max_failed_tasks: float = 0.0) -> None:
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text(dump(run.config))
    stop = StopFlag()
    executor = LocalExecutor(LocalSettings(workers=workers, attempts=2), stop)
    runner.advance(run, [STAGE], executor, stop, runner.Unwatched(), max_failed_tasks)


def filled(server: ArchiveServer, count: int) -> list[str]:
    for number in range(count):
        server.files[f"/{number}.warc.wat.gz"] = archive(number, pages=3)
    return [f"{server.url}/{number}.warc.wat.gz" for number in range(count)]


def test_all_tasks_keep_one_rate(tmp_path: Path) -> None:
    """By the server's log: requests of four processes at a time, 2 a second."""
    per_s = 2.0
    with serving() as server:
        settings = ExtractSettings(wat=filled(server, 6), max_requests_per_s=per_s)
        run = Run(tmp_path / "run", recipe.Config(extract=settings))
        extract(run, workers=4)
        assert len(run.manifests("extract")) == 6
        times = sorted(request.time for request in server.requests)
    assert len(times) == 6
    late_s = 0.3  # by so much may a request come after its moment, and so nearer to the next
    for first in range(6):
        for last in range(first + 1, 6):
            assert times[last] - times[first] >= (last - first) / per_s - late_s


def test_a_file_that_is_not_there_may_be_left_out(tmp_path: Path) -> None:
    with serving() as server:
        addresses = filled(server, 3)
        del server.files["/1.warc.wat.gz"]
        server.faults["/0.warc.wat.gz"] += [faulty.status(503)]
        run = Run(tmp_path / "run", recipe.Config(extract=ExtractSettings(wat=addresses)))
        extract(run, workers=2, max_failed_tasks=0.4)
        asked = [request.path for request in server.requests]
    assert [manifest.index for manifest in run.manifests("extract")] == [0, 2]
    (reason,) = run.left_out("extract").values()
    assert f"{addresses[1]}: HTTP 404" in reason
    assert sorted(asked) == sorted(f"/{number}.warc.wat.gz" for number in (0, 0, 1, 2))


def test_other_rates_give_the_same_tasks(tmp_path: Path) -> None:
    fingerprints = []
    for per_s in (1.0, None):
        settings = ExtractSettings(wat=["https://a.example/a.wat"], max_requests_per_s=per_s)
        run = Run(tmp_path, recipe.Config(extract=settings))
        fingerprints.append([planned.fingerprint for planned in STAGE.planned(run, 0, 0)])
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("per_s", [0, -1])
def test_a_rate_is_a_number_above_none(per_s: float) -> None:
    with pytest.raises(ValueError, match="max_requests_per_s"):
        ExtractSettings(max_requests_per_s=per_s)

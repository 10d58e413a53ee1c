"""The stage `sample_web`: writes a whole small web by seed, and serves its pictures.

Settings and plan are here; what the tasks write is made by this folder's other modules, which are
imported only where the work is done.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config import Settings, UserError
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats
from pipeline.stop import shielded


class SampleWebSettings(Settings):
    """A made-up web: how large it is and how dirty."""

    seed: int = 0
    """Everything follows from it: equal settings give equal bytes."""
    pairs: int = Field(8000, ge=10)
    """Distinct pictures that are fit to train on, each with a caption."""
    candidates: int = Field(0, ge=0)
    """Pairs that the archive and the pool cite in all; pictures are cited again under new addresses
    until there are so many. 0: as many as the pairs, their repetitions and the dirt are."""
    dirt: float = Field(0.12, ge=0, le=2)
    """Dirty addresses (dead, lying, hostile, without a caption) per pair; 0 for a clean web."""
    pool_share: float = Field(0.15, ge=0, le=1)
    """Share of the pairs that only `pool.parquet` knows, not the archive."""
    repeat_share: float = Field(0.16, ge=0, le=1)
    """Share of the archive's pairs that are cited again, of which half are plain duplicates."""
    lazy_share: float = Field(0.03, ge=0, le=0.1)
    """Share of the archive's pairs whose address only the HTML has, in `data-src`."""
    archive_files: int = Field(4, ge=1)
    """WARC files, each with its WAT; the first half is one crawl, the rest the next."""
    shortest_side: int = Field(80, ge=32)
    """Least side of a picture, pixels."""
    longest_side: int = Field(320, ge=64, le=512)
    """Greatest side of a picture, pixels."""
    evaluation_per_class: int = Field(10, gt=0)
    """Pictures a class in `evaluation/sample_web.parquet`."""
    unseen_per_class: int = Field(30, gt=0)
    """Pictures a class in `evaluation/sample_web_unseen.parquet`: the combinations of shape and
    colour that no training picture or caption has."""
    articles: int = Field(420, ge=50)
    """Articles of the encyclopedia."""
    hours: int = Field(6, gt=0)
    """Hourly page-view files."""
    pictures: str = ""
    """A tar.gz of labelled pictures, `class/name.jpg`. If it is set, the web shows these pictures
    with captions made from their classes, and there is only a pool: no archive and no dumps."""
    held_out: int = Field(300, gt=0)
    """Labelled pictures a class that are kept out of the web, for `evaluation/NAME.parquet`; NAME
    is the archive's name up to the first hyphen or dot."""


def plan(run: Run) -> list[Task]:
    """One task per block of pictures and per archive file, one for each of the rest."""
    settings: SampleWebSettings = run.settings("sample_web")
    if settings.longest_side < 1.3 * settings.shortest_side:
        raise UserError(
            f"sample_web.longest_side: {settings.longest_side} leaves no room above the shortest "
            f"side, {settings.shortest_side}; raise it to {round(1.3 * settings.shortest_side)}"
        )
    reads: tuple[str, ...] = ()
    if settings.pictures:
        reads = tuple(run.find(settings.pictures))
        params: list[dict[str, Any]] = [{"do": "labelled_site"}, {"do": "labelled_pool"}]
    else:
        from sample_web.dirt import pictures
        from sample_web.site import picture_files

        files = picture_files(pictures(settings))
        params = [{"do": "pictures", "first": a, "stop": b, "name": n} for a, b, n in files]
        params += [{"do": "archive", "file": file} for file in range(settings.archive_files)]
        parts = ("site", "pool", "evaluation", "encyclopedia", "page_views", "wordnet")
        params += [{"do": part} for part in parts]
    return [Task("sample_web", i, reads, one) for i, one in enumerate(params)]


def work(attempt: Attempt) -> Stats:
    """Write one part of the web."""
    return _PARTS[attempt.task.params["do"]](attempt)


def _pictures(attempt: Attempt) -> Stats:
    from sample_web import pairs, site

    settings, params = attempt.settings, attempt.task.params
    first, stop = params["first"], params["stop"]

    def beat(done: int) -> None:
        attempt.progress(done, stop - first, "pictures")
        if done % 100 == 0:
            attempt.stop.check()

    def picture(index: int) -> bytes:
        return pairs.picture(settings, index)

    size = site.write_pictures(attempt.folder / params["name"], first, stop, picture, beat)
    stats = _made(stop - first)
    stats.counts["picture_bytes"] = size
    return stats


def _archive(attempt: Attempt) -> Stats:
    from sample_web import archive

    def beat(done: int) -> None:
        attempt.progress(done, None, "images")
        attempt.stop.check()

    root, file = attempt.folder / "archive", attempt.task.params["file"]
    pages, images = archive.write_file(root, attempt.settings, file, beat)
    if file == 0:
        archive.write_paths(root, attempt.settings)
    stats = _made(images)
    stats.counts["pages"] = pages
    return stats


def _site(attempt: Attempt) -> Stats:
    from sample_web import dirt, pairs, pool, site
    from sample_web.pages import mirrored
    from sample_web.vocabulary import HOSTS

    settings = attempt.settings

    def routes() -> Iterator[site.Route]:
        yield from site.robots((*HOSTS, dirt.ROBOTS_HOST))
        for index in range(settings.pairs):
            attempt.progress(index, settings.pairs, "routes")
            here = pairs.address_of(settings, index)
            yield site.Route(here.host, here.path, body=index)
            if pairs.repeat_kind(settings, index) == "alias":
                there = pairs.alias_of(settings, index)
                yield site.Route(there.host, there.path, "alias", body=index)
        for fault in dirt.faults(settings):
            yield from site.fault_routes(fault)

    count = site.write_site(attempt.folder / "site.sqlite", routes(), dirt.pictures(settings))
    numbers = dirt.all_counts(settings)
    numbers["also_in_pool"] = sum(pool.also_in_pool(settings, i) for i in range(settings.pairs))
    numbers["mirror"] = mirrored(settings)
    (attempt.folder / "dirt.json").write_text(site.dirt_json(numbers))
    stats = _made(count)
    stats.counts.update({f"dirt_{kind}": number for kind, number in numbers.items()})
    return stats


def _pool(attempt: Attempt) -> Stats:
    from sample_web import pool

    settings = attempt.settings
    count = pool.write_pool(attempt.folder / "pool.parquet", pool.rows(settings), settings.seed)
    return _made(count)


def _evaluation(attempt: Attempt) -> Stats:
    from sample_web import pool, scenes

    settings, count = attempt.settings, 0
    for name, shown, per_class in (
        ("sample_web", scenes.seen_classes(), settings.evaluation_per_class),
        ("sample_web_unseen", scenes.unseen_classes(), settings.unseen_per_class),
    ):
        path = attempt.folder / "evaluation" / f"{name}.parquet"
        pictures = scenes.evaluation_set(settings.seed, shown, per_class)
        # Whatever is shown, the choice is among all classes: the unseen ones are no easier.
        classes = scenes.class_names()
        count += pool.write_evaluation(path, pictures, classes, scenes.TEMPLATES)
    return _made(count)


def _encyclopedia(attempt: Attempt) -> Stats:
    from sample_web import encyclopedia

    settings = attempt.settings
    path = attempt.folder / "encyclopedia.xml.bz2"
    return _made(encyclopedia.write(path, settings.seed, settings.articles))


def _page_views(attempt: Attempt) -> Stats:
    from sample_web import encyclopedia, page_views

    settings = attempt.settings
    titles = encyclopedia.titles(settings.seed, settings.articles)
    folder = attempt.folder / "pageviews"
    return _made(page_views.write(folder, titles, settings.seed, settings.hours))


def _wordnet(attempt: Attempt) -> Stats:
    from sample_web import wordnet

    return _made(wordnet.write(attempt.folder / "wordnet"))


def _labelled_site(attempt: Attempt) -> Stats:
    from sample_web import labelled

    return _made(labelled.write_site(attempt.folder, attempt.inputs()[0], attempt.settings))


def _labelled_pool(attempt: Attempt) -> Stats:
    from sample_web import labelled

    return _made(labelled.write_pool(attempt.folder, attempt.inputs()[0], attempt.settings))


def _made(rows: int) -> Stats:
    return Stats(rows_in=rows, rows_out=rows)


_PARTS: dict[str, Callable[[Attempt], Stats]] = {
    "pictures": _pictures,
    "archive": _archive,
    "site": _site,
    "pool": _pool,
    "evaluation": _evaluation,
    "encyclopedia": _encyclopedia,
    "page_views": _page_views,
    "wordnet": _wordnet,
    "labelled_site": _labelled_site,
    "labelled_pool": _labelled_pool,
}

STAGE = Stage(name="sample_web", needs=(), plan=plan, work=work, unit="records")


@contextlib.contextmanager
def serve(run: Run) -> Iterator[Mapping[str, str]]:
    """Serve the run's sample web on a free port of 127.0.0.1 while the context lasts.

    Yields the variable that sends hosts ending in `.example` there. The server is a process of its
    own, which ends with this one however this one ends; it writes RUN/sample_web/logs/server.log,
    and to canary.txt beside it every request that a guarded reader must never make.
    """
    folder = run.stage_folder("sample_web").absolute()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    port_file = logs / f"port.{os.getpid()}"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "sample_web.server", str(folder / "out" / "site.sqlite")]
    command += ["--port-file", str(port_file), "--canary", str(logs / "canary.txt")]
    command.append("--with-parent")
    with (logs / "server.log").open("a") as log, shielded():
        server = subprocess.Popen(
            command, cwd=Path(__file__).parents[1], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield {"OPENWIT_CONNECT_TO": f".example=127.0.0.1:{_port(server, port_file, logs)}"}
    finally:
        server.kill()  # it only reads; signals to stop are kept from it
        server.wait()
        port_file.unlink(missing_ok=True)


def _port(server: subprocess.Popen[bytes], port_file: Path, logs: Path, wait_s: float = 30) -> int:
    """The port, once the server answers: it writes the file when it listens."""
    until = time.monotonic() + wait_s
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            return int(port_file.read_text())
        time.sleep(0.02)
    raise UserError(f"the sample web's server did not start; see {logs / 'server.log'}")

"""Candidates: every picture of the web that says something about itself.

Common Crawl's WAT files are the compact source (metadata of pages), WARC files are the pages
themselves, parquet pools are what others have extracted before. One task a file, streamed.
"""

from __future__ import annotations

import re
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline import remote
from pipeline.config import ConfigError, Settings
from pipeline.manifest import Stats
from pipeline.stage import Attempt, Run, Stage, Task

if TYPE_CHECKING:
    from dataset_build.extract.candidates import Candidates

_SOURCES = (
    "wat",
    "warc",
    "parquet",
    "snapshot",
    "base_url",
)  # of these a task has its file and its name
_SNAPSHOT = re.compile(r"CC-(?:MAIN|NEWS)-\d{4}(?:-\d{2})?(?:-\d{2})?")


class ExtractSettings(Settings):
    """Where candidates come from and what a caption must be.

    A pattern is a path with wildcards, a folder, an address (`https://…`; `s3://…`, also with
    wildcards, and whatever else fsspec reads), or `stage:glob` for another stage's outputs. Where
    it names lists (`*.paths`, `*.paths.gz`, as Common Crawl publishes them), the files listed are
    read: relative to `base_url` if given, to the folder above `crawl-data` if the list lies
    somewhere below one, otherwise to the list's own folder.

    What is elsewhere is fetched whole, beside what the task writes, and deleted once it is read: a
    task needs room for one such file, or two if it reads several. It is known by its address: it
    is taken that nobody puts another file there.
    """

    operational: ClassVar[frozenset[str]] = frozenset({"max_requests_per_s"})

    wat: tuple[str, ...] = ()
    """Common Crawl metadata files (`*.warc.wat.gz`) or lists of them."""
    warc: tuple[str, ...] = ()
    """Archived pages (`*.warc.gz`) or lists of them."""
    parquet: tuple[str, ...] = ()
    """Pools with a column of addresses and one of texts, e.g. LAION, CommonPool, COYO."""
    base_url: str = Field(default="", pattern=r"^(\w[\w+.-]*://[^/]+.*)?$")
    """Where the files of lists are fetched from, e.g. `https://data.commoncrawl.org/` or
    `s3://commoncrawl/`; if empty, they are where their list is."""
    max_requests_per_s: float | None = Field(default=10, gt=0)
    """Requests to a host or bucket in a second, of all tasks of the run together; null: any number.
    Common Crawl's web servers bear a few thousand of all their users together. A request there is
    a whole file: 10 WAT files a second are 29 Gbit/s. At s3:// it is 32 MiB of one, and a bucket
    bears thousands: raise it."""
    snapshot: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$")
    """Name of the crawl or pool; if empty, the `CC-MAIN-YYYY-WW` in a file's path, else `pool` for
    parquet and `archive` for the rest. Of equal pairs the one with the smallest (snapshot, file) is
    kept. A snapshot is also what a dataset grows by: those that are there are not read again."""
    url_column: str = ""
    """Column of a pool's addresses; if empty, found by its usual names (url, URL, image_url)."""
    text_column: str = ""
    """Column of a pool's texts; if empty, found by its usual names (text, TEXT, caption, alt …)."""
    min_chars: int = Field(default=5, ge=1)
    """Shorter captions are dropped."""
    max_chars: int = Field(default=512, ge=1)
    """Longer captions end at the last word that fits; CLIP reads 77 tokens, some 300 characters."""
    min_words: int = Field(default=2, ge=1)
    """Captions of fewer words are dropped: most are "logo", "Facebook" and the like."""
    denied_extensions: tuple[str, ...] = ("svg", "svgz", "ico", "gif")
    """Pictures dropped by the ending of their path: drawings, icons, spacers and animations."""


def plan(run: Run) -> list[Task]:
    """A task for each file; its output is numbered within the snapshot."""
    from dataset_build.extract import inputs

    settings: ExtractSettings = run.settings("extract")
    if not (settings.wat or settings.warc or settings.parquet):
        raise ConfigError("extract: no source is set; give at least one of wat, warc, parquet")
    found_by_snapshot: dict[str, list[tuple[str, str]]] = {}
    for kind in ("wat", "warc", "parquet"):
        for reference in sorted(inputs.references(run, kind)):
            match = _SNAPSHOT.search(reference)
            named = match.group() if match else "pool" if kind == "parquet" else "archive"
            snapshot = settings.snapshot or named
            found_by_snapshot.setdefault(snapshot, []).append((kind, reference))
    tasks: list[Task] = []
    for snapshot, files in sorted(found_by_snapshot.items()):
        for number, (kind, reference) in enumerate(files):
            params = {"kind": kind, "snapshot": snapshot, "number": number}
            tasks.append(Task("extract", len(tasks), (reference,), params, ignores=_SOURCES))
    return tasks


def work(attempt: Attempt) -> Stats:
    """Extract one file into `candidates-SNAPSHOT-NUMBER.parquet`."""
    from dataset_build.extract import candidates, inputs

    settings, params = attempt.settings, attempt.task.params
    snapshot, name = str(params["snapshot"]), remote.name_of(attempt.task.reads[0])
    target = attempt.folder / f"candidates-{snapshot}-{params['number']:05d}.parquet"
    with (
        closing(inputs.fetched(attempt)) as fetched,
        candidates.Candidates(target, settings, snapshot, name) as out,
    ):
        for reference, path in fetched:
            if remote.is_remote(reference):
                out.stats.counts["bytes_fetched"] += path.stat().st_size
            with inputs.named(reference, path):
                _extract(attempt, path, out)
    return out.stats


def _extract(attempt: Attempt, path: Path, out: Candidates) -> None:
    """Put what one file holds to `out`."""
    from dataset_build.extract import pool, warc, wat

    settings: ExtractSettings = attempt.settings
    kind = attempt.task.params["kind"]

    def progress(done: int, total: int, unit: str) -> None:
        attempt.stop.check()
        attempt.progress(done, total, unit)

    if kind == "parquet":
        pool.extract(
            path,
            out,
            partial(progress, unit="row groups"),
            name=str(attempt.task.params["snapshot"]),
            url_column=settings.url_column,
            text_column=settings.text_column,
        )
    else:
        size = path.stat().st_size
        extract = wat.extract if kind == "wat" else warc.extract
        extract(path, out, lambda done: progress(done, size, "bytes"))


STAGE = Stage("extract", needs=(), plan=plan, work=work, unit="candidates", can_lose_tasks=True)

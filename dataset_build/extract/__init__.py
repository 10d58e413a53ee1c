"""Candidates: every picture of the web that says something about itself.

Common Crawl's WAT files are the compact source (metadata of pages), WARC files are the pages
themselves, parquet pools are what others have extracted before. One task a file, streamed.
"""

from __future__ import annotations

import gzip
import re
from functools import partial
from pathlib import Path

from pydantic import Field

from pipeline.config import ConfigError, MissingInput, Settings
from pipeline.manifest import Stats
from pipeline.stage import Attempt, Run, Stage, Task

_SOURCES = ("wat", "warc", "parquet", "snapshot")  # of these a task has its file and its name
_SNAPSHOT = re.compile(r"CC-(?:MAIN|NEWS)-\d{4}(?:-\d{2})?(?:-\d{2})?")


class ExtractSettings(Settings):
    """Where candidates come from and what a caption must be.

    A pattern is a path with wildcards, or `stage:glob` for another stage's outputs. Where it names
    lists (`*.paths`, `*.paths.gz`, as Common Crawl publishes them), the files listed are read:
    relative to the folder above `crawl-data` if the list lies somewhere below one, otherwise to
    the list's own folder.
    """

    wat: tuple[str, ...] = ()
    """Common Crawl metadata files (`*.warc.wat.gz`) or lists of them."""
    warc: tuple[str, ...] = ()
    """Archived pages (`*.warc.gz`) or lists of them."""
    parquet: tuple[str, ...] = ()
    """Pools with a column of addresses and one of texts, e.g. LAION, CommonPool, COYO."""
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
    settings: ExtractSettings = run.settings("extract")
    if not (settings.wat or settings.warc or settings.parquet):
        raise ConfigError("extract: no source is set; give at least one of wat, warc, parquet")
    found_by_snapshot: dict[str, list[tuple[str, str]]] = {}
    for kind in ("wat", "warc", "parquet"):
        found: set[str] = set()
        for pattern in getattr(settings, kind):
            try:
                references = run.find(pattern)
            except MissingInput as error:
                raise MissingInput(f"extract.{kind}: {error}") from None
            for reference in references:
                if reference.endswith((".paths", ".paths.gz")):
                    found.update(_listed(run, reference, f"extract.{kind}"))
                else:
                    found.add(reference)
        for reference in sorted(found):
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
    from dataset_build.extract import candidates, pool

    reference, params = attempt.task.reads[0], attempt.task.params
    settings: ExtractSettings = attempt.settings
    path, snapshot = attempt.inputs()[0], str(params["snapshot"])
    target = attempt.folder / f"candidates-{snapshot}-{params['number']:05d}.parquet"

    def progress(done: int, total: int, unit: str) -> None:
        attempt.stop.check()
        attempt.progress(done, total, unit)

    with candidates.Candidates(target, settings, snapshot, Path(reference).name) as out:
        if params["kind"] == "parquet":
            pool.extract(
                path,
                out,
                partial(progress, unit="row groups"),
                name=snapshot,
                url_column=settings.url_column,
                text_column=settings.text_column,
            )
        else:
            from dataset_build.extract import warc, wat

            size = path.stat().st_size
            extract = wat.extract if params["kind"] == "wat" else warc.extract
            extract(path, out, lambda done: progress(done, size, "bytes"))
    return out.stats


def _listed(run: Run, reference: str, setting: str) -> list[str]:
    """References to the files that a list names."""
    stage, colon, name = reference.partition(":")
    if not colon or "/" in stage:
        stage, name = "", reference
    folder = Path(name).parent
    parts = folder.parts
    root = Path(*parts[: parts.index("crawl-data")]) if "crawl-data" in parts else folder
    path = run.path(reference)
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{setting}: {path}: not a list of paths ({error})") from None
    prefix = f"{stage}:" if stage else ""
    listed = [f"{prefix}{root / line.strip()}" for line in text.splitlines() if line.strip()]
    for entry in listed:
        if not run.path(entry).is_file():
            raise MissingInput(
                f"{setting}: {entry}: listed in {reference}, but not there; download it below "
                f"{root}, or take its line off the list"
            )
    return listed


STAGE = Stage("extract", needs=(), plan=plan, work=work, unit="candidates", can_lose_tasks=True)

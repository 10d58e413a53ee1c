"""Candidates: every picture of the web that says something about itself.

Common Crawl's WAT files are the compact source (metadata of pages), WARC files are the pages
themselves, pools are what others have extracted before. A task streams its files in turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from dataset_build import functions
from dataset_build.extract.columns import KNOWN, Columns, Known
from dataset_build.extract.languages import CODE, SETTING
from pipeline import remote
from pipeline.config import BadInput, ConfigError, MissingInput, Settings, UserError
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats

if TYPE_CHECKING:
    from dataset_build.extract.candidates import Candidates

# Of these a task has its files and its name.
_SOURCES = ("wat", "warc", "pool", "snapshot", "base_url", "files_per_task", "bytes_per_task")
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

    operational: ClassVar[frozenset[str]] = frozenset(
        {"max_failed_files", "max_lost", "max_requests_per_s"}
    )

    wat: tuple[str, ...] = ()
    """Common Crawl metadata files (`*.warc.wat.gz`): paths with wildcards, folders, addresses
    (`https://…`, `s3://…`), or lists of files (`wat.paths.gz`)."""
    warc: tuple[str, ...] = ()
    """Archived pages (`*.warc.gz`), or lists of them, named as `wat` are."""
    pool: tuple[str, ...] = ()
    """Tables with a column of addresses and one of texts, e.g. LAION, CommonPool, COYO, CC12M:
    `.parquet`, `.csv`, `.tsv`, the last two also `.gz`."""
    columns: Known | Columns = "auto"
    """What a pool calls its columns: the name of a known pool (cc3m, cc12m, coyo, datacomp, laion),
    or `{url: link, text: title}`, with `names: [link, title]` for files without a first line of
    names. `auto`: the usual names (url, image_url …; text, caption, alt …)."""
    base_url: str = Field(default="", pattern=r"^(\w[\w+.-]*://[^/]+.*)?$")
    """Where the files of lists are fetched from, e.g. `https://data.commoncrawl.org/` or
    `s3://commoncrawl/`. Empty: they are relative to their list's folder, or, where that lies below
    a folder `crawl-data`, to the one that holds it."""
    max_requests_per_s: float | None = Field(default=10, gt=0)
    """Requests to a host or bucket in a second, of all tasks of the run together; null: any number.
    Common Crawl's web servers bear a few thousand of all their users together. A request there is
    a whole file: 10 WAT files a second are 29 Gbit/s. At s3:// it is 32 MiB of one, and a bucket
    bears thousands: raise it."""
    files_per_task: int = Field(default=1, ge=1)
    """Files that a task reads, one after the other. One is best for a few; tens of thousands, as a
    crawl has, are fewer tasks, each of some ten minutes, with 64."""
    max_failed_files: float = Field(default=0, ge=0, lt=1)
    """Share of a task's files that may be of no use, from 0 to less than 1: not there, of another
    kind, or damaged more than `max_lost` bears, when what can be read of them is kept. The log and
    the report name them. One more, and the task fails. What a server may still give is not left
    out."""
    bytes_per_task: int = Field(default=256 << 20, gt=0)
    """Larger parquet files on this machine's disks are read by several tasks, some row groups
    each."""
    snapshot: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$")
    """Name of the crawl or pool; if empty, the `CC-MAIN-YYYY-WW` in a file's path, else `pool` for
    pools and `archive` for the rest. Of equal pairs the one with the smallest (snapshot, file) is
    kept. A snapshot is also what a dataset grows by: those that are there are not read again."""
    max_lost: float = Field(default=0.05, ge=0, le=1)
    """Share of a WAT or WARC file's bytes that damage may cost, 0 to 1; a file that loses more
    fails. One damaged record, or one that is cut off, any file bears unless this is 0. The log
    names each damaged file. What has been read already is not judged again."""
    figure_captions: bool = False
    """Whether the `<figcaption>` of the nearest `<figure>` that a picture is in is a text of it as
    well, after `alt` and `title`; all pictures of a figure have its caption. Of `warc` only: WAT
    files have none."""
    min_chars: int = Field(default=5, ge=1)
    """Shorter captions are dropped."""
    max_chars: int = Field(default=512, ge=1)
    """Longer captions end at the last word that fits, or at the last letter where words have no
    spaces between them; CLIP reads 77 tokens, some 300 characters."""
    min_words: int = Field(default=2, ge=1)
    """Captions of fewer words are dropped: most are "logo", "Facebook" and the like."""
    language: str = Field(default="", pattern=r"^([\w.]+:\w+)?$")
    """What tells the language of a caption: `package.module:function`, importable from the folder
    that the build is started in. It takes a list of texts, each another, and returns a list with
    the code of each, such as `en`, "" where it cannot tell. `dataset_build.language:codes` is one.
    Empty: captions of all languages are kept."""
    languages: tuple[Annotated[str, Field(pattern=CODE)], ...] = Field(("en", ""), min_length=1)
    """The codes of captions that are kept, if `language` is set; "" for those whose language it
    cannot tell: names, and most captions of two or three words. `match` keeps what of them holds a
    query."""
    denied_extensions: tuple[str, ...] = ("svg", "svgz", "ico", "gif")
    """Pictures dropped by the ending of their path: drawings, icons, spacers and animations."""

    @field_validator("languages")
    @classmethod
    def _are_told(cls, codes: tuple[str, ...], given: ValidationInfo) -> tuple[str, ...]:
        if codes != cls.model_fields["languages"].default and not given.data.get("language"):
            raise ValueError("nothing tells the languages apart: set extract.language as well")
        return codes


def plan(run: Run) -> list[Task]:
    """A task for every `files_per_task` files of a kind and snapshot, numbered within it; several
    for a large one."""
    from dataset_build.extract import inputs

    settings: ExtractSettings = run.settings("extract")
    if not (settings.wat or settings.warc or settings.pool):
        raise ConfigError("extract: no source is set; give at least one of wat, warc, pool")
    language = settings.language
    told = {"language": functions.identity(SETTING, language)} if language else {}
    found: dict[str, dict[str, list[str]]] = {}  # by snapshot and kind
    for kind in ("wat", "warc", "pool"):
        for reference in inputs.references(run, kind):
            match = _SNAPSHOT.search(reference)
            named = match.group() if match else "pool" if kind == "pool" else "archive"
            snapshot = settings.snapshot or named
            found.setdefault(snapshot, {}).setdefault(kind, []).append(reference)
    tasks: list[Task] = []
    for snapshot, kinds in sorted(found.items()):
        number = 0
        for kind, references in kinds.items():
            for reads, part in _shares(run, references, settings):
                params = {"kind": kind, "snapshot": snapshot, "number": number, **part, **told}
                tasks.append(Task("extract", len(tasks), reads, params, ignores=_SOURCES))
                number += 1
    return tasks


def _shares(
    run: Run, references: Sequence[str], settings: ExtractSettings
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """What each task reads: some files, or of one a range of row groups and their bytes."""
    from dataset_build.extract import inputs, pool

    together: list[str] = []
    for reference in references:
        size, parts = inputs.size(run, reference) or 0, []
        if reference.lower().endswith(".parquet") and size > settings.bytes_per_task:
            parts = pool.parts(run.path(reference), settings.bytes_per_task)
        if len(parts) < 2:
            together.append(reference)
        if together and (len(parts) > 1 or len(together) == settings.files_per_task):
            yield tuple(together), {}
            together = []
        for first, end, held in parts[1:] and parts:
            yield (reference,), {"row_groups": [first, end], "bytes": held}
    if together:
        yield tuple(together), {}


def work(attempt: Attempt) -> Stats:
    """Extract a task's files into `candidates-SNAPSHOT-NUMBER.parquet`."""
    from dataset_build.extract import candidates, inputs

    params, reads = attempt.task.params, attempt.task.reads
    snapshot = str(params["snapshot"])
    target = attempt.folder / f"candidates-{snapshot}-{params['number']:05d}.parquet"
    function, detect = attempt.settings.language, None
    if function:
        detect = functions.load(SETTING, function, params["language"])
    done, failed = 0, 0
    with (
        closing(inputs.fetched(attempt)) as fetched,
        candidates.Candidates(target, attempt.settings, snapshot, detect=detect) as out,
    ):
        for number, (reference, get) in enumerate(fetched):
            out.file = remote.name_of(reference)
            try:
                done += _read(attempt, number, get, out, done)
            except (BadInput, MissingInput) as error:
                failed += 1
                if failed > attempt.settings.max_failed_files * len(reads):
                    if remote.is_remote(reference) and isinstance(error, BadInput):
                        raise UserError(error) from None  # another time the server may give it
                    raise
                out.stats.counts["failed_files"] += 1
                why = str(error).removeprefix(f"{reference}: ")
                out.stats.warn(reference, f"left out, by extract.max_failed_files: {why}")
    return out.stats


def _read(
    attempt: Attempt, number: int, get: Callable[[], Path], out: Candidates, done: int
) -> int:
    """Put a task's file to `out`, after `done` bytes of others; its size in bytes."""
    from dataset_build.extract import inputs

    path, reads = get(), attempt.task.reads
    reference = remote.shown(reads[number])
    size: int = attempt.task.params.get("bytes") or path.stat().st_size
    if remote.is_remote(reference):
        out.stats.counts["bytes_fetched"] += size
    # Of those that are yet to be fetched nobody knows the sizes: they count as this one.
    later = [inputs.size(attempt.run, further) for further in reads[number + 1 :]]
    total = done + size + sum(size if known is None else known for known in later)

    def tell(share: float) -> None:
        attempt.stop.check()
        attempt.progress(done + int(share * size), total, "bytes")

    before, rows = Counter(out.stats.counts), out.stats.rows_in
    with inputs.named(reference, path):
        _extract(attempt, path, out, tell)
        rows, counts = out.stats.rows_in - rows, out.stats.counts - before
        if wrong := _wrong(attempt, reference, size, rows, counts):
            out.stats.warn(reference, wrong)
    return size


def _wrong(attempt: Attempt, reference: str, size: int, rows: int, counts: Counter[str]) -> str:
    """What is wrong with a file of `size` bytes, by what was counted while it was read."""
    from dataset_build.extract import archive, pool

    kind = attempt.task.params["kind"]
    if kind == "pool":
        return pool.losses(rows, counts)
    lost = archive.losses(reference, size, counts, attempt.settings.max_lost)
    if lost or counts["pages"]:
        return lost
    return f"no page with pictures in it; is this a file for extract.{kind}?"


def _extract(
    attempt: Attempt, path: Path, out: Candidates, progress: Callable[[float], None]
) -> None:
    """Put what one file holds to `out`; `progress` is told which share of it is read."""
    from dataset_build.extract import pool, warc, wat

    settings: ExtractSettings = attempt.settings
    params = attempt.task.params
    kind = params["kind"]
    if kind == "pool":
        known = settings.columns
        pool.extract(
            path,
            out,
            progress,
            source=str(params["snapshot"]),
            columns=KNOWN[known] if isinstance(known, str) else known,
            row_groups=params.get("row_groups"),
        )
    else:
        size = max(1, path.stat().st_size)

        def read(position: int) -> None:
            progress(position / size)

        if kind == "wat":
            wat.extract(path, out, read)
        else:
            warc.extract(path, out, read, settings.figure_captions)


STAGE = Stage(
    "extract",
    needs=(),
    plan=plan,
    work=work,
    unit="candidates",
    can_lose_tasks=True,
    version=4,
)

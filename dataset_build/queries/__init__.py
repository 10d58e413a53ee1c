"""The queries: what the pictures of the dataset shall be about, 500,000 words and names.

CLIP's recipe (Radford et al. 2021, §2.2): words that are frequent in Wikipedia, its bigrams of high
mutual information, titles of its popular articles, and WordNet's synsets. Dumps are counted in a
task each; one more task assembles the list.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from pipeline import files
from pipeline.config import ConfigError, MissingInput, Settings
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats

_FILES_A_TASK = 24  # hourly page views: a day


class QueriesSettings(Settings):
    """Where the queries come from. A source without files is left out."""

    wikipedia: tuple[str, ...] = ()
    """Wikipedia dumps, `pages-articles` XML (plain, .bz2, .gz): patterns of paths, or of a stage's
    outputs (`sample_web:*.xml.bz2`). The dump in parts is counted in parallel, one task each; so is
    a multistream dump whose index lies beside it, as Wikimedia names it. Of a damaged one what can
    be read is counted; the log and the report name it."""
    page_views: tuple[str, ...] = ()
    """Wikimedia's hourly page view files (`pageviews-*.gz`). With a dump, only titles of its
    articles count, and views of a redirect for the article that it leads to."""
    wordnet: tuple[str, ...] = ()
    """WordNet's data files, or their folder, e.g. `/usr/share/wordnet`."""
    file: tuple[str, ...] = ()
    """Your own queries, one a line, UTF-8 (plain or .gz); they come before all others, file by file
    as named here."""
    bytes_per_task: int = Field(default=256 << 20, gt=0)
    """Bytes of a multistream dump that one task counts: some twenty minutes."""
    wiki: str = "en"
    """Name of the wiki in the page view files; its mobile site is added."""
    min_word_count: int = Field(default=100, gt=0)
    """A word of Wikipedia becomes a query from this many occurrences on."""
    max_bigrams: int = Field(default=100_000, ge=0)
    """At most so many bigrams, those of the highest pointwise mutual information."""
    min_bigram_count: int = Field(default=50, gt=0)
    """Rarer bigrams are not considered: mutual information ranks chance finds highest."""
    min_bigram_pmi: float = 3.0
    """Bits; 3 means that the words meet eight times as often as chance would have it."""
    max_titles: int | None = Field(default=None, ge=0)
    """At most so many queries that only titles bring, the most viewed first; null: as many as there
    is room for."""
    min_views: int = Field(default=70, gt=0)
    """An article's title becomes a query from this many views on, summed over all files."""
    limit: int = Field(default=500_000, gt=0, lt=2**32)
    """How many queries there are, if the sources have as many. WordNet's are all among them: what
    does not fit is cut off from titles first, then from bigrams, words, and your own."""
    max_counts_held: int = Field(default=20_000_000, gt=0)
    """Distinct words and bigrams that a task keeps in memory, some 100 bytes each. When there are
    more it writes them out and begins anew: no count depends on it."""

    # Whatever only the assembly reads is part of that task's parameters instead: another threshold
    # assembles anew in a minute, and counts no dump again.
    operational: ClassVar[frozenset[str]] = frozenset(
        [
            "wikipedia", "bytes_per_task", "page_views", "wordnet", "file", "wiki",
            "min_word_count", "max_bigrams", "min_bigram_count", "min_bigram_pmi", "max_titles",
            "min_views", "limit", "max_counts_held",
        ]
    )  # fmt: skip


def plan(run: Run) -> list[Task]:
    """A task for each dump and for each day of page views."""
    settings: QueriesSettings = run.settings("queries")
    if not (settings.wikipedia or settings.page_views or settings.wordnet or settings.file):
        raise ConfigError(
            "queries: no source is set; give at least one of wikipedia, page_views, wordnet, file"
        )
    tasks: list[Task] = []
    for dump in _found(run, "wikipedia"):
        for bounds in _parts(run.path(dump), settings.bytes_per_task):
            params = {"step": "wikipedia", **bounds}
            tasks.append(Task("queries", len(tasks), (dump,), params))
    views = _found(run, "page_views")
    for start in range(0, len(views), _FILES_A_TASK):
        reads = tuple(views[start : start + _FILES_A_TASK])
        params = {"step": "page_views", "wiki": settings.wiki}
        tasks.append(Task("queries", len(tasks), reads, params))
    return tasks


def _parts(dump: Path, most: int) -> list[dict[str, list[int]]]:
    """What of a dump each task reads: all of it, or a range of bytes of a multistream dump."""
    from dataset_build.queries.multistream import is_multistream

    size = dump.stat().st_size
    if size <= most or not is_multistream(dump):
        return [{}]
    parts = -(-size // most)
    edges = [part * size // parts for part in range(parts + 1)]
    return [{"bytes": [first, last]} for first, last in itertools.pairwise(edges)]


def plan_assembly(run: Run) -> list[Task]:
    """One task that reads all counts."""
    settings: QueriesSettings = run.settings("queries")
    counts = run.find("queries:counts-*") if settings.wikipedia or settings.page_views else []
    wordnet, own = _found(run, "wordnet"), _found(run, "file")
    rules = settings.model_dump(
        include={
            "min_word_count", "max_bigrams", "min_bigram_count", "min_bigram_pmi", "max_titles",
            "min_views", "limit",
        }
    )  # fmt: skip
    params = {"step": "assemble", "wordnet": len(wordnet), "own": len(own), "rules": rules}
    index = len(plan(run))
    return [Task("queries", index, (*counts, *wordnet, *own), params)]


def work(attempt: Attempt) -> Stats:
    """Count a dump or page views into `counts-*.parquet`, or assemble `queries.parquet`."""
    params, settings = attempt.task.params, attempt.settings
    fold_case = attempt.run.settings("text").fold_case
    name = f"{attempt.task.index:05d}"

    def progress(done: int, total: int) -> None:
        attempt.stop.check()
        attempt.progress(done, total, "bytes" if params["step"] == "wikipedia" else "files")

    if params["step"] == "wikipedia":
        from dataset_build.queries.wikipedia import count_dump

        return count_dump(
            attempt.inputs()[0],
            attempt.folder,
            name,
            fold_case=fold_case,
            max_held=settings.max_counts_held,
            progress=progress,
            bounds=tuple(params["bytes"]) if "bytes" in params else None,
        )
    if params["step"] == "page_views":
        from dataset_build.queries.page_views import count_views

        wiki = params["wiki"]
        return count_views(attempt.inputs(), attempt.folder, name, wiki=wiki, progress=progress)
    from dataset_build.queries.assemble import Rules, assemble

    rest = list(attempt.inputs())
    own = [rest.pop() for _ in range(params["own"])][::-1]
    wordnet = [rest.pop() for _ in range(params["wordnet"])][::-1]
    rules = Rules(fold_case=fold_case, **params["rules"])
    held = settings.max_counts_held
    return assemble(rest, wordnet, own, attempt.folder, rules, max_held=held)


def _found(run: Run, source: str) -> list[str]:
    found: list[str] = []
    for pattern in getattr(run.settings("queries"), source):
        if source == "wordnet" and Path(pattern).expanduser().is_dir():
            pattern = f"{pattern}/data.*"
        try:
            found += run.find(pattern)
        except MissingInput as error:
            raise MissingInput(f"queries.{source}: {error}") from None
    distinct = files.distinct(found, links=True)
    return distinct if source == "file" else sorted(distinct)


STAGE = Stage(
    "queries",
    needs=(),
    plan=plan,
    work=work,
    then=(plan_assembly,),
    unit="queries",
    also=("text",),
    version=6,
)

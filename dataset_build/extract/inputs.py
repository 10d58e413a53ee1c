"""Which files are read, of patterns and of lists; and those that are elsewhere, fetched."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Event

import xxhash

from dataset_build.extract import ExtractSettings
from pipeline import files, remote
from pipeline.config import ConfigError, MissingInput, UserError
from pipeline.pace import Pace
from pipeline.stage import Attempt, Run

ENDINGS = {
    "wat": (".warc.wat.gz", ".warc.wat"),
    "warc": (".warc.gz", ".warc"),
    "pool": (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz"),
}
"""What is read of a folder, by kind."""
_LISTS = (".paths", ".paths.gz")
_GZIP = b"\x1f\x8b"  # what it begins with, whatever its name
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LOOK_S = 0.2


def references(run: Run, kind: str) -> list[str]:
    """References, sorted, to all files of a kind (`wat`, `warc`, `pool`) that the settings name.

    Asks servers for lists and for what lies in a folder, never for the files themselves. Raises
    `MissingInput`, `ConfigError` and `UserError`, each naming the setting.
    """
    settings: ExtractSettings = run.settings("extract")
    found: set[str] = set()
    for pattern in getattr(settings, kind):
        try:
            find = remote.find if remote.is_remote(pattern) else run.find
            for reference in find(pattern, ENDINGS[kind]):
                name = remote.name_of(reference).lower()
                if name.endswith(_LISTS):
                    found.update(_listed(run, reference, settings.base_url))
                else:
                    found.add(reference)
                    if kind == "pool" and not name.endswith(ENDINGS[kind]):
                        raise ConfigError(
                            f"{remote.shown(reference)}: a pool's name ends in"
                            f" {', '.join(ENDINGS[kind])}"
                        )
        except UserError as error:
            raise type(error)(f"extract.{kind}: {error}") from None
    return files.distinct(sorted(found))


def check(run: Run) -> None:
    """Raises `MissingInput` for a pattern of files on this machine that names none.

    What other stages make, and what is elsewhere, is looked for when its time has come.
    """
    for kind, endings in ENDINGS.items():
        for pattern in getattr(run.settings("extract"), kind):
            if not remote.is_remote(pattern) and ":" not in pattern.partition("/")[0]:
                try:
                    run.find(pattern, endings)
                except MissingInput as error:
                    raise MissingInput(f"extract.{kind}: {error}") from None


def size(run: Run, reference: str) -> int | None:
    """Bytes of an input; None of one that is elsewhere."""
    return None if remote.is_remote(reference) else run.path(reference).stat().st_size


def fetched(attempt: Attempt) -> Generator[tuple[str, Callable[[], Path]], None, None]:
    """Each of a task's inputs, in order, as it may be told, and what gets its file; close it when
    done.

    Getting one raises as `remote.fetch` does, and goes on to fetch the next: one that is elsewhere
    is there until the next is asked for, so two at most lie in the attempt's own folder. A task
    that reads one has one.
    """
    settings: ExtractSettings = attempt.settings
    folder = (attempt.partial or attempt.folder.parent) / f"{attempt.folder.name}.fetched"
    turns = attempt.run.stage_folder(attempt.task.stage) / "pace"
    pace = Pace(turns, settings.max_requests_per_s, "extract.max_requests_per_s")
    closed = Event()
    fetches: dict[int, _Fetch] = {}
    reads = attempt.task.reads

    def begin(number: int) -> None:
        if number < len(reads) and remote.is_remote(reads[number]):
            folder.mkdir(parents=True, exist_ok=True)
            fetches[number] = fetch = _Fetch(folder / f"{number}-{_file_name(reads[number])}")
            fetch.done = pool.submit(
                remote.fetch, reads[number], fetch.path, pace, stopping, fetch.tell
            )

    def stopping() -> bool:
        return closed.is_set() or bool(attempt.stop)

    def get(number: int) -> Path:
        fetch = fetches.get(number)
        try:
            if fetch:
                fetch.await_it(attempt)
        finally:
            begin(number + 1)
        return fetch.path if fetch else attempt.run.path(reads[number])

    pool = ThreadPoolExecutor(1, "fetch")
    try:
        begin(0)
        for number, reference in enumerate(reads):
            yield remote.shown(reference), partial(get, number)
            if fetch := fetches.pop(number, None):
                fetch.path.unlink(missing_ok=True)
    finally:
        closed.set()
        pool.shutdown()
        if folder.exists():
            files.remove_tree(folder)


@contextmanager
def named(reference: str, path: Path) -> Iterator[None]:
    """Errors of who reads a fetched file name its address instead."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace(str(path), reference)) from None


@dataclass
class _Fetch:
    """A file on its way."""

    path: Path
    position: int = 0
    size: int | None = None
    done: Future[None] = field(default_factory=Future)

    def tell(self, position: int, size: int | None) -> None:
        self.position, self.size = position, size

    def await_it(self, attempt: Attempt) -> None:
        """Return when it is there. Raises what `remote.fetch` raised, and `Stopped`."""
        while not self.done.done():
            attempt.stop.check()
            attempt.progress(self.position, self.size, "bytes fetched")
            wait([self.done], _LOOK_S)
        self.done.result()


def _file_name(reference: str) -> str:
    """What a fetched file may be called: readers look at its ending."""
    return re.sub(r"[^\w.-]", "_", remote.name_of(reference))[-150:]


def _listed(run: Run, reference: str, base_url: str) -> list[str]:
    """References to the files that a list names."""
    entries = _entries(run, reference)
    prefix, root = _root(reference)
    if base_url:
        prefix, root = base_url.rstrip("/") + "/", PurePosixPath()
    found = []
    missing: list[str] = []
    for entry in entries:
        if remote.is_remote(entry):
            found.append(entry)
        elif remote.is_remote(prefix):
            found.append(prefix + str(root / entry).lstrip("/"))
        else:
            found.append(f"{prefix}{root / entry}")
            if not run.path(found[-1]).is_file():
                missing.append(found[-1])
    for address in filter(remote.is_remote, found):
        remote.parts(address)
    if missing:
        more = f", and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise MissingInput(
            f"{missing[0]}{more}: listed in {reference}, but not there; download what is missing"
            f" below {root}, take its lines off the list, or have it fetched: extract.base_url"
        )
    return found


def _root(reference: str) -> tuple[str, PurePosixPath]:
    """What a list's entries are relative to: the folder above `crawl-data` if the list is below
    one, else its own. Before the folder comes what is no path: host or bucket, or a stage."""
    prefix, name = "", reference
    if remote.is_remote(reference):
        scheme, _, rest = reference.partition("://")
        host, _, name = rest.partition("/")
        prefix = f"{scheme}://{host}/"
    elif (colon := reference.find(":")) >= 0 and "/" not in reference[:colon]:
        prefix, name = reference[: colon + 1], reference[colon + 1 :]
    folder = PurePosixPath(name).parent
    parts = folder.parts
    above = PurePosixPath(*parts[: parts.index("crawl-data")]) if "crawl-data" in parts else folder
    return prefix, above


def _entries(run: Run, reference: str) -> list[str]:
    """The lines of a list, none of them empty. One that is elsewhere is kept, known by its address:
    a run asks for it once, and is planned again without the network. Raises `ConfigError` for what
    is no list, which is not kept; `MissingInput`."""
    if not remote.is_remote(reference):
        path = run.path(reference)
        try:
            with path.open("rb") as stream:
                return _lines(reference, stream.read(remote.MOST_OF_A_LIST + 1))
        except OSError as error:
            raise MissingInput(f"{reference}: cannot be read ({error.strerror})") from None
    told = remote.shown(reference)
    kept = run.stage_folder("extract") / "lists" / xxhash.xxh3_128_hexdigest(reference.encode())
    if kept.exists():
        return _lines(f"{told}, kept as {kept}", kept.read_bytes())
    entries = _lines(told, content := remote.read(reference))
    if run.folder.exists():
        files.write_atomic(kept, content)
    return entries


def _lines(name: str, content: bytes) -> list[str]:
    """The lines of a list called `name`, packed or not."""
    most = remote.MOST_OF_A_LIST
    try:
        if content.startswith(_GZIP):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(most + 1)
        if len(content) > most:
            raise ValueError(f"more than {most:,} bytes")
        lines = content.decode().split("\n")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(f"{name}: not a list of paths ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if entry := line.strip():
            if entry.startswith("<") or _CONTROL.search(entry):
                raise ConfigError(f"{name}: not a list of paths (line {number}: {entry[:80]!r})")
            found.append(entry)
    if not found:
        raise MissingInput(f"{name}: a list without any path")
    return found

"""Pairs of an existing pool (LAION, CommonPool, COYO, CC12M …): addresses and texts from tables.

Tables are parquet, csv (RFC 4180) or tsv, where a tab is a tab and a quote is a quote.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from dataset_build.extract.candidates import Candidates
from dataset_build.extract.columns import Columns
from dataset_build.extract.urls import MAX_LENGTH, of_page
from pipeline import files
from pipeline.config import BadInput, ConfigError

# As LAION, CommonPool, COYO, CC3M/CC12M and RedCaps call them; compared in lower case.
_USUAL = {
    "url": ("url", "image_url", "img_url"),
    "text": ("text", "caption", "alt_text", "alt", "top_caption"),
    "page_url": ("page_url", "page", "parent_url"),
}
_ROWS_A_CHECK = 4096
_BATCH_ROWS = 2048
_BATCH_BYTES = 128 << 20
_MOST_LINES = 100  # of a row: a quote that nothing closes does not swallow more
_MOST_CHARS = 1 << 20  # of a line


def extract(
    path: Path,
    candidates: Candidates,
    progress: Callable[[float], None],
    *,
    source: str,
    columns: Columns,
    row_groups: tuple[int, int] | None = None,
) -> None:
    """Put every row of a table to `candidates`, or those of a range of a parquet file's row groups.

    `source` is what its texts come from, `progress` is told which share is read. An unreadable row
    group or line costs itself only, a cut end of a compressed file itself. Raises `BadInput` if
    the file is no table, `ConfigError` if it has no such columns.
    """
    if path.suffix.lower() == ".parquet":
        _parquet(path, candidates, progress, source, columns, row_groups)
    else:
        _delimited(path, candidates, progress, source, columns)


def losses(rows: int, counts: Counter[str]) -> str:
    """What a table of so many rows has lost, by what `extract` counted; "" for nothing."""
    cut, broken = counts["truncated_files"], counts["broken_row_groups"]
    foreign = counts["texts_not_utf8"]
    what = ["damaged or cut off: what follows on that is lost"] * cut
    what += [f"{broken} row group{'s' * (broken > 1)} cannot be read"] * (broken > 0)
    texts = f"{foreign:,} text{'s' * (foreign > 1)}"
    what += ["no row in it"] * (not rows)
    what += [f"{texts} not written in UTF-8: letters are lost"] * (foreign > 0)
    return "; ".join(what)


def parts(path: Path, most: int) -> list[tuple[int, int, int]]:
    """Ranges of row groups of about `most` bytes each: first, the one after the last, and bytes.

    Raises `BadInput` for what is no parquet file.
    """
    with _opened(path) as parquet:
        about = parquet.metadata
        sizes = [about.row_group(group).total_byte_size for group in range(about.num_row_groups)]
    scale = path.stat().st_size / max(1, sum(sizes))  # those are bytes before compression
    found: list[tuple[int, int, int]] = []
    first, held = 0, 0.0
    for group, size in enumerate(sizes):
        held += size * scale
        if held >= most or group == len(sizes) - 1:
            found.append((first, group + 1, round(held)))
            first, held = group + 1, 0.0
    return found


def _parquet(
    path: Path,
    candidates: Candidates,
    progress: Callable[[float], None],
    source: str,
    columns: Columns,
    row_groups: tuple[int, int] | None,
) -> None:
    with _opened(path) as parquet:
        found = _found(path, parquet.schema_arrow.names, columns)
        for name in found:
            if not _holds_text(kind := parquet.schema_arrow.field(name).type):
                raise ConfigError(f"{path}: its column {name} holds {kind}, not text: set"
                                  " extract.columns to those of addresses and texts")  # fmt: skip
        first, end = row_groups or (0, parquet.num_row_groups)
        # As many bytes of a value as make no difference; a character has four at most.
        most = 4 * max(candidates.max_raw_chars, 2 * MAX_LENGTH)
        for group in range(first, end):
            progress((group - first) / (end - first))
            batches, seen = _batches(path, parquet, group, found), 0
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise  # the disk's fault, not the table's
                    candidates.stats.counts["broken_row_groups"] += 1
                    lost = max(0, parquet.metadata.row_group(group).num_rows - seen)
                    candidates.stats.rows_in += lost
                    candidates.stats.drop("broken_row_group", lost)
                    break
                if batch is None:
                    break
                rows = [_values(batch.column(column), most) for column in found]
                pages = rows[2] if len(rows) > 2 else [""] * batch.num_rows
                for address, text, page_url in zip(*rows[:2], pages, strict=True):
                    _row(candidates, address, text, page_url, source)
                seen += batch.num_rows


def _batches(path: Path, parquet: Any, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """A row group's rows, in parts of which a column takes some `_BATCH_BYTES` at most.

    A value that is written once, in a dictionary, may be that of all rows. Where such a one is long
    the columns are read as dictionaries, which takes longer if there is none.
    """
    about = parquet.metadata.row_group(group)
    chunks = [about.column(number) for number in range(about.num_columns)]
    sizes = (one.total_uncompressed_size for one in chunks if one.path_in_schema in columns)
    held = max(sizes, default=0)
    rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * about.num_rows // max(1, held)))
    if held * min(rows, about.num_rows) > _BATCH_BYTES:
        with files.open_parquet(path, dictionaries=columns) as encoded:
            begin = next(encoded.iter_batches(1, row_groups=[group], columns=columns))
            if max(map(_longest, begin.columns)) * rows > _BATCH_BYTES:
                yield from encoded.iter_batches(rows, row_groups=[group], columns=columns)
                return
    yield from parquet.iter_batches(rows, row_groups=[group], columns=columns)


def _delimited(
    path: Path,
    candidates: Candidates,
    progress: Callable[[float], None],
    source: str,
    columns: Columns,
) -> None:
    """A csv or tsv file. Bytes that are no UTF-8 become U+FFFD."""
    stats, size = candidates.stats, max(1, path.stat().st_size)
    name = path.name.lower()
    comma = "\t" if name.removesuffix(".gz").endswith(".tsv") else ","
    with path.open("rb") as raw:
        if (begin := raw.read(2)) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise BadInput(f"{path}: written in UTF-16; convert it to UTF-8")
        if not begin:
            raise BadInput(f"{path}: empty; fetch it again")
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
        text = io.TextIOWrapper(cast("io.BufferedReader", stream), "utf-8-sig", "replace", "\n")
        number, lines = 0, _lines(text)
        try:
            names = columns.names or _split(next(lines, ""), comma) or ()
            names = tuple(name.strip() for name in names)
            found = [names.index(column) for column in _found(path, names, columns)]
            for number, row in enumerate(_rows(lines, comma, len(names)), 1):
                if number % _ROWS_A_CHECK == 0:
                    progress(raw.tell() / size)
                if row is None:
                    stats.rows_in += 1
                    stats.drop("bad_row")
                else:
                    address, caption, *rest = (row[column] for column in found)
                    _row(candidates, address, caption, rest[0] if rest else "", source)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            if not number:
                raise BadInput(f"{path}: cannot be read ({error}); fetch it again") from None
            stats.counts["truncated_files"] += 1


def _rows(lines: Iterator[str], comma: str, width: int) -> Iterator[list[str] | None]:
    """Rows of so many columns; None for a line that neither is one nor begins one.

    The lines after such a one are read as if it were not there.
    """
    ahead: deque[str] = deque()  # lines that were taken for a part of another

    def after() -> str | None:
        return ahead.popleft() if ahead else next(lines, None)

    while (line := after()) is not None:
        if not line.strip("\r"):
            continue
        taken = [line]
        is_open = comma == "," and line.count('"') % 2 == 1
        while is_open and len(taken) < _MOST_LINES and (more := after()) is not None:
            taken.append(more)
            is_open ^= more.count('"') % 2 == 1
        row = None if is_open else _split("\n".join(taken), comma)
        if row is None or len(row) != width:
            ahead.extendleft(reversed(taken[1:]))
            row = None
        yield row


def _split(row: str, comma: str) -> list[str] | None:
    """A row's columns; None if its quotes are not as they must be."""
    row = row.removesuffix("\r")
    if comma != "," or '"' not in row:
        return row.split(comma)
    try:
        return next(csv.reader([row], strict=True))
    except csv.Error:
        return None


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    """Lines without their ends; in the place of one that is too long, one that is no row."""
    while line := text.readline(_MOST_CHARS):
        whole = line
        while len(line) == _MOST_CHARS and line[-1] != "\n":
            whole, line = "\0", text.readline(_MOST_CHARS)
        yield whole.removesuffix("\n")


def _opened(path: Path) -> Any:
    try:
        return files.open_parquet(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path}: not a readable parquet file ({error}); fetch it again") from None


def _holds_text(kind: pa.DataType) -> bool:
    """Whether values of a type may be texts; a column of nulls alone has a type of its own."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    raw = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
    return any(is_so(kind) for is_so in (*text, *raw))


def _values(column: pa.Array[Any], most: int) -> list[str | None]:
    """A column's texts; of long ones `most` bytes at least. Bytes that are no UTF-8 are U+FFFD."""
    values: list[Any]
    indices = None
    if isinstance(column, pa.DictionaryArray):
        column, indices = column.dictionary, column.indices
    if _longest(column) > most:
        # A letter that is cut here is none of the first quarter of as many characters.
        column = pc.binary_slice(column.cast(pa.large_binary()), 0, most)
    if indices is not None:
        column = column.take(indices)
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # written by a program that did not check
        values = column.cast(pa.binary()).to_pylist()
    if isinstance(next(filter(None, values), None), bytes):
        return [value and value.decode("utf-8", "replace")[: most // 4] for value in values]
    return values


def _longest(column: pa.Array[Any]) -> int:
    """Bytes of the longest text of a column, or of its dictionary."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary
    if pa.types.is_null(column.type):
        return 0
    if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
        column = column.cast(pa.large_binary())
    return pc.max(pc.binary_length(column)).as_py() or 0


def _row(
    candidates: Candidates, url: str | None, text: str | None, page_url: str | None, source: str
) -> None:
    if not text or text.isspace():
        candidates.without_text(1)
        return
    if "\ufffd" in text:
        candidates.stats.counts["texts_not_utf8"] += 1
    page = of_page(page_url)[0] if page_url else ""
    candidates.row(url or "", text, source, page)


def _found(path: Path, names: Sequence[str], columns: Columns) -> list[str]:
    """The columns of addresses and texts, and that of pages if there is one."""
    lower = {name.lower(): name for name in reversed(names)}
    found = []
    for what, usual in _USUAL.items():
        if given := getattr(columns, what):
            column = given if given in names else None
        else:
            column = next((lower[n] for n in usual if n in lower and lower[n] not in found), None)
        if column is not None:
            if list(names).count(column) > 1:
                raise ConfigError(f"{path}: two of its columns are called {column}; name others in"
                                  " extract.columns")  # fmt: skip
            found.append(column)
        elif given or what != "page_url":
            wanted = repr(given) if given else f"column called {', '.join(usual)}"
            there = ", ".join(n[:80] if n.isprintable() else repr(n[:80]) for n in names[:50])
            hint = f"set extract.columns.{what} to one of them"
            if path.suffix.lower() != ".parquet":
                hint += ", or columns.names if they are no names"
            if len(names) == 1 and (sign := re.search(r"[;|\t,]", names[0])):
                hint = f"is {sign[0]!r} between its columns? A .csv has commas there, a .tsv tabs"
            raise ConfigError(f"{path}: no {wanted}; it has {there}: {hint}")
    return found

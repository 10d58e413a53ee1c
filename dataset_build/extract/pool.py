"""Pairs of an existing pool (LAION, CommonPool, COYO …): addresses and texts from parquet files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataset_build.extract.candidates import Candidates
from pipeline import files
from pipeline.config import UserError

# As LAION, CommonPool, COYO, CC3M/CC12M, RedCaps and WIT call them; compared in lower case.
_URL_NAMES = ("url", "image_url", "img_url")
_TEXT_NAMES = ("text", "caption", "alt_text", "alt", "top_caption")
_PAGE_NAMES = ("page_url", "page", "parent_url")


def extract(
    path: Path,
    candidates: Candidates,
    progress: Callable[[float], None],
    *,
    name: str,
    url_column: str,
    text_column: str,
) -> None:
    """Put every row of a parquet file to `candidates`; `name` is their source.

    Empty column names are found by the names that known pools use. An unreadable row group costs
    itself only. Raises `UserError` if the file is no parquet or has no such columns.
    """
    try:
        parquet = files.open_parquet(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); fetch it again") from None
    with parquet:
        names = parquet.schema_arrow.names
        url = _column(path, names, url_column, _URL_NAMES, "url_column")
        text = _column(path, names, text_column, _TEXT_NAMES, "text_column")
        page = next((n for n in names if n.lower() in _PAGE_NAMES and n not in {url, text}), None)
        columns = [url, text, *([page] if page else [])]
        for group in range(parquet.num_row_groups):
            progress(group / parquet.num_row_groups)
            seen = 0
            try:
                batches = parquet.iter_batches(8192, row_groups=[group], columns=columns)
                for batch in batches:
                    rows = [_values(batch.column(column)) for column in columns]
                    pages = rows[2] if page else [""] * batch.num_rows
                    for address, caption, page_url in zip(*rows[:2], pages, strict=True):
                        _row(candidates, address, caption, page_url, name)
                    seen += batch.num_rows
            except (pa.ArrowException, OSError):
                lost = parquet.metadata.row_group(group).num_rows - seen
                candidates.stats.rows_in += lost
                candidates.stats.drop("broken_row_group", lost)


def _values(column: pa.Array[Any]) -> list[Any]:
    values: list[Any]
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # written by a program that did not check
        values = column.cast(pa.binary()).to_pylist()
    return values


def _row(candidates: Candidates, url: object, text: object, page_url: object, name: str) -> None:
    if isinstance(url, bytes):
        url = url.decode("utf-8", "replace")
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    page = page_url if isinstance(page_url, str) else ""
    texts = [(name, text)] if isinstance(text, str) else []
    candidates.link(url if isinstance(url, str) else "", texts, page, "")


def _column(
    path: Path, names: Sequence[str], given: str, known: Sequence[str], setting: str
) -> str:
    if given:
        if given in names:
            return given
        found = None
    else:
        lower = {name.lower(): name for name in reversed(names)}
        found = next((lower[name] for name in known if name in lower), None)
    if found is None:
        wanted = repr(given) if given else f"column called {', '.join(known)}"
        raise UserError(
            f"{path}: no {wanted}; it has {', '.join(names)}: set extract.{setting} to one of them"
        )
    return found

"""What telling the language of every caption costs beside extracting them.

260 real pages; as the WARC file that they are, and their candidates as a pool, from which nothing
is quicker to extract.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dataset_build import language
from dataset_build.extract import ExtractSettings, pool, warc
from dataset_build.extract.candidates import Candidates
from dataset_build.extract.columns import Columns
from pipeline.config import MissingInput

ROUNDS = 5
PAGES = "webarchive/news-pages-260.warc.gz"


def measure() -> Iterator[dict[str, Any]]:
    """A line for each source; `ratio` is the share of its speed that extraction keeps.

    Raises `MissingInput` without `$OPENWIT_DATA`.
    """
    root = os.environ.get("OPENWIT_DATA", "")
    if not root or not (pages := Path(root) / PAGES).exists():
        raise MissingInput(f"the benchmark needs {PAGES} in $OPENWIT_DATA")
    language.codes(["its model is loaded"])
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "pool.parquet"
        yield _result("warc", table, lambda out: warc.extract(pages, out, _no_matter))
        known = Columns(url="url", text="text")
        yield _result(
            "pool",
            Path(folder) / "again.parquet",
            lambda out: pool.extract(table, out, _no_matter, source="pool", columns=known),
        )


def _result(source: str, target: Path, extract: Callable[[Candidates], None]) -> dict[str, Any]:
    settings = ExtractSettings(languages=("en", ""))
    with_: list[float] = []
    without: list[float] = []
    for _ in range(ROUNDS):  # in turns, so that neither has the quieter time
        for detect, seconds in ((language.codes, with_), (None, without)):
            start = time.process_time()
            with Candidates(target, settings, "s", detect=detect) as out:
                extract(out)
            seconds.append(time.process_time() - start)
    ours, peer = min(with_), min(without)
    captions = out.stats.rows_out
    return {
        "name": "language",
        "source": source,
        "ours": round(captions / ours),
        "peer": round(captions / peer),
        "ratio": round(peer / ours, 2),
        "unit": "captions/s of a core, extracted with their language and without",
        "captions": captions,
        "us_a_caption": round((ours - peer) / captions * 1e6, 1),
        "times_extraction": round((ours - peer) / peer, 2),
    }


def _no_matter(_: float) -> None: ...
